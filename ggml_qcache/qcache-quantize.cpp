// qcache-quantize.cpp: quantising rows, to ggml's bits or not at all

#include "qcache-quantize.h"

#include "qcache-impl.h"

#include <ggml.h>

#include <array>
#include <cstring>
#include <initializer_list>

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

bool qcache_quantize_probe(int32_t type, int i, float * values) {
    constexpr int         N       = 16;
    static const uint32_t q4_K[N] = {
        0x78dde6c4, 0x8a8042be, 0x54cda260, 0x41942d86, 0x1d83e922, 0x547fd809, 0x90233efb, 0x1aa381b9,
        0xd3cc477a, 0xb1d0de0f, 0xd65ee48c, 0x09311d81, 0x7a8724d1, 0x0dd8958c, 0xc3256fb2, 0x0cbf3ec5,
    };
    static const uint32_t q5_K[N] = {
        0x64bb12e5, 0x87466396, 0xbf8ba106, 0x93a5b2d7, 0x1a7a01bc, 0x41fa94cf, 0x873ab62e, 0xf890bd7e,
        0x1cd0f9a4, 0xe9e0ee1a, 0x64381b29, 0xecd37ab0, 0xcd6aae57, 0xb404cdbf, 0xa196e555, 0x985a1a6c,
    };
    static const uint32_t q6_K[N] = {
        0x538453d7, 0xd891921a, 0xe162c017, 0xbc092d2a, 0x8bc99147, 0xb9f45231, 0xa0ca16c3, 0x425fb9f6,
        0x9942374f, 0xde8258ae, 0x23c27a0d, 0x51ed3af7, 0xe1e08230, 0xb713eac8, 0x5e1c9276, 0x1f98c41b,
    };
    if (i >= N) {
        return false;
    }
    uint32_t random = type == QCACHE_QUANTIZED_Q4_K ? q4_K[i] : type == QCACHE_QUANTIZED_Q5_K ? q5_K[i] : type == QCACHE_QUANTIZED_Q6_K ? q6_K[i] : i;
    for (int k = 0; k < 256; k++) {
        random    = random * 1664525u + 1013904223u;
        values[k] = ((float) (random >> 8) - (float) (1 << 23)) * 1e-8f;
    }
    return true;
}

// false: a ggml compiled to fuse multiplications and additions, or with another search
static bool gives_ggmls_bits(int32_t type, qcache_quantize_kernel kernel) {
    float   values[256];
    uint8_t ours[8 * 34], theirs[8 * 34]; // as many blocks as 256 values fill, of any type
    for (int i = 0; qcache_quantize_probe(type, i, values); i++) {
        const int n = 256 / qcache_quantize_block_values(type);
        kernel(type, values, ours, n, qcache_quantize_by_ggml);
        ggml_quantize_chunk((ggml_type) type, values, theirs, 0, 1, 256, nullptr);
        if (std::memcmp(ours, theirs, (size_t) n * qcache_quantize_block_bytes(type)) != 0) {
            return false;
        }
    }
    return true;
}

static qcache_quantize_kernel kernel_for(int32_t type) {
    static const auto found = [] {
        std::array<qcache_quantize_kernel, 16> kernels = {};
        for (const int32_t type : { QCACHE_QUANTIZED_Q8_0, QCACHE_QUANTIZED_Q4_K, QCACHE_QUANTIZED_Q5_K, QCACHE_QUANTIZED_Q6_K }) {
            qcache_quantize_kernel kernel;
            for (int i = 0; (kernel = qcache_quantize_kernel_by_index(i)) != nullptr && !gives_ggmls_bits(type, kernel); i++) {
            }
            kernels[type] = kernel;
        }
        return kernels;
    }();
    return type >= 0 && type < (int32_t) found.size() ? found[type] : nullptr;
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
