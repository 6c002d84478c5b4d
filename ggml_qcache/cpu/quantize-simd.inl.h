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

// src [QV_WIDTH][n] to [n][QV_WIDTH]
inline void side_by_side(const float * src, int n, float * x) {
    for (int i = 0; i < n; i++) {
        for (int lane = 0; lane < QV_WIDTH; lane++) {
            x[i * QV_WIDTH + lane] = src[lane * n + i];
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
    float scale[QV_WIDTH], minimum[QV_WIDTH];
    bool  constant[QV_WIDTH]; // all values the same: l is 0
    bool  odd[QV_WIDTH];
};

// x [N][QV_WIDTH]. The candidates for 1 / scale are (first + i / 10 + n_max) / (max - the best minimum so far), i = 0 .. n_step
inline void fit_affine(const float * x, float n_max, float first, int n_step, affine & out) {
    constexpr int N = affine::N;
    const vf zero   = v_set1(0.0f);
    float    weights[N * QV_WIDTH], levels[N * QV_WIDTH];

    vf power = zero;
    for (int i = 0; i < N; i++) {
        const vf xi = v_load(x + i * QV_WIDTH);
        power       = power + xi * xi;
    }
    const vf rms  = v_sqrt(power / v_set1((float) N));
    vf       min  = v_load(x), max = min;
    vf       sum_w = rms + v_abs(min);
    vf       sum_x = sum_w * min;
    v_store(weights, sum_w);
    for (int i = 1; i < N; i++) {
        const vf xi = v_load(x + i * QV_WIDTH);
        const vf w  = rms + v_abs(xi);
        v_store(weights + i * QV_WIDTH, w);
        min   = v_min(xi, min);
        max   = v_max(xi, max);
        sum_w = sum_w + w;
        sum_x = sum_x + w * xi;
    }
    min = v_min(min, zero);

    const auto level = [&](int i, vf inverse, vf minimum) {
        const vf l = v_round(inverse * (v_load(x + i * QV_WIDTH) - minimum));
        return v_max(zero, v_min(v_set1(n_max), l));
    };
    vf       minimum = min, range = max - min, least_range = range;
    const vf inverse = v_set1(n_max) / range;
    vf       scale   = v_set1(1.0f) / inverse;
    vf       error   = zero;
    for (int i = 0; i < N; i++) {
        const vf diff = scale * level(i, inverse, minimum) + minimum - v_load(x + i * QV_WIDTH);
        error         = error + v_load(weights + i * QV_WIDTH) * (diff * diff);
    }
    for (int step = 0; step <= n_step; step++) {
        const vf candidate = v_set1(first + 0.1f * step + n_max) / range;
        vf       sum_l = zero, sum_l2 = zero, sum_xl = zero;
        for (int i = 0; i < N; i++) {
            const vf l  = level(i, candidate, minimum);
            const vf wl = v_load(weights + i * QV_WIDTH) * l;
            v_store(levels + i * QV_WIDTH, l);
            sum_l  = sum_l + wl;
            sum_l2 = sum_l2 + wl * l;
            sum_xl = sum_xl + wl * v_load(x + i * QV_WIDTH);
        }
        const vf det       = sum_w * sum_l2 - sum_l * sum_l;
        vf       new_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
        vf       new_min   = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        const vm positive  = v_lt(zero, new_min);
        new_scale          = v_select(positive, sum_xl / sum_l2, new_scale);
        new_min            = v_select(positive, zero, new_min);
        vf new_error       = zero;
        for (int i = 0; i < N; i++) {
            const vf diff = new_scale * v_load(levels + i * QV_WIDTH) + new_min - v_load(x + i * QV_WIDTH);
            new_error     = new_error + v_load(weights + i * QV_WIDTH) * (diff * diff);
        }
        const vm better = v_and(v_lt(zero, det), v_lt(new_error, error));
        error           = v_select(better, new_error, error);
        scale           = v_select(better, new_scale, scale);
        minimum         = v_select(better, new_min, minimum); // the next candidates go on from there
        range           = max - minimum;
        least_range     = v_min(range, least_range);
    }

    float min_at[QV_WIDTH], max_at[QV_WIDTH], range_at[QV_WIDTH];
    v_store(min_at, min);
    v_store(max_at, max);
    v_store(range_at, least_range);
    v_store(out.scale, scale);
    v_store(out.minimum, zero - minimum);
    for (int lane = 0; lane < QV_WIDTH; lane++) {
        const float from = min_at[lane], to = max_at[lane];
        out.constant[lane] = from == to;
        out.odd[lane]      = !out.constant[lane] && !(range_at[lane] > 1e-9f && to - from < 1e9f && range_at[lane] > 1e-4f * (to - from) && out.scale[lane] > 0.0f);
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
    constexpr int N_NOW = QV_WIDTH / 8; // superblocks at once
    const bool    five  = type == QCACHE_QUANTIZED_Q5_K;
    const int     bytes = qcache_quantize_block_bytes(type);
    for (int64_t first = 0; first < n_blocks; first += N_NOW) {
        const int n = (int) (n_blocks - first < N_NOW ? n_blocks - first : N_NOW);
        float     x[affine::N * QV_WIDTH];
        if (n < N_NOW) { // the last one in each place
            float padded[N_NOW * SUPERBLOCK];
            for (int i = 0; i < N_NOW * SUPERBLOCK; i++) {
                padded[i] = src[i % SUPERBLOCK];
            }
            side_by_side(padded, affine::N, x);
        } else {
            side_by_side(src, affine::N, x);
        }
        affine fit;
        five ? fit_affine(x, 31.0f, -0.5f, 15, fit) : fit_affine(x, 15.0f, -1.0f, 20, fit);
        for (int i = 0; i < n; i++, src += SUPERBLOCK, dst += bytes) {
            int32_t levels[SUPERBLOCK];
            if (!round_affine(src, fit, i * 8, five ? 31 : 15, dst, levels)) {
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
    float scale[QV_WIDTH];
    bool  none[QV_WIDTH]; // no value counts: l + 32 is 0
    bool  odd[QV_WIDTH];
};

// x [N][QV_WIDTH]
inline void fit_linear(const float * x, linear & out) {
    constexpr int N = linear::N;
    const vf zero = v_set1(0.0f), lowest = v_set1(-32.0f), highest = v_set1(31.0f);
    vf       size = zero, extreme = zero;
    for (int i = 0; i < N; i++) {
        const vf xi     = v_load(x + i * QV_WIDTH);
        const vm larger = v_lt(size, v_abs(xi));
        size            = v_select(larger, v_abs(xi), size);
        extreme         = v_select(larger, xi, extreme);
    }
    float weights[N * QV_WIDTH], weighted[N * QV_WIDTH];
    for (int i = 0; i < N; i++) {
        const vf xi = v_load(x + i * QV_WIDTH);
        v_store(weights + i * QV_WIDTH, xi * xi);
        v_store(weighted + i * QV_WIDTH, xi * xi * xi);
    }
    const auto sums = [&](vf inverse, vf & sum_xl, vf & sum_l2) {
        sum_xl = sum_l2 = zero;
        for (int i = 0; i < N; i++) {
            const vf l = v_max(lowest, v_min(highest, v_round(inverse * v_load(x + i * QV_WIDTH))));
            sum_xl     = sum_xl + v_load(weighted + i * QV_WIDTH) * l;
            sum_l2     = sum_l2 + v_load(weights + i * QV_WIDTH) * l * l;
        }
    };
    vf sum_xl, sum_l2;
    sums(lowest / extreme, sum_xl, sum_l2);
    vf scale = v_select(v_lt(zero, sum_l2), sum_xl / sum_l2, zero);
    vf best  = scale * sum_xl;
    for (int step = -9; step <= 9; step++) {
        if (step == 0) {
            continue;
        }
        sums(v_set1(-(32 + 0.1f * step)) / extreme, sum_xl, sum_l2);
        const vm better = v_and(v_lt(zero, sum_l2), v_lt(best * sum_l2, sum_xl * sum_xl));
        scale           = v_select(better, sum_xl / sum_l2, scale);
        best            = v_select(better, scale * sum_xl, best);
    }
    float size_at[QV_WIDTH];
    v_store(size_at, size);
    v_store(out.scale, scale);
    for (int lane = 0; lane < QV_WIDTH; lane++) {
        out.none[lane] = size_at[lane] < 1e-15f;
        out.odd[lane]  = !out.none[lane] && !(size_at[lane] > 1e-6f && size_at[lane] < 1e6f);
        if (out.none[lane]) {
            out.scale[lane] = 0.0f;
        }
    }
}

// false: ggml has to do it
inline bool round_linear(const float * src, const linear * fits, uint8_t * dst) {
    float scales[16], max_size = 0.0f, max_scale = 0.0f;
    bool  none[16];
    for (int b = 0; b < 16; b++) {
        const linear & fit  = fits[b / QV_WIDTH];
        const int      lane = b % QV_WIDTH;
        if (fit.odd[lane]) {
            return false;
        }
        scales[b]        = fit.scale[lane];
        none[b]          = fit.none[lane];
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
    for (int64_t n = 0; n < n_blocks; n++, src += SUPERBLOCK, dst += qcache_quantize_block_bytes(QCACHE_QUANTIZED_Q6_K)) {
        linear fits[16 / QV_WIDTH];
        for (int i = 0; i < 16 / QV_WIDTH; i++) {
            float x[linear::N * QV_WIDTH];
            side_by_side(src + i * QV_WIDTH * linear::N, linear::N, x);
            fit_linear(x, fits[i]);
        }
        if (!round_linear(src, fits, dst)) {
            other(QCACHE_QUANTIZED_Q6_K, src, dst);
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
