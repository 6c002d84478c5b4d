// matmul-avx512.cpp: products with packed weights by AVX512_VNNI.
// Flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c

#include "matmul-kernels.h"

// GCC 12 warns about the undefined vectors in its own header
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#define QM_KERNEL     qcache_matmul_kernel_avx512
#define QM_NAME       "avx512vnni"
#define QM_WIDTH      16
#define QM_HAS_DPBUSD 1

namespace {

typedef __m512  vf;
typedef __m512i vi;

inline vf   v_set1(float x) { return _mm512_set1_ps(x); }
inline vf   v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf   v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline void v_store(float * x, vf a) { _mm512_storeu_ps(x, a); }
inline vi   v_load(const uint8_t * x) { return _mm512_loadu_si512(x); }
inline vi   v_zero_i() { return _mm512_setzero_si512(); }
inline vi   v_set1_i8(char x) { return _mm512_set1_epi8(x); }
inline vi   v_set1_i32(int32_t x) { return _mm512_set1_epi32(x); }
inline vi   v_and(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi   v_or(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi   v_add_i32(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi   v_dpbusd(vi acc, vi u, vi x) { return _mm512_dpbusd_epi32(acc, u, x); }
inline vf   v_from_i32(vi x) { return _mm512_cvtepi32_ps(x); }
inline vf   v_from_u8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)); }
inline vf   v_from_i8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
inline vf   v_load_halves(const uint8_t * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }

inline __m128i load_bytes(const uint8_t * x) { return _mm_loadu_si128((const __m128i *) x); }

template <int N> vi v_shift16(vi x) { return N > 0 ? _mm512_slli_epi16(x, N > 0 ? N : 0) : _mm512_srli_epi16(x, N > 0 ? 0 : -N); }

// largest absolute value, NaN where there is one
inline float peak_of(const float * x) {
    const vf low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    if (_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) != 0) {
        return __builtin_nanf("");
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
}

// x times a factor, rounded to bytes, and the sums of either half
inline void round_block(const float * x, float to, uint8_t * codes, int32_t (&sums)[2]) {
    for (int half = 0; half < 2; half++) {
        const vi q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * half), _mm512_set1_ps(to)));
        _mm_storeu_si128((__m128i *) (codes + 16 * half), _mm512_cvtepi32_epi8(q));
        sums[half] = _mm512_reduce_add_epi32(q);
    }
}

} // namespace

#include "matmul-simd.inl.h"
