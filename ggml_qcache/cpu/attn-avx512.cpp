// attn-avx512.cpp: the vector kernel for AVX-512.
// Flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c

#include "qcache.h"
#include "attn-scratch.h"

// GCC 12 warns about the undefined vectors in its own header
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#define QCACHE_ATTN_KERNEL qcache_attn_kernel_avx512
#define QCACHE_ATTN_NAME   "avx512"
#define QV_WIDTH           16
#define QV_NQ              4
#define QV_MR              12
#define QV_NR              2

namespace {

typedef __m512  vf;
typedef __m512i vi;

inline vf   v_zero() { return _mm512_setzero_ps(); }
inline vf   v_set1(float x) { return _mm512_set1_ps(x); }
inline vf   v_load(const float * x) { return _mm512_loadu_ps(x); }
inline void v_store(float * x, vf a) { _mm512_storeu_ps(x, a); }
inline vf   v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf   v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf   v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf   v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf   v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf   v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf   v_zero_lt(vf y, vf x, vf limit) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y); }
inline vi   v_round_i(vf x) { return _mm512_cvtps_epi32(x); }
inline vf   v_from_i(vi n) { return _mm512_cvtepi32_ps(n); }
inline vf   v_pow2(vi n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }

inline float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float v_hmax(vf a) { return _mm512_reduce_max_ps(a); }
inline __m256 fold(vf a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
inline void v_sum4(vf a, vf b, vf c, vf d, float * out) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

inline vf v_load_f16(const uint8_t * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }
inline vf v_load_f16_half(const uint8_t * x) {
    return _mm512_cvtph_ps(_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *) x)));
}
inline vf v_load_i8(const uint8_t * x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) x))); }
inline vf v_load_i4(const uint8_t * x, bool high) {
    const vi bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) x));
    const vi value = high ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(value, _mm512_set1_epi32(8)));
}
inline float s_load_f16(const uint8_t * x) {
    uint16_t h;
    __builtin_memcpy(&h, x, sizeof(h));
    return _cvtsh_ss(h);
}

#include "attn-x86.inl.h"

} // namespace

#include "attn-simd.inl.h"
