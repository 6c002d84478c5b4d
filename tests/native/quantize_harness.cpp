// quantize_harness.cpp: quantising (qcache-quantize.h) for tests/test_quantize.py: by the kernels of this CPU, the fastest first, and
// by that of AVX-512 over plain arrays, so that its width is tested on every CPU

#include "qcache-quantize.h"

#include <ggml.h>

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

#ifdef _WIN32
#    define HARNESS_API extern "C" __declspec(dllexport)
#else
#    define HARNESS_API extern "C" __attribute__((visibility("default")))
#endif

static int64_t n_left_to_ggml;

static void by_ggml(int32_t type, const float * src, uint8_t * dst) {
    n_left_to_ggml++;
    qcache_quantize_by_ggml(type, src, dst);
}

// 1: there is no such kernel. n_other receives the number of superblocks that it left to ggml
HARNESS_API int32_t harness_quantize(int32_t i_kernel, int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, int64_t * n_other) {
    int n = 0;
    while (qcache_quantize_kernel_by_index(n) != nullptr) {
        n++;
    }
    if (i_kernel > n) {
        return 1;
    }
    n_left_to_ggml = 0;
    const auto kernel = i_kernel < n ? qcache_quantize_kernel_by_index(i_kernel) : quantize_emulated_16;
    kernel(type, src, dst, n_blocks, by_ggml);
    *n_other = n_left_to_ggml;
    return 0;
}
