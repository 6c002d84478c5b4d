// attn-avx2.cpp: the vector kernel for AVX2. Flags: -mavx2 -mfma -mf16c

#include "qcache.h"
#include "attn-scratch.h"

#include <immintrin.h>

#define QCACHE_ATTN_KERNEL qcache_attn_kernel_avx2
#define QCACHE_ATTN_NAME   "avx2"
#define QV_WIDTH           8
#define QV_NQ              2
#define QV_MR              6
#define QV_NR              2

namespace {

typedef __m256  vf;
typedef __m256i vi;

inline vf   v_zero() { return _mm256_setzero_ps(); }
inline vf   v_set1(float x) { return _mm256_set1_ps(x); }
inline vf   v_load(const float * x) { return _mm256_loadu_ps(x); }
inline void v_store(float * x, vf a) { _mm256_storeu_ps(x, a); }
inline vf   v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf   v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf   v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf   v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf   v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf   v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf   v_zero_lt(vf y, vf x, vf limit) { return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), y); }
inline vi   v_round_i(vf x) { return _mm256_cvtps_epi32(x); }
inline vf   v_from_i(vi n) { return _mm256_cvtepi32_ps(n); }
inline vf   v_pow2(vi n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }

inline float v_sum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x        = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float v_hmax(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x        = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline void v_sum4(vf a, vf b, vf c, vf d, float * out) {
    const vf x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

inline vf v_load_f16(const uint8_t * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }
inline vf v_load_f16_half(const uint8_t * x) { return v_load_f16(x); }
inline vf v_load_i8(const uint8_t * x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) x))); }
inline vf v_load_i4(const uint8_t * x, bool high) {
    const vi bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) x));
    const vi value = high ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(value, _mm256_set1_epi32(8)));
}
inline float s_load_f16(const uint8_t * x) {
    uint16_t h;
    __builtin_memcpy(&h, x, sizeof(h));
    return _cvtsh_ss(h);
}

#include "attn-x86.inl.h"

} // namespace

#include "attn-simd.inl.h"
