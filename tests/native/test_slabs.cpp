// test_slabs.cpp: memory of blocks: no two overlap, slabs grow and go back

#include "check.h"
#include "qcache-slabs.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <cstring>
#include <random>

static void check_pool(size_t block_bytes, int n) {
    qcache_slabs                     pool(ggml_backend_cpu_buffer_type(), block_bytes);
    std::vector<qcache_slabs::place> held;
    std::vector<uint8_t>             mark;
    std::mt19937                     random(1);

    const auto intact = [&](size_t i) {
        const uint8_t * data = pool.data(held[i]);
        return data[0] == mark[i] && data[block_bytes / 2] == mark[i] && data[block_bytes - 1] == mark[i];
    };
    for (int i = 0; i < 3 * n; i++) {
        if (i < n || random() % 2 == 0) {
            qcache_slabs::place p;
            CHECK(pool.take(p));
            memset(pool.data(p), i, block_bytes);
            held.push_back(p);
            mark.push_back((uint8_t) i);
            CHECK((uintptr_t) pool.data(p) % ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type()) == 0);
            const auto * base = (const uint8_t *) ggml_backend_buffer_get_base(pool.buffer(p));
            CHECK(pool.data(p) >= base && pool.data(p) + block_bytes <= base + ggml_backend_buffer_get_size(pool.buffer(p)));
        } else {
            const size_t at = random() % held.size();
            CHECK(intact(at));
            pool.give_back(held[at]);
            held.erase(held.begin() + at);
            mark.erase(mark.begin() + at);
        }
    }
    for (size_t i = 0; i < held.size(); i++) {
        CHECK(intact(i));
    }
    CHECK(pool.bytes() >= held.size() * block_bytes);
    while (!held.empty()) {
        pool.give_back(held.back());
        held.pop_back();
    }
    CHECK(pool.bytes() == 0);
}

// what is taken ahead of use: as much again as is in use, at most a slab of 64 MB
static void check_growth() {
    const size_t                     block_bytes = 3 << 20;
    qcache_slabs                     pool(ggml_backend_cpu_buffer_type(), block_bytes);
    std::vector<qcache_slabs::place> held(200);
    for (size_t i = 0; i < held.size(); i++) {
        CHECK(pool.take(held[i]));
        const size_t used = (i + 1) * block_bytes;
        CHECK(pool.bytes() <= 2 * used + (4 << 20) || pool.bytes() <= used + (68u << 20));
    }
    for (const auto & p : held) {
        pool.give_back(p);
    }
    CHECK(pool.bytes() == 0);
}

static void check_nothing() {
    qcache_slabs        pool(ggml_backend_cpu_buffer_type(), 0);
    qcache_slabs::place p;
    CHECK(pool.take(p) && pool.data(p) == nullptr && pool.buffer(p) == nullptr && pool.bytes() == 0);
    pool.give_back(p);
}

int main() {
    check_pool(100, 50);
    check_pool(4096, 2000);
    check_pool(5 << 20, 12);
    check_growth();
    check_nothing();
    return check_report("test-slabs");
}
