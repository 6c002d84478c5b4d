// qcache-quantize.cpp: quantising rows, to ggml's bits or not at all

#include "qcache-quantize.h"

#include "qcache-impl.h"

#include <ggml.h>

#include <cstring>
#include <vector>

#if defined(__x86_64__)
#    include "cpu/x86-features.h"
#endif

static_assert(QCACHE_QUANTIZED_Q8_0 == (int) GGML_TYPE_Q8_0 && QCACHE_QUANTIZED_Q4_K == (int) GGML_TYPE_Q4_K &&
              QCACHE_QUANTIZED_Q5_K == (int) GGML_TYPE_Q5_K && QCACHE_QUANTIZED_Q6_K == (int) GGML_TYPE_Q6_K);

qcache_quantize_kernel qcache_quantize_kernel_by_index(int i) {
#if defined(__x86_64__)
    const qcache_quantize_kernel kernels[] = { qcache_has_avx512() ? qcache_quantize_avx512 : nullptr, qcache_has_avx2() ? qcache_quantize_avx2 : nullptr };
    for (const auto kernel : kernels) {
        if (kernel != nullptr && i-- == 0) {
            return kernel;
        }
    }
#else
    (void) i;
#endif
    return nullptr;
}

void qcache_quantize_by_ggml(int32_t type, const float * src, uint8_t * dst) {
    ggml_quantize_chunk((ggml_type) type, src, dst, 0, 1, qcache_quantize_block_values(type), nullptr);
}

// A ggml compiled to fuse multiplications and additions, or with another search, gives other bits: one that
// does is found by trying values from small to large.
static bool gives_ggmls_bits(int32_t type, qcache_quantize_kernel kernel) {
    constexpr int      N      = 24;
    const int32_t      values = qcache_quantize_block_values(type);
    const size_t       bytes  = qcache_quantize_block_bytes(type);
    std::vector<float> x((size_t) N * values);
    uint32_t           random = 1;
    for (size_t i = 0; i < x.size(); i++) {
        random = random * 1664525u + 1013904223u;
        x[i]   = ((float) (random >> 8) / (1 << 24) - 0.5f) * (float) (1 + i / values % 8) * 0.01f;
    }
    std::vector<uint8_t> ours(N * bytes), theirs(N * bytes);
    kernel(type, x.data(), ours.data(), N, qcache_quantize_by_ggml);
    for (int i = 0; i < N; i++) {
        qcache_quantize_by_ggml(type, x.data() + (size_t) i * values, theirs.data() + i * bytes);
    }
    return std::memcmp(ours.data(), theirs.data(), ours.size()) == 0;
}

static qcache_quantize_kernel kernel_for(int32_t type) {
    static const auto found = [] {
        struct {
            qcache_quantize_kernel by_type[16] = {};
        } kernels;
        for (const int32_t type : { QCACHE_QUANTIZED_Q8_0, QCACHE_QUANTIZED_Q4_K, QCACHE_QUANTIZED_Q5_K, QCACHE_QUANTIZED_Q6_K }) {
            const qcache_quantize_kernel kernel = qcache_quantize_kernel_by_index(0);
            kernels.by_type[type]               = kernel != nullptr && gives_ggmls_bits(type, kernel) ? kernel : nullptr;
        }
        return kernels;
    }();
    return type >= 0 && type < 16 ? found.by_type[type] : nullptr;
}

enum qcache_status qcache_quantize(int32_t type, const float * values, void * blocks, int64_t n_values, size_t n_bytes) {
    const qcache_quantize_kernel kernel = kernel_for(type);
    if (kernel == nullptr) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "type %d is not quantised here on this CPU and with this ggml", type);
    }
    const int32_t n = qcache_quantize_block_values(type);
    if (values == nullptr || blocks == nullptr || n_values < 0 || n_values % n != 0 || n_bytes != (size_t) (n_values / n * qcache_quantize_block_bytes(type))) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "%lld values to %zu bytes of type %d, which takes %d to %d bytes", (long long) n_values, n_bytes,
                           type, n, qcache_quantize_block_bytes(type));
    }
    kernel(type, values, (uint8_t *) blocks, n_values / n, qcache_quantize_by_ggml);
    return QCACHE_STATUS_SUCCESS;
}
