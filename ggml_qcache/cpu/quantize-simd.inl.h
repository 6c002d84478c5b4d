// quantize-simd.inl.h: quantising to ggml's q8_0 and K-quants, the vector kernel. Included by one file per instruction set, which
// defines first:
//
//   vf, QV_WIDTH                    a vector of floats with + - * / and how many it holds (8 or 16)
//   vm                              a mask for it
//   v_set1 v_load v_store v_min v_max v_abs v_sqrt
//   v_round v_trunc                 to the nearest integer, ties to even; towards zero
//   v_lt(a, b)                      a < b; a NaN is not
//   v_and(m, n)
//   v_select(m, a, b)               a where m, else b
//   v_store_i32                     as integers; the values are integers
//   f16_of(x) f32_of(h)             one value, ties to even
//   QCACHE_QUANTIZE_KERNEL          the function to define
//
// The bits are those of ggml's functions without an importance matrix, because each lane does what those do for a block of 16 or 32
// values, in their order: blocks lie side by side in a vector. So nothing may be contracted to fused operations here
// (-ffp-contract=off), as nothing is in an x86-64 ggml-base.
//
// K-quants: per block of 32 or 16 values, a search over 16 to 21 scales for the least weighted error, each with the best scale (and
// minimum) for the integers it gives. Then the scales of a superblock of 256 are rounded to 6 bits (q6_K: 8) of a common one, and the
// values once more with those.

namespace {

constexpr int SUPERBLOCK = 256;
constexpr int LANES      = 2 * QV_WIDTH;

// Two vectors: a sum waits for the one before it, so two at once take hardly longer than one (q4_K by AVX2: 1.2x faster).
struct wide {
    vf v[2];
};
struct wide_mask {
    vm v[2];
};

inline wide operator+(wide a, wide b) { return { { a.v[0] + b.v[0], a.v[1] + b.v[1] } }; }
inline wide operator-(wide a, wide b) { return { { a.v[0] - b.v[0], a.v[1] - b.v[1] } }; }
inline wide operator*(wide a, wide b) { return { { a.v[0] * b.v[0], a.v[1] * b.v[1] } }; }
inline wide operator/(wide a, wide b) { return { { a.v[0] / b.v[0], a.v[1] / b.v[1] } }; }
inline wide w_set1(float x) { return { { v_set1(x), v_set1(x) } }; }
inline wide w_load(const float * x) { return { { v_load(x), v_load(x + QV_WIDTH) } }; }
inline void w_store(float * x, wide a) {
    v_store(x, a.v[0]);
    v_store(x + QV_WIDTH, a.v[1]);
}
inline wide v_min(wide a, wide b) { return { { v_min(a.v[0], b.v[0]), v_min(a.v[1], b.v[1]) } }; }
inline wide v_max(wide a, wide b) { return { { v_max(a.v[0], b.v[0]), v_max(a.v[1], b.v[1]) } }; }
inline wide v_abs(wide a) { return { { v_abs(a.v[0]), v_abs(a.v[1]) } }; }
inline wide v_sqrt(wide a) { return { { v_sqrt(a.v[0]), v_sqrt(a.v[1]) } }; }
inline wide v_round(wide a) { return { { v_round(a.v[0]), v_round(a.v[1]) } }; }
inline wide_mask v_lt(wide a, wide b) { return { { v_lt(a.v[0], b.v[0]), v_lt(a.v[1], b.v[1]) } }; }
inline wide_mask v_and(wide_mask a, wide_mask b) { return { { v_and(a.v[0], b.v[0]), v_and(a.v[1], b.v[1]) } }; }
inline wide v_select(wide_mask m, wide a, wide b) { return { { v_select(m.v[0], a.v[0], b.v[0]), v_select(m.v[1], a.v[1], b.v[1]) } }; }

// src [LANES][n] to [n][LANES], where there are only n_superblocks in src the last of them again
inline void side_by_side(const float * src, int n_superblocks, int n, float * x) {
    const int n_here = n_superblocks * SUPERBLOCK / n;
    for (int lane = 0; lane < LANES; lane++) {
        const float * block = src + (lane < n_here ? lane : n_here - 1) * n;
        for (int i = 0; i < n; i++) {
            x[i * LANES + lane] = block[i];
        }
    }
}

inline void put_f16(uint8_t * dst, float x) {
    const uint16_t h = f16_of(x);
    __builtin_memcpy(dst, &h, sizeof(h));
}

inline float rounded_to_f16(float x) {
    return f32_of(f16_of(x));
}

// A float that is an integer, or becomes one as ggml does it: ties to even.
inline int nearest(float x) {
    return (int) __builtin_rintf(x);
}

inline int least(int a, int b) { return a < b ? a : b; }

//
// q4_K, q5_K: x = scale * l - minimum, l in 0 .. n_max, blocks of 32
//

struct affine {
    static constexpr int N = 32;
    float scale[LANES], minimum[LANES];
    float from[LANES], to[LANES]; // the least value or 0, and the largest
    bool  constant[LANES];        // these are the same: l is 0
    bool  odd[LANES];             // of a size or a shape that is left to ggml
};

// x [N][LANES]. The candidates for 1 / scale are (first + i / 10 + n_max) / (max - the best minimum so far), i = 0 .. n_step
inline void fit_affine(const float * x, float n_max, float first, int n_step, affine & out) {
    constexpr int N    = affine::N;
    const wide    zero = w_set1(0.0f);
    float         weights[N * LANES], levels[N * LANES];

    wide power = zero;
    for (int i = 0; i < N; i++) {
        const wide xi = w_load(x + i * LANES);
        power         = power + xi * xi;
    }
    const wide rms   = v_sqrt(power / w_set1((float) N));
    wide       min   = w_load(x), max = min;
    wide       sum_w = rms + v_abs(min);
    wide       sum_x = sum_w * min;
    w_store(weights, sum_w);
    for (int i = 1; i < N; i++) {
        const wide xi = w_load(x + i * LANES);
        const wide w  = rms + v_abs(xi);
        w_store(weights + i * LANES, w);
        min   = v_min(xi, min);
        max   = v_max(xi, max);
        sum_w = sum_w + w;
        sum_x = sum_x + w * xi;
    }
    min = v_min(min, zero);

    const auto level = [&](int i, wide inverse, wide minimum) {
        const wide l = v_round(inverse * (w_load(x + i * LANES) - minimum));
        return v_max(zero, v_min(w_set1(n_max), l));
    };
    wide       minimum = min, range = max - min, least_range = range;
    const wide inverse = w_set1(n_max) / range;
    wide       scale   = w_set1(1.0f) / inverse;
    wide       error   = zero;
    for (int i = 0; i < N; i++) {
        const wide diff = scale * level(i, inverse, minimum) + minimum - w_load(x + i * LANES);
        error           = error + w_load(weights + i * LANES) * (diff * diff);
    }
    for (int step = 0; step <= n_step; step++) {
        const wide candidate = w_set1(first + 0.1f * step + n_max) / range;
        wide       sum_l = zero, sum_l2 = zero, sum_xl = zero;
        for (int i = 0; i < N; i++) {
            const wide l  = level(i, candidate, minimum);
            const wide wl = w_load(weights + i * LANES) * l;
            w_store(levels + i * LANES, l);
            sum_l  = sum_l + wl;
            sum_l2 = sum_l2 + wl * l;
            sum_xl = sum_xl + wl * w_load(x + i * LANES);
        }
        const wide      det       = sum_w * sum_l2 - sum_l * sum_l;
        wide            new_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
        wide            new_min   = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        wide            new_error = zero;
        const wide_mask positive  = v_lt(zero, new_min);
        new_scale                 = v_select(positive, sum_xl / sum_l2, new_scale);
        new_min                   = v_select(positive, zero, new_min);
        for (int i = 0; i < N; i++) {
            const wide diff = new_scale * w_load(levels + i * LANES) + new_min - w_load(x + i * LANES);
            new_error       = new_error + w_load(weights + i * LANES) * (diff * diff);
        }
        const wide_mask better = v_and(v_lt(zero, det), v_lt(new_error, error));
        error                  = v_select(better, new_error, error);
        scale                  = v_select(better, new_scale, scale);
        minimum                = v_select(better, new_min, minimum); // the next candidates go on from there
        range                  = max - minimum;
        least_range            = v_min(range, least_range);
    }

    float range_at[LANES];
    w_store(out.from, min);
    w_store(out.to, max);
    w_store(range_at, least_range);
    w_store(out.scale, scale);
    w_store(out.minimum, zero - minimum);
    for (int lane = 0; lane < LANES; lane++) {
        const float from = out.from[lane], to = out.to[lane];
        const bool  fits   = from > -1e6f && to < 1e6f && range_at[lane] > 1e-9f && range_at[lane] > 1e-4f * (to - from) && out.scale[lane] > 0.0f;
        out.constant[lane] = from == to;
        out.odd[lane]      = !(out.constant[lane] || fits);
        if (out.constant[lane]) {
            out.scale[lane]   = 0.0f;
            out.minimum[lane] = 0.0f - from;
        }
    }
}

// levels [256] of one superblock, and its header: two f16 and 8 pairs of 6 bits. False: ggml has to do it
inline bool round_affine(const float * src, const affine & fit, int lane0, int n_max, uint8_t * header, int32_t * levels) {
    float max_scale = 0.0f, max_min = 0.0f;
    for (int b = 0; b < 8; b++) {
        max_scale = fit.scale[lane0 + b] > max_scale ? fit.scale[lane0 + b] : max_scale;
        max_min   = fit.minimum[lane0 + b] > max_min ? fit.minimum[lane0 + b] : max_min;
    }
    if (max_min > 1e6f || (max_min > 0.0f && max_min < 1e-30f)) {
        return false;
    }
    const float to_scale = max_scale > 0.0f ? 63.0f / max_scale : 0.0f;
    const float to_min   = max_min > 0.0f ? 63.0f / max_min : 0.0f;
    const float d = rounded_to_f16(max_scale / 63.0f), dmin = rounded_to_f16(max_min / 63.0f);
    uint8_t     scales[8], mins[8];
    for (int b = 0; b < 8; b++) {
        if (fit.odd[lane0 + b]) {
            return false;
        }
        scales[b]      = (uint8_t) least(63, nearest(to_scale * fit.scale[lane0 + b]));
        mins[b]        = (uint8_t) least(63, nearest(to_min * fit.minimum[lane0 + b]));
        const float ds = d * scales[b], dm = dmin * mins[b];
        if (ds == 0.0f) {
            if (!fit.constant[lane0 + b]) {
                return false; // the levels of the search stay
            }
            for (int i = 0; i < 32; i++) {
                levels[b * 32 + i] = 0;
            }
            continue;
        }
        // beyond, ggml's rounding wraps
        if (!(__builtin_fabsf(fit.from[lane0 + b] + dm) < 4e6f * ds && __builtin_fabsf(fit.to[lane0 + b] + dm) < 4e6f * ds)) {
            return false;
        }
        for (int i = 0; i < 32; i += QV_WIDTH) {
            const vf l = v_round((v_load(src + b * 32 + i) + v_set1(dm)) / v_set1(ds));
            v_store_i32(levels + b * 32 + i, v_max(v_set1(0.0f), v_min(v_set1((float) n_max), l)));
        }
    }
    put_f16(header, max_scale / 63.0f);
    put_f16(header + 2, max_min / 63.0f);
    uint8_t * packed = header + 4;
    for (int b = 0; b < 4; b++) {
        packed[b]     = (uint8_t) (scales[b] | scales[b + 4] >> 4 << 6);
        packed[b + 4] = (uint8_t) (mins[b] | mins[b + 4] >> 4 << 6);
        packed[b + 8] = (uint8_t) ((scales[b + 4] & 15) | (mins[b + 4] & 15) << 4);
    }
    return true;
}

inline void pack_q4_K(const int32_t * levels, uint8_t * dst) {
    for (int part = 0; part < 4; part++) {
        for (int i = 0; i < 32; i++) {
            dst[part * 32 + i] = (uint8_t) (levels[part * 64 + i] | levels[part * 64 + 32 + i] << 4);
        }
    }
}

// the fifth bits first
inline void pack_q5_K(const int32_t * levels, uint8_t * dst) {
    for (int i = 0; i < 32; i++) {
        int high = 0;
        for (int b = 0; b < 8; b++) {
            high |= levels[b * 32 + i] >> 4 << b;
        }
        dst[i] = (uint8_t) high;
    }
    for (int part = 0; part < 4; part++) {
        for (int i = 0; i < 32; i++) {
            dst[32 + part * 32 + i] = (uint8_t) ((levels[part * 64 + i] & 15) | (levels[part * 64 + 32 + i] & 15) << 4);
        }
    }
}

void quantize_affine(int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, qcache_quantize_superblock other) {
    constexpr int N_NOW = LANES * affine::N / SUPERBLOCK;
    const bool    five  = type == QCACHE_QUANTIZED_Q5_K;
    for (int64_t first = 0; first < n_blocks; first += N_NOW) {
        const int n = (int) (n_blocks - first < N_NOW ? n_blocks - first : N_NOW);
        float     x[affine::N * LANES];
        affine    fit;
        side_by_side(src, n, affine::N, x);
        five ? fit_affine(x, 31.0f, -0.5f, 15, fit) : fit_affine(x, 15.0f, -1.0f, 20, fit);
        for (int i = 0; i < n; i++, src += SUPERBLOCK, dst += qcache_quantize_block_bytes(type)) {
            int32_t levels[SUPERBLOCK];
            if (!round_affine(src, fit, i * SUPERBLOCK / affine::N, five ? 31 : 15, dst, levels)) {
                other(type, src, dst);
            } else {
                five ? pack_q5_K(levels, dst + 16) : pack_q4_K(levels, dst + 16);
            }
        }
    }
}

//
// q6_K: x = scale * l, l in -32 .. 31, blocks of 16
//

struct linear {
    static constexpr int N = 16;
    float scale[LANES];
    bool  none[LANES]; // no value counts: l + 32 is 0
    bool  odd[LANES];
};

// x [N][LANES]
inline void fit_linear(const float * x, linear & out) {
    constexpr int N    = linear::N;
    const wide    zero = w_set1(0.0f), lowest = w_set1(-32.0f), highest = w_set1(31.0f);
    wide          size = zero, extreme = zero;
    for (int i = 0; i < N; i++) {
        const wide      xi     = w_load(x + i * LANES);
        const wide_mask larger = v_lt(size, v_abs(xi));
        size                   = v_select(larger, v_abs(xi), size);
        extreme                = v_select(larger, xi, extreme);
    }
    float weights[N * LANES], weighted[N * LANES];
    for (int i = 0; i < N; i++) {
        const wide xi = w_load(x + i * LANES);
        w_store(weights + i * LANES, xi * xi);
        w_store(weighted + i * LANES, xi * xi * xi);
    }
    const auto sums = [&](wide inverse, wide & sum_xl, wide & sum_l2) {
        sum_xl = sum_l2 = zero;
        for (int i = 0; i < N; i++) {
            const wide l = v_max(lowest, v_min(highest, v_round(inverse * w_load(x + i * LANES))));
            sum_xl       = sum_xl + w_load(weighted + i * LANES) * l;
            sum_l2       = sum_l2 + w_load(weights + i * LANES) * l * l;
        }
    };
    wide sum_xl, sum_l2;
    sums(lowest / extreme, sum_xl, sum_l2);
    wide scale = v_select(v_lt(zero, sum_l2), sum_xl / sum_l2, zero);
    wide best  = scale * sum_xl;
    for (int step = -9; step <= 9; step++) {
        if (step == 0) {
            continue;
        }
        sums(w_set1(-(32 + 0.1f * step)) / extreme, sum_xl, sum_l2);
        const wide_mask better = v_and(v_lt(zero, sum_l2), v_lt(best * sum_l2, sum_xl * sum_xl));
        scale                  = v_select(better, sum_xl / sum_l2, scale);
        best                   = v_select(better, scale * sum_xl, best);
    }
    float size_at[LANES];
    w_store(size_at, size);
    w_store(out.scale, scale);
    for (int lane = 0; lane < LANES; lane++) {
        out.none[lane] = size_at[lane] < 1e-15f;
        out.odd[lane]  = !out.none[lane] && !(size_at[lane] > 1e-6f && size_at[lane] < 1e6f);
        if (out.none[lane]) {
            out.scale[lane] = 0.0f;
        }
    }
}

// false: ggml has to do it
inline bool round_linear(const float * src, const linear & fit, int lane0, uint8_t * dst) {
    float scales[16], max_size = 0.0f, max_scale = 0.0f;
    bool  none[16];
    for (int b = 0; b < 16; b++) {
        if (fit.odd[lane0 + b]) {
            return false;
        }
        scales[b]        = fit.scale[lane0 + b];
        none[b]          = fit.none[lane0 + b];
        const float size = __builtin_fabsf(scales[b]);
        if (size > max_size) {
            max_size  = size;
            max_scale = scales[b];
        }
    }
    if (max_size < 1e-15f) {
        return false;
    }
    const float to_scale = -128.0f / max_scale;
    const float d        = rounded_to_f16(1.0f / to_scale);
    uint8_t *   low = dst, *high = dst + 128;
    int8_t *    rounded = (int8_t *) dst + 192;
    int32_t     levels[SUPERBLOCK];
    for (int b = 0; b < 16; b++) {
        rounded[b]     = (int8_t) least(127, nearest(to_scale * scales[b]));
        const float ds = d * rounded[b];
        if (ds == 0.0f) {
            if (!none[b]) {
                return false;
            }
            for (int i = 0; i < 16; i++) {
                levels[b * 16 + i] = 0;
            }
            continue;
        }
        for (int i = 0; i < 16; i += QV_WIDTH) {
            const vf l = v_round(v_load(src + b * 16 + i) / v_set1(ds));
            v_store_i32(levels + b * 16 + i, v_max(v_set1(-32.0f), v_min(v_set1(31.0f), l)) + v_set1(32.0f));
        }
    }
    put_f16(dst + 208, 1.0f / to_scale);
    for (int half = 0; half < 2; half++) {
        const int32_t * l = levels + half * 128;
        for (int i = 0; i < 32; i++) {
            low[half * 64 + i]      = (uint8_t) ((l[i] & 15) | (l[i + 64] & 15) << 4);
            low[half * 64 + 32 + i] = (uint8_t) ((l[i + 32] & 15) | (l[i + 96] & 15) << 4);
            high[half * 32 + i]     = (uint8_t) (l[i] >> 4 | l[i + 32] >> 4 << 2 | l[i + 64] >> 4 << 4 | l[i + 96] >> 4 << 6);
        }
    }
    return true;
}

void quantize_q6_K(const float * src, uint8_t * dst, int64_t n_blocks, qcache_quantize_superblock other) {
    constexpr int N_NOW = LANES * linear::N / SUPERBLOCK;
    for (int64_t first = 0; first < n_blocks; first += N_NOW) {
        const int n = (int) (n_blocks - first < N_NOW ? n_blocks - first : N_NOW);
        float     x[linear::N * LANES];
        linear    fit;
        side_by_side(src, n, linear::N, x);
        fit_linear(x, fit);
        for (int i = 0; i < n; i++, src += SUPERBLOCK, dst += qcache_quantize_block_bytes(QCACHE_QUANTIZED_Q6_K)) {
            if (!round_linear(src, fit, i * SUPERBLOCK / linear::N, dst)) {
                other(QCACHE_QUANTIZED_Q6_K, src, dst);
            }
        }
    }
}

//
// q8_0: x = scale * l, l in -127 .. 127, ties away from zero
//

void quantize_q8_0(const float * src, uint8_t * dst, int64_t n_blocks) {
    for (int64_t n = 0; n < n_blocks; n++, src += 32, dst += 34) {
        vf size = v_set1(0.0f);
        for (int i = 0; i < 32; i += QV_WIDTH) {
            size = v_max(v_abs(v_load(src + i)), size);
        }
        float sizes[QV_WIDTH], largest = 0.0f;
        v_store(sizes, size);
        for (int lane = 0; lane < QV_WIDTH; lane++) {
            largest = sizes[lane] > largest ? sizes[lane] : largest;
        }
        const float d = largest / 127.0f;
        put_f16(dst, d);
        const vf inverse = v_set1(d != 0.0f ? 1.0f / d : 0.0f);
        int32_t  levels[32];
        for (int i = 0; i < 32; i += QV_WIDTH) {
            const vf y     = v_load(src + i) * inverse;
            const vf whole = v_trunc(y);
            const vf left  = y - whole;
            const vf away  = v_select(v_lt(v_set1(0.0f), y), v_set1(1.0f), v_set1(-1.0f));
            v_store_i32(levels + i, v_select(v_lt(v_abs(left), v_set1(0.5f)), whole, whole + away));
        }
        for (int i = 0; i < 32; i++) {
            dst[2 + i] = (uint8_t) (int8_t) levels[i];
        }
    }
}

} // namespace

void QCACHE_QUANTIZE_KERNEL(int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, qcache_quantize_superblock other) {
    if (type == QCACHE_QUANTIZED_Q8_0) {
        quantize_q8_0(src, dst, n_blocks);
    } else if (type == QCACHE_QUANTIZED_Q6_K) {
        quantize_q6_K(src, dst, n_blocks, other);
    } else {
        quantize_affine(type, src, dst, n_blocks, other);
    }
}
