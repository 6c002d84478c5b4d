// matmul-avx512.cpp: products with packed weights by AVX512_VNNI.
// Flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c
//
// A lane is a row of weights: nothing is summed across lanes, and a vector of weights that was unpacked serves all columns of
// a group. Weights are unsigned codes c, w = d c + m, as dpbusd wants them; the sum of d c x is exact in integers within a
// block, the rest is m times the sum of x.

#include "matmul-kernels.h"

// GCC 12 warns about the undefined vectors in its own header
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

namespace {

constexpr int ROWS  = QCACHE_MATMUL_ROWS;
constexpr int K     = QCACHE_MATMUL_BLOCK;
constexpr int AHEAD = 4608; // bytes of weights to prefetch ahead: 2 to 8 KB do alike

typedef __m512  vf;
typedef __m512i vi;

inline vf load_halves(const uint8_t * x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x));
}

inline vi load(const uint8_t * x) {
    return _mm512_loadu_si512(x);
}

inline vi low_half(vi x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(15));
}

// 16-bit shifts will do: what crosses bytes is masked
template <int N> vi shifted(vi x, int mask) {
    return _mm512_and_si512(N > 0 ? _mm512_slli_epi16(x, N > 0 ? N : 0) : _mm512_srli_epi16(x, N > 0 ? 0 : -N), _mm512_set1_epi8((char) mask));
}

inline void nibbles(const uint8_t * x, vi (&u)[8]) {
    for (int g = 0; g < 4; g++) {
        const vi both = load(x + 64 * g);
        u[g]          = low_half(both);
        u[4 + g]      = shifted<-4>(both, 15);
    }
}

inline void bits(const uint8_t * x, vi (&u)[8]) {
    const vi all = load(x);
    u[0]         = _mm512_or_si512(u[0], shifted<4>(all, 16));
    u[1]         = _mm512_or_si512(u[1], shifted<3>(all, 16));
    u[2]         = _mm512_or_si512(u[2], shifted<2>(all, 16));
    u[3]         = _mm512_or_si512(u[3], shifted<1>(all, 16));
    u[4]         = _mm512_or_si512(u[4], shifted<0>(all, 16));
    u[5]         = _mm512_or_si512(u[5], shifted<-1>(all, 16));
    u[6]         = _mm512_or_si512(u[6], shifted<-2>(all, 16));
    u[7]         = _mm512_or_si512(u[7], shifted<-3>(all, 16));
}

inline void pairs(const uint8_t * x, vi (&u)[8]) {
    for (int v = 0; v < 2; v++) {
        const vi all = load(x + 64 * v);
        vi *     to  = u + 4 * v;
        to[0]        = _mm512_or_si512(to[0], shifted<4>(all, 48));
        to[1]        = _mm512_or_si512(to[1], shifted<2>(all, 48));
        to[2]        = _mm512_or_si512(to[2], shifted<0>(all, 48));
        to[3]        = _mm512_or_si512(to[3], shifted<-2>(all, 48));
    }
}

// The tiles: codes of group j of 32 k, with d and m of its first half and of its second, which are the same but for q6_K.
template <int TYPE> struct tile;

template <bool HAS_MIN, bool HAS_BITS, int ZERO> struct legacy_tile {
    static constexpr int  n_groups = 1;
    static constexpr int  bytes    = ROWS * (2 + (HAS_MIN ? 2 : 0) + 16 + (HAS_BITS ? 4 : 0));
    static constexpr bool halves   = false;

    static void read(const uint8_t * t, int, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        d[0] = load_halves(t);
        m[0] = HAS_MIN ? load_halves(t + 2 * ROWS) : _mm512_mul_ps(d[0], _mm512_set1_ps(-ZERO));
        t += HAS_MIN ? 4 * ROWS : 2 * ROWS;
        nibbles(t, u);
        if (HAS_BITS) {
            bits(t + 256, u);
        }
    }
};
template <> struct tile<QCACHE_MATMUL_Q4_0> : legacy_tile<false, false, 8> {};
template <> struct tile<QCACHE_MATMUL_Q4_1> : legacy_tile<true, false, 0> {};
template <> struct tile<QCACHE_MATMUL_Q5_0> : legacy_tile<false, true, 16> {};
template <> struct tile<QCACHE_MATMUL_Q5_1> : legacy_tile<true, true, 0> {};

template <> struct tile<QCACHE_MATMUL_Q8_0> {
    static constexpr int  n_groups = 1;
    static constexpr int  bytes    = ROWS * 34;
    static constexpr bool halves   = false;

    static void read(const uint8_t * t, int, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        d[0] = load_halves(t);
        m[0] = _mm512_mul_ps(d[0], _mm512_set1_ps(-128.0f));
        for (int g = 0; g < 8; g++) {
            u[g] = load(t + 2 * ROWS + 64 * g);
        }
    }
};

template <bool HAS_BITS> struct k45_tile {
    static constexpr int  n_groups    = 8;
    static constexpr int  group_bytes = 256 + (HAS_BITS ? 64 : 0);
    static constexpr int  bytes       = ROWS * 16 + n_groups * group_bytes;
    static constexpr bool halves      = false;

    static vf six_bits(__m128i low, __m128i high, int j, int shift) {
        low  = _mm_and_si128(_mm_srli_epi16(low, j < 4 ? 0 : 4), _mm_set1_epi8(15));
        high = _mm_slli_epi16(_mm_and_si128(_mm_srli_epi16(high, shift), _mm_set1_epi8(3)), 4);
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(low, high)));
    }

    static void read(const uint8_t * t, int j, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        const uint8_t * s       = t + 4 * ROWS;
        const __m128i   high    = _mm_loadu_si128((const __m128i *) (s + ROWS * (8 + j / 2)));
        const __m128i   of_d    = _mm_loadu_si128((const __m128i *) (s + ROWS * (j % 4)));
        const __m128i   of_dmin = _mm_loadu_si128((const __m128i *) (s + ROWS * (4 + j % 4)));
        d[0]                    = _mm512_mul_ps(load_halves(t), six_bits(of_d, high, j, 2 * (j % 2)));
        m[0] = _mm512_fnmadd_ps(load_halves(t + 2 * ROWS), six_bits(of_dmin, high, j, 4 + 2 * (j % 2)), _mm512_setzero_ps());
        nibbles(t + 16 * ROWS + group_bytes * j, u);
        if (HAS_BITS) {
            bits(t + 16 * ROWS + group_bytes * j + 256, u);
        }
    }
};
template <> struct tile<QCACHE_MATMUL_Q4_K> : k45_tile<false> {};
template <> struct tile<QCACHE_MATMUL_Q5_K> : k45_tile<true> {};

template <> struct tile<QCACHE_MATMUL_Q6_K> {
    static constexpr int  n_groups = 8;
    static constexpr int  bytes    = ROWS * 210;
    static constexpr bool halves   = true;

    static void read(const uint8_t * t, int j, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        const vf of_block = load_halves(t);
        for (int half = 0; half < 2; half++) {
            const __m128i scale = _mm_loadu_si128((const __m128i *) (t + 2 * ROWS + ROWS * (2 * j + half)));
            d[half]             = _mm512_mul_ps(of_block, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scale)));
            m[half]             = _mm512_mul_ps(d[half], _mm512_set1_ps(-32.0f));
        }
        nibbles(t + 18 * ROWS + 384 * j, u);
        pairs(t + 18 * ROWS + 384 * j + 256, u);
    }
};

inline vi four(const uint8_t * x) {
    int32_t all;
    __builtin_memcpy(&all, x, sizeof(all));
    return _mm512_set1_epi32(all);
}

// Adds the products of N vectors of codes to N_COLS columns. x: i8 [..][32]; d, sum: of each column.
template <int N_COLS, int N> inline void add_columns(vf * acc, const vi * u, vf d, vf m, const uint8_t * x, const float * dx, const float * sum) {
    constexpr int N_CHAINS = N_COLS < 4 && N == 8 ? 2 : 1; // dpbusd takes four cycles
    vi            dot[N_CHAINS][N_COLS];
    for (int chain = 0; chain < N_CHAINS; chain++) {
        for (int c = 0; c < N_COLS; c++) {
            dot[chain][c] = _mm512_setzero_si512();
        }
    }
    for (int g = 0; g < N / N_CHAINS; g++) {
        for (int chain = 0; chain < N_CHAINS; chain++) {
            for (int c = 0; c < N_COLS; c++) {
                const int at  = g + chain * (N / N_CHAINS);
                dot[chain][c] = _mm512_dpbusd_epi32(dot[chain][c], u[at], four(x + K * c + 4 * at));
            }
        }
    }
    for (int c = 0; c < N_COLS; c++) {
        const vi all = N_CHAINS == 2 ? _mm512_add_epi32(dot[0][c], dot[N_CHAINS - 1][c]) : dot[0][c];
        acc[c]       = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_mul_ps(d, _mm512_set1_ps(dx[c])), acc[c]);
        acc[c]       = _mm512_fmadd_ps(m, _mm512_set1_ps(sum[c]), acc[c]);
    }
}

// Four columns at a time: as many chains of dpbusd as it takes, and few enough of the 32 registers.
template <int N_COLS, int N> inline void add_all(vf * acc, const vi * u, vf d, vf m, const uint8_t * x, const float * dx, const float * sum) {
    constexpr int N_NOW = N_COLS < 4 ? N_COLS : 4;
    add_columns<N_NOW, N>(acc, u, d, m, x, dx, sum);
    if constexpr (N_COLS > N_NOW) {
        add_all<N_COLS - N_NOW, N>(acc + N_NOW, u, d, m, x + K * N_NOW, dx + N_NOW, sum + N_NOW);
    }
}

template <int TYPE, int N_COLS> void strip(const uint8_t * w, const uint8_t * xq, float * dst, int32_t k, int32_t m) {
    typedef tile<TYPE> t;
    vf                 acc[N_COLS];
    for (int c = 0; c < N_COLS; c++) {
        acc[c] = _mm512_setzero_ps();
    }
    for (int32_t b = 0; b < k / (K * t::n_groups); b++, w += t::bytes) {
        for (int j = 0; j < t::n_groups; j++, xq += N_COLS * QCACHE_MATMUL_X_BYTES) {
            constexpr int per_group = t::bytes / t::n_groups;
            for (int line = 0; line < per_group; line += 64) {
                _mm_prefetch((const char *) w + AHEAD + per_group * j + line, _MM_HINT_T0);
            }
            vi u[8];
            vf d[2], min[2];
            t::read(w, j, u, d, min);
            const float * scales = (const float *) (xq + N_COLS * K);
            if constexpr (t::halves) {
                add_all<N_COLS, 4>(acc, u, d[0], min[0], xq, scales, scales + 2 * N_COLS);
                add_all<N_COLS, 4>(acc, u + 4, d[1], min[1], xq + 16, scales, scales + 3 * N_COLS);
            } else {
                add_all<N_COLS, 8>(acc, u, d[0], min[0], xq, scales, scales + N_COLS);
            }
        }
    }
    for (int c = 0; c < N_COLS; c++) {
        _mm512_storeu_ps(dst + (size_t) c * m, acc[c]);
    }
}

typedef void (*strip_fn)(const uint8_t * w, const uint8_t * xq, float * dst, int32_t k, int32_t m);

// by number of columns
template <int TYPE> constexpr strip_fn STRIPS[17] = {
    nullptr, strip<TYPE, 1>, strip<TYPE, 2>, strip<TYPE, 3>, strip<TYPE, 4>, strip<TYPE, 5>, strip<TYPE, 6>, strip<TYPE, 7>, strip<TYPE, 8>,
    nullptr, nullptr,        nullptr,        nullptr,        nullptr,        nullptr,        nullptr,        strip<TYPE, 16>,
};

const strip_fn * strips_of(int32_t type) {
    switch (type) {
        case QCACHE_MATMUL_Q4_0: return STRIPS<QCACHE_MATMUL_Q4_0>;
        case QCACHE_MATMUL_Q4_1: return STRIPS<QCACHE_MATMUL_Q4_1>;
        case QCACHE_MATMUL_Q5_0: return STRIPS<QCACHE_MATMUL_Q5_0>;
        case QCACHE_MATMUL_Q5_1: return STRIPS<QCACHE_MATMUL_Q5_1>;
        case QCACHE_MATMUL_Q8_0: return STRIPS<QCACHE_MATMUL_Q8_0>;
        case QCACHE_MATMUL_Q4_K: return STRIPS<QCACHE_MATMUL_Q4_K>;
        case QCACHE_MATMUL_Q5_K: return STRIPS<QCACHE_MATMUL_Q5_K>;
        case QCACHE_MATMUL_Q6_K: return STRIPS<QCACHE_MATMUL_Q6_K>;
    }
    return nullptr;
}

void multiply(int32_t type, const uint8_t * w, const uint8_t * xq, float * dst, int32_t k, int32_t m, int32_t n, int32_t first, int32_t end) {
    const strip_fn * strips       = strips_of(type);
    const size_t     strip_bytes  = ROWS * qcache_matmul_row_bytes(type, k);
    const size_t     column_bytes = (size_t) k / K * QCACHE_MATMUL_X_BYTES;
    for (int32_t s = first; s < end; s++) {
        // a strip stays in the cache for all columns
        for (int32_t c = 0, n_now; c < n; c += n_now) {
            n_now = qcache_matmul_n_columns(n - c);
            strips[n_now](w + s * strip_bytes, xq + c * column_bytes, dst + (size_t) c * m + s * ROWS, k, m);
        }
    }
}

void quantize(const float * x, size_t stride, int32_t k, int32_t n, int64_t first, int64_t end, uint8_t * xq) {
    const int32_t n_blocks = k / K;
    int32_t       b        = (int32_t) (first % n_blocks);
    int32_t       column   = (int32_t) (first / n_blocks);
    int32_t       group    = 0; // its first column
    int32_t       n_group  = qcache_matmul_n_columns(n);
    for (int64_t i = first; i < end; i++) {
        while (column >= group + n_group) {
            group += n_group;
            n_group = qcache_matmul_n_columns(n - group);
        }
        const float * in   = x + column * stride + b * K;
        const vf      low  = _mm512_loadu_ps(in);
        const vf      high = _mm512_loadu_ps(in + 16);
        const float   peak = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        const float   d    = peak / 127.0f;
        const vf      to   = _mm512_set1_ps(peak > 0.0f ? 127.0f / peak : 0.0f);
        const vi      q0   = _mm512_cvtps_epi32(_mm512_mul_ps(low, to));
        const vi      q1   = _mm512_cvtps_epi32(_mm512_mul_ps(high, to));

        uint8_t * out    = xq + ((size_t) group * n_blocks + (size_t) b * n_group) * QCACHE_MATMUL_X_BYTES;
        uint8_t * codes  = out + (column - group) * K;
        float *   scales = (float *) (out + n_group * K) + (column - group);
        _mm_storeu_si128((__m128i *) codes, _mm512_cvtepi32_epi8(q0));
        _mm_storeu_si128((__m128i *) (codes + 16), _mm512_cvtepi32_epi8(q1));
        const float sum0    = d * (float) _mm512_reduce_add_epi32(q0);
        const float sum1    = d * (float) _mm512_reduce_add_epi32(q1);
        scales[0]           = d;
        scales[n_group]     = sum0 + sum1;
        scales[2 * n_group] = sum0;
        scales[3 * n_group] = sum1;
        if (++b == n_blocks) {
            b = 0;
            column++;
        }
    }
}

} // namespace

const qcache_matmul_kernel * qcache_matmul_kernel_avx512() {
    static constexpr qcache_matmul_kernel kernel = { "avx512vnni", quantize, multiply };
    return &kernel;
}
