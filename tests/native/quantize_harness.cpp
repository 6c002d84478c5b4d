// quantize_harness.cpp: quantising (qcache-quantize.h) for tests/test_quantize.py: by the kernels of this CPU, the fastest first, and
// by that of AVX-512 over plain arrays, so that its width is tested on every x86-64. Flags: -ffp-contract=off

#include "harness_api.h"
#include "qcache-quantize.h"

#include <ggml.h>

#include <cstring>

#define QCACHE_QUANTIZE_KERNEL quantize_emulated_16
#define QV_WIDTH               16

namespace {

struct vf {
    float x[QV_WIDTH];
};
struct vm {
    bool x[QV_WIDTH];
};

template <class T, class F> inline T each(const F & f) {
    T y;
    for (int i = 0; i < QV_WIDTH; i++) {
        y.x[i] = f(i);
    }
    return y;
}

inline vf   operator+(vf a, vf b) { return each<vf>([&](int i) { return a.x[i] + b.x[i]; }); }
inline vf   operator-(vf a, vf b) { return each<vf>([&](int i) { return a.x[i] - b.x[i]; }); }
inline vf   operator*(vf a, vf b) { return each<vf>([&](int i) { return a.x[i] * b.x[i]; }); }
inline vf   operator/(vf a, vf b) { return each<vf>([&](int i) { return a.x[i] / b.x[i]; }); }
inline vf   v_set1(float x) { return each<vf>([&](int) { return x; }); }
inline vf   v_load(const float * x) { return each<vf>([&](int i) { return x[i]; }); }
inline void v_store(float * x, vf a) { __builtin_memcpy(x, a.x, sizeof(a.x)); }
inline vf   v_min(vf a, vf b) { return each<vf>([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; }); }
inline vf   v_max(vf a, vf b) { return each<vf>([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
inline vf   v_abs(vf a) { return each<vf>([&](int i) { return __builtin_fabsf(a.x[i]); }); }
inline vf   v_sqrt(vf a) { return each<vf>([&](int i) { return __builtin_sqrtf(a.x[i]); }); }
inline vf   v_round(vf a) { return each<vf>([&](int i) { return __builtin_rintf(a.x[i]); }); }
inline vf   v_trunc(vf a) { return each<vf>([&](int i) { return __builtin_truncf(a.x[i]); }); }
inline vm   v_lt(vf a, vf b) { return each<vm>([&](int i) { return a.x[i] < b.x[i]; }); }
inline vm   v_and(vm a, vm b) { return each<vm>([&](int i) { return a.x[i] && b.x[i]; }); }
inline vf   v_select(vm m, vf a, vf b) { return each<vf>([&](int i) { return m.x[i] ? a.x[i] : b.x[i]; }); }
inline void v_store_i32(int32_t * x, vf a) {
    for (int i = 0; i < QV_WIDTH; i++) {
        x[i] = (int32_t) a.x[i];
    }
}

inline uint16_t f16_of(float x) { return ggml_fp32_to_fp16(x); }
inline float    f32_of(uint16_t h) { return ggml_fp16_to_fp32(h); }

} // namespace

#include "cpu/quantize-simd.inl.h"

static int64_t n_left_to_ggml;

static void by_ggml(int32_t type, const float * src, uint8_t * dst) {
    n_left_to_ggml++;
    qcache_quantize_by_ggml(type, src, dst);
}

// 1: there is no such kernel, on other CPUs none at all: their ggml fuses. n_other receives the number of superblocks that it left to ggml
HARNESS_API int32_t harness_quantize(int32_t i_kernel, int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, int64_t * n_other) {
    int n = 0;
    while (qcache_quantize_kernel_by_index(n) != nullptr) {
        n++;
    }
#if defined(__x86_64__)
    const int n_emulated = 1;
#else
    const int n_emulated = 0;
#endif
    if (i_kernel >= n + n_emulated) {
        return 1;
    }
    n_left_to_ggml = 0;
    const auto kernel = i_kernel < n ? qcache_quantize_kernel_by_index(i_kernel) : quantize_emulated_16;
    kernel(type, src, dst, n_blocks, by_ggml);
    *n_other = n_left_to_ggml;
    return 0;
}

#if defined(__x86_64__)
void quantize_fused(int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, qcache_quantize_superblock other);

// whether fused operations change the bits of these 256 values: how the probes were found, seed by seed
HARNESS_API int32_t harness_quantize_tells(int32_t type, const float * values) {
    uint8_t plain[256], fused[256];
    std::memset(plain, 0, sizeof(plain));
    std::memset(fused, 0, sizeof(fused));
    qcache_quantize_avx2(type, values, plain, 1, qcache_quantize_by_ggml);
    quantize_fused(type, values, fused, 1, qcache_quantize_by_ggml);
    return std::memcmp(plain, fused, sizeof(plain)) != 0;
}

// of the i-th probe; -1 after the last
HARNESS_API int32_t harness_quantize_probe_tells(int32_t type, int32_t i) {
    float values[256];
    return qcache_quantize_probe(type, i, values) ? harness_quantize_tells(type, values) : -1;
}
#endif
