// matmul-simd.inl.h: products with packed weights, written once for vectors of QM_WIDTH rows. A kernel file defines the vectors
// and includes it.
//
// A lane is a row of weights: nothing is summed across lanes, and a vector of weights that was unpacked serves all columns of
// a group. Weights are unsigned codes c, w = d c + m, as the instructions want them; the sum of c x is exact in integers within
// a block, the rest is m times the sum of x.
//
// Where there is dpbusd it adds the products of four bytes to a lane. Without, pairs of products are added in 16 bits, as many
// as fit, and then to the lanes.

namespace {

constexpr int ROWS    = QCACHE_MATMUL_ROWS;
constexpr int K       = QCACHE_MATMUL_BLOCK;
constexpr int N_PARTS = ROWS / QM_WIDTH; // vectors of a strip's rows
constexpr int AHEAD   = 4608;            // bytes of weights to prefetch ahead: 2 to 8 KB do alike

inline vi low_half(vi x) {
    return v_and(x, v_set1_i8(15));
}

// shifted left, right where negative, and masked; the shifts are of 16 bits: what crosses bytes is masked
template <int N> vi shifted(vi x, int mask) {
    return v_and(v_shift16<N>(x), v_set1_i8((char) mask));
}

// Vectors of codes of one part's rows; those of the other rows lie between them.
struct plane {
    const uint8_t * at;

    plane(const uint8_t * tile, int offset, int part) : at(tile + offset + 4 * QM_WIDTH * part) {}
    vi operator[](int i) const { return v_load(at + 4 * ROWS * i); }
};

inline void nibbles(plane p, vi (&u)[8]) {
    for (int g = 0; g < 4; g++) {
        const vi both = p[g];
        u[g]          = low_half(both);
        u[4 + g]      = shifted<-4>(both, 15);
    }
}

inline void bits(plane p, vi (&u)[8]) {
    const vi all = p[0];
    u[0]         = v_or(u[0], shifted<4>(all, 16));
    u[1]         = v_or(u[1], shifted<3>(all, 16));
    u[2]         = v_or(u[2], shifted<2>(all, 16));
    u[3]         = v_or(u[3], shifted<1>(all, 16));
    u[4]         = v_or(u[4], shifted<0>(all, 16));
    u[5]         = v_or(u[5], shifted<-1>(all, 16));
    u[6]         = v_or(u[6], shifted<-2>(all, 16));
    u[7]         = v_or(u[7], shifted<-3>(all, 16));
}

inline void pairs(plane p, vi (&u)[8]) {
    for (int v = 0; v < 2; v++) {
        const vi all = p[v];
        vi *     to  = u + 4 * v;
        to[0]        = v_or(to[0], shifted<4>(all, 48));
        to[1]        = v_or(to[1], shifted<2>(all, 48));
        to[2]        = v_or(to[2], shifted<0>(all, 48));
        to[3]        = v_or(to[3], shifted<-2>(all, 48));
    }
}

// f16 [ROWS] at an offset
inline vf halves(const uint8_t * tile, int offset, int part) {
    return v_load_halves(tile + offset + 2 * QM_WIDTH * part);
}

// The tiles: codes of group j of 32 k, with d and m of its first half and of its second, which are the same but for q6_K.
template <int TYPE> struct tile;

template <bool HAS_MIN, bool HAS_BITS, int ZERO> struct legacy_tile {
    static constexpr int  n_groups  = 1;
    static constexpr int  n_bits    = HAS_BITS ? 5 : 4;
    static constexpr int  codes     = ROWS * (HAS_MIN ? 4 : 2);
    static constexpr int  bytes     = codes + ROWS * (HAS_BITS ? 20 : 16);
    static constexpr bool by_halves = false;

    static void read(const uint8_t * t, int, int part, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        d[0] = halves(t, 0, part);
        m[0] = HAS_MIN ? halves(t, 2 * ROWS, part) : v_mul(d[0], v_set1(-ZERO));
        nibbles({ t, codes, part }, u);
        if (HAS_BITS) {
            bits({ t, codes + 16 * ROWS, part }, u);
        }
    }
};
template <> struct tile<QCACHE_MATMUL_Q4_0> : legacy_tile<false, false, 8> {};
template <> struct tile<QCACHE_MATMUL_Q4_1> : legacy_tile<true, false, 0> {};
template <> struct tile<QCACHE_MATMUL_Q5_0> : legacy_tile<false, true, 16> {};
template <> struct tile<QCACHE_MATMUL_Q5_1> : legacy_tile<true, true, 0> {};

template <> struct tile<QCACHE_MATMUL_Q8_0> {
    static constexpr int  n_groups  = 1;
    static constexpr int  n_bits    = 8;
    static constexpr int  bytes     = ROWS * 34;
    static constexpr bool by_halves = false;

    static void read(const uint8_t * t, int, int part, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        d[0] = halves(t, 0, part);
        m[0] = v_mul(d[0], v_set1(-128.0f));
        const plane p(t, 2 * ROWS, part);
        for (int g = 0; g < 8; g++) {
            u[g] = p[g];
        }
    }
};

template <bool HAS_BITS> struct k45_tile {
    static constexpr int  n_groups    = 8;
    static constexpr int  n_bits      = HAS_BITS ? 5 : 4;
    static constexpr int  group_bytes = ROWS * (HAS_BITS ? 20 : 16);
    static constexpr int  bytes       = ROWS * 16 + n_groups * group_bytes;
    static constexpr bool by_halves   = false;

    // 6 bits: the lower four in one half of a byte, the upper two anywhere in another
    static vf six_bits(__m128i low, __m128i high, int j, int shift) {
        low  = _mm_and_si128(_mm_srli_epi16(low, j < 4 ? 0 : 4), _mm_set1_epi8(15));
        high = _mm_slli_epi16(_mm_and_si128(_mm_srli_epi16(high, shift), _mm_set1_epi8(3)), 4);
        return v_from_u8(_mm_or_si128(low, high));
    }

    static void read(const uint8_t * t, int j, int part, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        const uint8_t * s    = t + 4 * ROWS + QM_WIDTH * part;
        const __m128i   high = load_bytes(s + ROWS * (8 + j / 2));
        d[0]                 = v_mul(halves(t, 0, part), six_bits(load_bytes(s + ROWS * (j % 4)), high, j, 2 * (j % 2)));
        m[0]                 = v_mul(halves(t, 2 * ROWS, part), six_bits(load_bytes(s + ROWS * (4 + j % 4)), high, j, 4 + 2 * (j % 2)));
        m[0]                 = v_mul(m[0], v_set1(-1.0f));
        nibbles({ t, 16 * ROWS + group_bytes * j, part }, u);
        if (HAS_BITS) {
            bits({ t, 16 * ROWS + group_bytes * j + 16 * ROWS, part }, u);
        }
    }
};
template <> struct tile<QCACHE_MATMUL_Q4_K> : k45_tile<false> {};
template <> struct tile<QCACHE_MATMUL_Q5_K> : k45_tile<true> {};

template <> struct tile<QCACHE_MATMUL_Q6_K> {
    static constexpr int  n_groups  = 8;
    static constexpr int  n_bits    = 6;
    static constexpr int  bytes     = ROWS * 210;
    static constexpr bool by_halves = true;

    static void read(const uint8_t * t, int j, int part, vi (&u)[8], vf (&d)[2], vf (&m)[2]) {
        const vf        of_block = halves(t, 0, part);
        const uint8_t * s        = t + 2 * ROWS + QM_WIDTH * part;
        for (int half = 0; half < 2; half++) {
            d[half] = v_mul(of_block, v_from_i8(load_bytes(s + ROWS * (2 * j + half))));
            m[half] = v_mul(d[half], v_set1(-32.0f));
        }
        nibbles({ t, ROWS * (18 + 24 * j), part }, u);
        pairs({ t, ROWS * (18 + 24 * j + 16), part }, u);
    }
};

inline vi four(const uint8_t * x) {
    int32_t all;
    __builtin_memcpy(&all, x, sizeof(all));
    return v_set1_i32(all);
}

// Sums of the products of N vectors of codes with N_COLS columns. x: i8 [..][32]
#if QM_HAS_DPBUSD
template <int N_COLS, int N, int N_BITS> inline void dots(const vi * u, const uint8_t * x, vi (&sums)[N_COLS]) {
    constexpr int N_CHAINS = N_COLS < 4 && N == 8 ? 2 : 1; // an addition takes four cycles
    vi            chains[N_CHAINS][N_COLS];
    for (int chain = 0; chain < N_CHAINS; chain++) {
        for (int c = 0; c < N_COLS; c++) {
            chains[chain][c] = v_zero_i();
        }
    }
    for (int g = 0; g < N / N_CHAINS; g++) {
        for (int chain = 0; chain < N_CHAINS; chain++) {
            for (int c = 0; c < N_COLS; c++) {
                const int at     = g + chain * (N / N_CHAINS);
                chains[chain][c] = v_dpbusd(chains[chain][c], u[at], four(x + K * c + 4 * at));
            }
        }
    }
    for (int c = 0; c < N_COLS; c++) {
        sums[c] = N_CHAINS == 2 ? v_add_i32(chains[0][c], chains[N_CHAINS - 1][c]) : chains[0][c];
    }
}
#else
template <int N_COLS, int N, int N_BITS> inline void dots(const vi * u, const uint8_t * x, vi (&sums)[N_COLS]) {
    static_assert(N_BITS <= 6, "two products of bytes don't fit 16 bits");
    constexpr int N_FIT = N_BITS == 4 ? 8 : N_BITS == 5 ? 4 : 2; // 2 * 127 * largest code * this < 2^15
    constexpr int N_NOW = N_FIT < N ? N_FIT : N;
    for (int c = 0; c < N_COLS; c++) {
        sums[c] = v_zero_i();
    }
    for (int first = 0; first < N; first += N_NOW) {
        vi sums16[N_COLS];
        for (int c = 0; c < N_COLS; c++) {
            sums16[c] = v_maddubs(u[first], four(x + K * c + 4 * first));
        }
        for (int g = first + 1; g < first + N_NOW; g++) {
            for (int c = 0; c < N_COLS; c++) {
                sums16[c] = v_add_i16(sums16[c], v_maddubs(u[g], four(x + K * c + 4 * g)));
            }
        }
        for (int c = 0; c < N_COLS; c++) {
            sums[c] = v_add_i32(sums[c], v_madd_ones(sums16[c]));
        }
    }
}
#endif

// Adds d times the sums of products, and m times the sums of x: a few columns at a time, as many as keep the units busy and
// leave their sums in registers. dx, sum: of each column
template <int N_COLS, int N, int N_BITS> inline void add_columns(vf * acc, const vi * u, vf d, vf m, const uint8_t * x, const float * dx, const float * sum) {
    constexpr int N_NOW = N_COLS < 4 ? N_COLS : 4;
    vi            sums[N_NOW];
    dots<N_NOW, N, N_BITS>(u, x, sums);
    for (int c = 0; c < N_NOW; c++) {
        acc[c] = v_fma(v_from_i32(sums[c]), v_mul(d, v_set1(dx[c])), acc[c]);
        acc[c] = v_fma(m, v_set1(sum[c]), acc[c]);
    }
    if constexpr (N_COLS > N_NOW) {
        add_columns<N_COLS - N_NOW, N, N_BITS>(acc + N_NOW, u, d, m, x + K * N_NOW, dx + N_NOW, sum + N_NOW);
    }
}

template <int TYPE, int N_COLS> void strip(const uint8_t * w, const uint8_t * xq, float * dst, int32_t k, int32_t m) {
    typedef tile<TYPE> t;
    vf                 acc[N_PARTS][N_COLS];
    for (int part = 0; part < N_PARTS; part++) {
        for (int c = 0; c < N_COLS; c++) {
            acc[part][c] = v_set1(0.0f);
        }
    }
    for (int32_t b = 0; b < k / (K * t::n_groups); b++, w += t::bytes) {
        for (int j = 0; j < t::n_groups; j++, xq += N_COLS * QCACHE_MATMUL_X_BYTES) {
            constexpr int per_group = t::bytes / t::n_groups;
            for (int line = 0; line < per_group; line += 64) {
                _mm_prefetch((const char *) w + AHEAD + per_group * j + line, _MM_HINT_T0);
            }
            const float * scales = (const float *) (xq + N_COLS * K);
            for (int part = 0; part < N_PARTS; part++) {
                vi u[8];
                vf d[2], min[2];
                t::read(w, j, part, u, d, min);
                if constexpr (t::by_halves) {
                    add_columns<N_COLS, 4, t::n_bits>(acc[part], u, d[0], min[0], xq, scales, scales + 2 * N_COLS);
                    add_columns<N_COLS, 4, t::n_bits>(acc[part], u + 4, d[1], min[1], xq + 16, scales, scales + 3 * N_COLS);
                } else {
                    add_columns<N_COLS, 8, t::n_bits>(acc[part], u, d[0], min[0], xq, scales, scales + N_COLS);
                }
            }
        }
    }
    for (int part = 0; part < N_PARTS; part++) {
        for (int c = 0; c < N_COLS; c++) {
            v_store(dst + (size_t) c * m + QM_WIDTH * part, acc[part][c]);
        }
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
        case QCACHE_MATMUL_Q4_K: return STRIPS<QCACHE_MATMUL_Q4_K>;
        case QCACHE_MATMUL_Q5_K: return STRIPS<QCACHE_MATMUL_Q5_K>;
        case QCACHE_MATMUL_Q6_K: return STRIPS<QCACHE_MATMUL_Q6_K>;
#if QM_HAS_DPBUSD
        case QCACHE_MATMUL_Q8_0: return STRIPS<QCACHE_MATMUL_Q8_0>;
#endif
    }
    return nullptr;
}

bool multiplies(int32_t type) {
    return strips_of(type) != nullptr;
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
        const float   peak = peak_of(in);
        uint8_t *     out  = xq + ((size_t) group * n_blocks + (size_t) b * n_group) * QCACHE_MATMUL_X_BYTES;
        int32_t       sums[2];
        round_block(in, peak > 0.0f ? 127.0f / peak : 0.0f, out + (column - group) * K, sums);

        float *     scales  = (float *) (out + n_group * K) + (column - group);
        const float d       = peak / 127.0f;
        scales[0]           = d;
        scales[n_group]     = d * (float) (sums[0] + sums[1]);
        scales[2 * n_group] = d * (float) sums[0];
        scales[3 * n_group] = d * (float) sums[1];
        if (++b == n_blocks) {
            b = 0;
            column++;
        }
    }
}

} // namespace

const qcache_matmul_kernel * QM_KERNEL() {
    static constexpr qcache_matmul_kernel kernel = { QM_NAME, multiplies, quantize, multiply };
    return &kernel;
}
