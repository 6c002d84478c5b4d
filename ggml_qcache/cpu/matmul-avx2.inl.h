// matmul-avx2.inl.h: 256-bit vectors for matmul-simd.inl.h, with or without AVX-VNNI

#include "matmul-kernels.h"

#include <immintrin.h>

#define QM_WIDTH 8

namespace {

typedef __m256  vf;
typedef __m256i vi;

inline vf   v_set1(float x) { return _mm256_set1_ps(x); }
inline vf   v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf   v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline void v_store(float * x, vf a) { _mm256_storeu_ps(x, a); }
inline vi   v_load(const uint8_t * x) { return _mm256_loadu_si256((const __m256i *) x); }
inline vi   v_zero_i() { return _mm256_setzero_si256(); }
inline vi   v_set1_i8(char x) { return _mm256_set1_epi8(x); }
inline vi   v_set1_i32(int32_t x) { return _mm256_set1_epi32(x); }
inline vi   v_and(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi   v_or(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi   v_add_i32(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vf   v_from_i32(vi x) { return _mm256_cvtepi32_ps(x); }
inline vf   v_from_u8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)); }
inline vf   v_from_i8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
inline vf   v_load_halves(const uint8_t * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }

#if QM_HAS_DPBUSD
inline vi v_dpbusd(vi acc, vi u, vi x) { return _mm256_dpbusd_avx_epi32(acc, u, x); }
#else
inline vi v_maddubs(vi u, vi x) { return _mm256_maddubs_epi16(u, x); }
inline vi v_madd_ones(vi x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
inline vi v_add_i16(vi a, vi b) { return _mm256_add_epi16(a, b); }
#endif

inline __m128i load_bytes(const uint8_t * x) { return _mm_loadl_epi64((const __m128i *) x); }

template <int N> vi v_shift16(vi x) { return N > 0 ? _mm256_slli_epi16(x, N > 0 ? N : 0) : _mm256_srli_epi16(x, N > 0 ? 0 : -N); }

// largest absolute value, NaN where there is one
inline float peak_of(const float * x) {
    const vf sign = _mm256_set1_ps(-0.0f);
    vf       peak = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
    for (int i = 0; i < 32; i += 8) {
        const vf v = _mm256_loadu_ps(x + i);
        unordered  = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        peak       = _mm256_max_ps(peak, _mm256_andnot_ps(sign, v));
    }
    if (_mm256_movemask_ps(unordered) != 0) {
        return __builtin_nanf("");
    }
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(peak), _mm256_extractf128_ps(peak, 1));
    most        = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// x times a factor, rounded to bytes, and the sums of either half
inline void round_block(const float * x, float to, uint8_t * codes, int32_t (&sums)[2]) {
    for (int half = 0; half < 2; half++) {
        const vi      a   = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * half), _mm256_set1_ps(to)));
        const vi      b   = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * half + 8), _mm256_set1_ps(to)));
        const __m128i a16 = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        const __m128i b16 = _mm_packs_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
        _mm_storeu_si128((__m128i *) (codes + 16 * half), _mm_packs_epi16(a16, b16));
        const __m128i pairs = _mm_madd_epi16(_mm_add_epi16(a16, b16), _mm_set1_epi16(1));
        const __m128i both  = _mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0x4e));
        sums[half]          = _mm_cvtsi128_si32(_mm_add_epi32(both, _mm_shuffle_epi32(both, 0xb1)));
    }
}

} // namespace

#include "matmul-simd.inl.h"
