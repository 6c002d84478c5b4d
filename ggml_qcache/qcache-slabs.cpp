// qcache-slabs.cpp: see qcache-slabs.h

#include "qcache-slabs.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

static constexpr size_t PAGE_BYTES     = (size_t) 2 << 20;
static constexpr size_t SLAB_BYTES_MAX = (size_t) 64 << 20; // what a sequence that grows may take ahead of its use

static size_t round_up(size_t size, size_t to) {
    return (size + to - 1) / to * to;
}

qcache_slabs::qcache_slabs(ggml_backend_buffer_type_t buft, size_t block_bytes) :
    buft(buft), block_bytes(block_bytes), stride(round_up(block_bytes, ggml_backend_buft_get_alignment(buft))) {}

size_t qcache_slabs::bytes() const {
    size_t sum = 0;
    for (const auto & s : slabs) {
        sum += ggml_backend_buffer_get_size(s.buffer.get());
    }
    return sum;
}

// As much again as there is, so that their number stays small. A kernel reads one head's few KB out of each layer of each
// block, so with 4 KB pages nearly every one of these reads would miss the TLB: on the CPU slabs start at a large page.
bool qcache_slabs::grow() {
    const bool   host   = ggml_backend_buft_is_host(buft);
    const size_t wanted = std::clamp(bytes(), PAGE_BYTES, SLAB_BYTES_MAX);
    for (size_t n = std::max<size_t>(wanted / stride, 1); n > 0; n /= 2) { // what is left may be less
        const size_t size = round_up(n * stride, PAGE_BYTES);
        slab         s    = { qcache_buffer_ptr(ggml_backend_buft_alloc_buffer(buft, size + (host ? PAGE_BYTES : 0))), nullptr, 0, {} };
        if (!s.buffer) {
            continue;
        }
        s.first = (uint8_t *) ggml_backend_buffer_get_base(s.buffer.get());
        if (host) {
            s.first = (uint8_t *) round_up((size_t) s.first, PAGE_BYTES);
#if defined(__linux__)
            madvise(s.first, size, MADV_HUGEPAGE); // advice: failure costs speed only
#endif
        }
        s.n_blocks = (int32_t) (size / stride);
        for (int32_t i = s.n_blocks - 1; i >= 0; i--) {
            s.free.push_back(i);
        }
        slabs.push_back(std::move(s));
        return true;
    }
    return false;
}

bool qcache_slabs::take(place & p) {
    if (block_bytes == 0) {
        return true;
    }
    const auto has_free = [](const slab & s) { return !s.free.empty(); };
    auto       found    = std::find_if(slabs.begin(), slabs.end(), has_free);
    if (found == slabs.end()) {
        if (!grow()) {
            return false;
        }
        found = std::prev(slabs.end());
    }
    p = { &*found, found->free.back() };
    found->free.pop_back();
    return true;
}

void qcache_slabs::give_back(const place & p) {
    if (p.in == nullptr) {
        return;
    }
    p.in->free.push_back(p.index);
    if ((int32_t) p.in->free.size() == p.in->n_blocks) {
        slabs.remove_if([&](const slab & s) { return &s == p.in; });
    }
}
