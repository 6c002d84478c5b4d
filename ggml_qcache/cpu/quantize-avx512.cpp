// quantize-avx512.cpp: quantising by AVX-512. Flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mf16c -ffp-contract=off

#include "../qcache-quantize.h"

// GCC 12 warns about the undefined vectors in its own header
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#define QCACHE_QUANTIZE_KERNEL qcache_quantize_avx512
#define QV_WIDTH               16

namespace {

typedef __m512    vf;
typedef __mmask16 vm;

inline vf   v_set1(float x) { return _mm512_set1_ps(x); }
inline vf   v_load(const float * x) { return _mm512_loadu_ps(x); }
inline void v_store(float * x, vf a) { _mm512_storeu_ps(x, a); }
inline vf   v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf   v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf   v_abs(vf a) { return _mm512_abs_ps(a); }
inline vf   v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
inline vf   v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf   v_trunc(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
inline vm   v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline vm   v_and(vm a, vm b) { return (vm) (a & b); }
inline vf   v_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
inline void v_store_i32(int32_t * x, vf a) { _mm512_storeu_si512(x, _mm512_cvtps_epi32(a)); }

inline uint16_t f16_of(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline float    f32_of(uint16_t h) { return _cvtsh_ss(h); }

} // namespace

#include "quantize-simd.inl.h"
