// quantize-avx2.cpp: quantising by AVX2. Flags: -mavx2 -mf16c -ffp-contract=off

#include "../qcache-quantize.h"

#include <immintrin.h>

#define QCACHE_QUANTIZE_KERNEL qcache_quantize_avx2
#define QV_WIDTH               8

namespace {

typedef __m256 vf;
typedef __m256 vm;

inline vf   v_set1(float x) { return _mm256_set1_ps(x); }
inline vf   v_load(const float * x) { return _mm256_loadu_ps(x); }
inline void v_store(float * x, vf a) { _mm256_storeu_ps(x, a); }
inline vf   v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf   v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf   v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline vf   v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
inline vf   v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf   v_trunc(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
inline vm   v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline vm   v_and(vm a, vm b) { return _mm256_and_ps(a, b); }
inline vf   v_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
inline void v_store_i32(int32_t * x, vf a) { _mm256_storeu_si256((__m256i *) x, _mm256_cvtps_epi32(a)); }

inline uint16_t f16_of(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline float    f32_of(uint16_t h) { return _cvtsh_ss(h); }

} // namespace

#include "quantize-simd.inl.h"
