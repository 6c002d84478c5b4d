// attn-simd.inl.h: lazy attention, the vector kernel. Included by one file per instruction set, which defines first:
//
//   vf, QV_WIDTH                  a vector of floats and how many it holds (4, 8 or 16)
//   vi                            a vector of as many int32
//   QV_NQ                         queries of a GQA group whose sums for a few keys fit the registers
//   QV_MR, QV_NR                  rows and vectors of columns of the matrix micro-kernel that fit the registers
//   v_zero v_set1 v_load v_store v_add v_sub v_mul v_fma(a, b, c) = a * b + c
//   v_max(a, b) v_min(a, b)       a NaN in b survives
//   v_zero_lt(y, x, limit)        y, or 0 where x < limit
//   v_sum v_sum4 v_hmax           across a vector; v_sum4 stores the sums of four
//   v_round_i v_from_i v_pow2     nearest integer; to float; 2^n
//   v_load_f16 v_load_i8          QV_WIDTH values converted
//   v_load_i4(x, high)            QV_WIDTH values 0 .. 15, less 8: the lower or the higher halves of as many bytes
//   v_load_f16_half               8 values, the rest zero (QV_WIDTH 16 only)
//   s_load_f16                    one value
//   transpose_8x8(src, src_stride, dst, dst_stride)
//   QCACHE_ATTN_KERNEL, QCACHE_ATTN_NAME    the function to define and the kernel's name
//
// Everything is in an anonymous namespace and nothing of the standard library is used, so that no code of this
// instruction set can replace that of another file at link time.
//
// One task is a tile of query rows (same sequence and modality) and one or more KV heads with their GQA groups. It walks the
// blocks of the sequence once with an online softmax; in a block, first K of all its heads and then V of all, each one
// long stretch of memory (head after head, 8 KB at a time: 1.5x to 1.9x slower with as many KV heads as heads).
// Where all tasks are direct, each thread has an equal share of their units, and the last to do its piece of a task merges
// the pieces. Two paths:
//   direct  up to 8 queries (decode): each K and V row is read once, converted in registers and used for the whole group
//           (rows of a group of 8 converted to floats once: 1.1x for q8_0, 0.6x for f16; the matrix path: worse)
//   matrix  more (prefill): K (transposed) and V of a block are converted to floats once and multiplied by all queries

namespace {

constexpr int   DIRECT_QUERIES = QCACHE_ATTN_DIRECT_QUERIES;
constexpr int   MOST_PIECES    = 8; // of a task, about; one thread merges them
constexpr float FLOAT_MAX      = 3.402823466e+38f;

inline int min_i(int a, int b) { return a < b ? a : b; }
inline int max_i(int a, int b) { return a > b ? a : b; }
inline int round_up(int n, int m) { return (n + m - 1) / m * m; }

// exp for x <= 0 (Cephes expf polynomial, relative error about 1e-7); 0 below the normal floats, NaN stays NaN
inline vf v_exp(vf x) {
    const vf lowest = v_set1(-87.0f);
    const vf z      = v_max(lowest, x);
    const vi n      = v_round_i(v_mul(z, v_set1(1.44269504088896341f)));
    const vf nf     = v_from_i(n);
    vf r            = v_fma(nf, v_set1(-0.693359375f), z);
    r               = v_fma(nf, v_set1(2.12194440e-4f), r);
    vf y            = v_set1(1.9875691500e-4f);
    y               = v_fma(y, r, v_set1(1.3981999507e-3f));
    y               = v_fma(y, r, v_set1(8.3334519073e-3f));
    y               = v_fma(y, r, v_set1(4.1665795894e-2f));
    y               = v_fma(y, r, v_set1(1.6666665459e-1f));
    y               = v_fma(y, r, v_set1(5.0000001201e-1f));
    y               = v_fma(y, v_mul(r, r), v_add(r, v_set1(1.0f)));
    return v_zero_lt(v_mul(y, v_pow2(n)), x, lowest);
}

inline vf v_clamp_logit(vf x) {
    return v_max(v_set1(-FLOAT_MAX), v_min(v_set1(FLOAT_MAX), x));
}

//
// rows of K and V
//

struct kv_f16 {
    static constexpr bool grouped = false;
    static constexpr int  NV1     = 2; // values at once for one query: with 4 1.05x slower, for groups 1.08x faster
    static size_t row_bytes(int head_dim) { return (size_t) head_dim * 2; }
};

// groups of 32 that share an f16 scale; the last group is filled up with zeros
template <size_t BYTES> struct kv_groups {
    static constexpr bool   grouped     = true;
    static constexpr size_t group_bytes = BYTES;
    static constexpr int    NV1         = 4;
    static size_t row_bytes(int head_dim) { return (size_t) round_up(head_dim, 32) / 32 * BYTES; }
};

// load: values j .. of a group, without its scale
struct kv_q8_0 : kv_groups<34> {
    static vf load(const uint8_t * group, int j) { return v_load_i8(group + 2 + j); }
};

// value j is the lower half of byte j, value j + 16 the higher one
struct kv_q4_0 : kv_groups<18> {
    static vf load(const uint8_t * group, int j) { return v_load_i4(group + 2 + j % 16, j >= 16); }
};

constexpr int      SKIP_ROWS = 8;            // V rows that are read or left out together
constexpr uint64_t KEEP_ALL  = ~(uint64_t) 0; // bit i: rows SKIP_ROWS i and on are read; the last bit stands for the rest too

inline bool keeps(uint64_t keep, int tile) {
    return keep >> min_i(tile, 63) & 1;
}

// What is read next starts another page, where no hardware prefetcher goes by itself: each tile of rows brings as many
// bytes of it into the cache as it reads.
struct ahead {
    const uint8_t * next; // NULL at the end
    uint64_t        keep      = KEEP_ALL;
    size_t          row_bytes = 0; // of next, where not all is kept
    size_t          start     = 0;

    ahead from(size_t offset) const { return { next, keep, row_bytes, start + offset }; }

    // inlined, or GCC takes it for a function without effects and leaves all calls out
    __attribute__((always_inline)) void operator()(size_t offset, size_t n_bytes) const {
        offset += start;
        if (next && (keep == KEEP_ALL || keeps(keep, (int) (offset / (SKIP_ROWS * row_bytes))))) {
            for (size_t i = 0; i < n_bytes; i += 64) {
                __builtin_prefetch(next + offset + i, 0, 3);
            }
        }
    }
};

// n rows as floats [n][stride], zeros from head_dim (rounded up to a group) to stride
template <class T> void rows_to_float(const uint8_t * src, int n, int head_dim, float * dst, int stride, ahead fetch) {
    const size_t row_bytes = T::row_bytes(head_dim);
    for (int i = 0; i < n; i++, src += row_bytes, dst += stride) {
        fetch(i * row_bytes, row_bytes);
        int d = 0;
        if constexpr (T::grouped) {
            for (; d < head_dim; d += 32) {
                const uint8_t * group = src + d / 32 * T::group_bytes;
                const vf        scale = v_set1(s_load_f16(group));
                for (int j = 0; j < 32; j += QV_WIDTH) {
                    v_store(dst + d + j, v_mul(scale, T::load(group, j)));
                }
            }
        } else {
            for (; d + QV_WIDTH <= head_dim; d += QV_WIDTH) {
                v_store(dst + d, v_load_f16(src + 2 * d));
            }
            if constexpr (QV_WIDTH > 8) {
                if (d < head_dim) {
                    v_store(dst + d, v_load_f16_half(src + 2 * d));
                    d += QV_WIDTH;
                }
            }
        }
        for (; d < stride; d += QV_WIDTH) {
            v_store(dst + d, v_zero());
        }
    }
}

//
// direct path
//

template <int NK> inline void store_sums(const vf * acc, float * out) {
    if constexpr (NK % 4 == 0) {
        for (int k = 0; k < NK; k += 4) {
            v_sum4(acc[k], acc[k + 1], acc[k + 2], acc[k + 3], out + k);
        }
    } else {
        for (int k = 0; k < NK; k++) {
            out[k] = v_sum(acc[k]);
        }
    }
}

// out[q][k] = <queries[q], keys[k]>; queries are padded with zeros
template <class T, int NK, int NQ>
inline void qk_tile(const uint8_t * keys, size_t row_bytes, const float * queries, int q_stride, int head_dim, float * out,
                    int out_stride) {
    vf acc[NQ][NK];
#pragma GCC unroll 16
    for (int q = 0; q < NQ; q++) {
#pragma GCC unroll 16
        for (int k = 0; k < NK; k++) {
            acc[q][k] = v_zero();
        }
    }
    if constexpr (T::grouped) {
        for (int d = 0; d < head_dim; d += 32, keys += T::group_bytes) {
            vf part[NQ][NK];
#pragma GCC unroll 16
            for (int j = 0; j < 32; j += QV_WIDTH) {
                vf x[NK];
#pragma GCC unroll 16
                for (int k = 0; k < NK; k++) {
                    x[k] = T::load(keys + k * row_bytes, j);
                }
#pragma GCC unroll 16
                for (int q = 0; q < NQ; q++) {
                    const vf y = v_load(queries + q * q_stride + d + j);
#pragma GCC unroll 16
                    for (int k = 0; k < NK; k++) {
                        part[q][k] = j == 0 ? v_mul(x[k], y) : v_fma(x[k], y, part[q][k]);
                    }
                }
            }
#pragma GCC unroll 16
            for (int k = 0; k < NK; k++) {
                const vf scale = v_set1(s_load_f16(keys + k * row_bytes));
#pragma GCC unroll 16
                for (int q = 0; q < NQ; q++) {
                    acc[q][k] = v_fma(scale, part[q][k], acc[q][k]);
                }
            }
        }
    } else {
        int d = 0;
        for (; d + QV_WIDTH <= head_dim; d += QV_WIDTH) {
            vf x[NK];
#pragma GCC unroll 16
            for (int k = 0; k < NK; k++) {
                x[k] = v_load_f16(keys + k * row_bytes + 2 * d);
            }
#pragma GCC unroll 16
            for (int q = 0; q < NQ; q++) {
                const vf y = v_load(queries + q * q_stride + d);
#pragma GCC unroll 16
                for (int k = 0; k < NK; k++) {
                    acc[q][k] = v_fma(x[k], y, acc[q][k]);
                }
            }
        }
        if constexpr (QV_WIDTH > 8) {
            if (d < head_dim) {
                for (int k = 0; k < NK; k++) {
                    const vf x = v_load_f16_half(keys + k * row_bytes + 2 * d);
                    for (int q = 0; q < NQ; q++) {
                        acc[q][k] = v_fma(x, v_load(queries + q * q_stride + d), acc[q][k]);
                    }
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int q = 0; q < NQ; q++) {
        store_sums<NK>(acc[q], out + q * out_stride);
    }
}

// acc[q][d] += sum over k of probs[q][k] * values[k][d]
template <class T, int NK, int NQ>
inline void pv_tile(const uint8_t * values, size_t row_bytes, const float * probs, int p_stride, int head_dim, float * acc,
                    int a_stride) {
    vf w[NQ][NK];
    if constexpr (T::grouped) {
        for (int d = 0; d < head_dim; d += 32, values += T::group_bytes) {
#pragma GCC unroll 16
            for (int k = 0; k < NK; k++) {
                const float scale = s_load_f16(values + k * row_bytes);
#pragma GCC unroll 16
                for (int q = 0; q < NQ; q++) {
                    w[q][k] = v_set1(probs[q * p_stride + k] * scale);
                }
            }
#pragma GCC unroll 16
            for (int j = 0; j < 32; j += QV_WIDTH) {
                vf a[NQ];
#pragma GCC unroll 16
                for (int q = 0; q < NQ; q++) {
                    a[q] = v_load(acc + q * a_stride + d + j);
                }
#pragma GCC unroll 16
                for (int k = 0; k < NK; k++) {
                    const vf x = T::load(values + k * row_bytes, j);
#pragma GCC unroll 16
                    for (int q = 0; q < NQ; q++) {
                        a[q] = v_fma(w[q][k], x, a[q]);
                    }
                }
#pragma GCC unroll 16
                for (int q = 0; q < NQ; q++) {
                    v_store(acc + q * a_stride + d + j, a[q]);
                }
            }
        }
    } else {
#pragma GCC unroll 16
        for (int q = 0; q < NQ; q++) {
#pragma GCC unroll 16
            for (int k = 0; k < NK; k++) {
                w[q][k] = v_set1(probs[q * p_stride + k]);
            }
        }
        int d = 0;
        for (; d + QV_WIDTH <= head_dim; d += QV_WIDTH) {
            vf a[NQ];
#pragma GCC unroll 16
            for (int q = 0; q < NQ; q++) {
                a[q] = v_load(acc + q * a_stride + d);
            }
#pragma GCC unroll 16
            for (int k = 0; k < NK; k++) {
                const vf x = v_load_f16(values + k * row_bytes + 2 * d);
#pragma GCC unroll 16
                for (int q = 0; q < NQ; q++) {
                    a[q] = v_fma(w[q][k], x, a[q]);
                }
            }
#pragma GCC unroll 16
            for (int q = 0; q < NQ; q++) {
                v_store(acc + q * a_stride + d, a[q]);
            }
        }
        if constexpr (QV_WIDTH > 8) {
            if (d < head_dim) {
                for (int q = 0; q < NQ; q++) {
                    vf a = v_load(acc + q * a_stride + d);
                    for (int k = 0; k < NK; k++) {
                        a = v_fma(w[q][k], v_load_f16_half(values + k * row_bytes + 2 * d), a);
                    }
                    v_store(acc + q * a_stride + d, a);
                }
            }
        }
    }
}

// the two as one: in is queries or probs, out is logits or the accumulated output; a key is a step in one of them
struct qk {
    static constexpr int in_step = 0, out_step = 1;
    template <class T, int NK, int NQ>
    static void tile(const uint8_t * rows, size_t row_bytes, const float * in, int in_stride, int head_dim, float * out, int out_stride) {
        qk_tile<T, NK, NQ>(rows, row_bytes, in, in_stride, head_dim, out, out_stride);
    }
};

struct pv {
    static constexpr int in_step = 1, out_step = 0;
    template <class T, int NK, int NQ>
    static void tile(const uint8_t * rows, size_t row_bytes, const float * in, int in_stride, int head_dim, float * out, int out_stride) {
        pv_tile<T, NK, NQ>(rows, row_bytes, in, in_stride, head_dim, out, out_stride);
    }
};

// queries in tiles of NQ and, for what is left, of half as many
template <class OP, class T, int NK, int NQ>
inline void tile_queries(const uint8_t * rows, size_t row_bytes, const float * in, int n_queries, int in_stride, int head_dim, float * out,
                         int out_stride) {
    int q = 0;
    for (; q + NQ <= n_queries; q += NQ) {
        OP::template tile<T, NK, NQ>(rows, row_bytes, in + q * in_stride, in_stride, head_dim, out + q * out_stride, out_stride);
    }
    if constexpr (NQ > 1) {
        if (q < n_queries) {
            tile_queries<OP, T, NK, NQ / 2>(rows, row_bytes, in + q * in_stride, n_queries - q, in_stride, head_dim, out + q * out_stride, out_stride);
        }
    }
}

// rows of K or V, NK at a time
template <class OP, class T, int NK>
void tile_rows(const uint8_t * rows, int n_keys, const float * in, int n_queries, int in_stride, int head_dim, float * out, int out_stride,
               ahead fetch) {
    const size_t row_bytes = T::row_bytes(head_dim);
    int          k         = 0;
    for (; k + NK <= n_keys; k += NK) {
        fetch(k * row_bytes, NK * row_bytes);
        tile_queries<OP, T, NK, QV_NQ>(rows + k * row_bytes, row_bytes, in + k * OP::in_step, n_queries, in_stride, head_dim, out + k * OP::out_step,
                                       out_stride);
    }
    for (; k < n_keys; k++) {
        tile_queries<OP, T, 1, 1>(rows + k * row_bytes, row_bytes, in + k * OP::in_step, n_queries, in_stride, head_dim, out + k * OP::out_step,
                                  out_stride);
    }
}

template <class T>
void qk_direct(const uint8_t * keys, int n_keys, const float * queries, int n_queries, int q_stride, int head_dim, float * out,
               int out_stride, ahead fetch) {
    tile_rows<qk, T, 4>(keys, n_keys, queries, n_queries, q_stride, head_dim, out, out_stride, fetch);
}

template <class T>
void pv_direct(const uint8_t * values, int n_keys, const float * probs, int n_queries, int p_stride, int head_dim, float * acc, int a_stride,
               ahead fetch) {
    const auto rows = n_queries == 1 ? tile_rows<pv, T, T::NV1> : tile_rows<pv, T, 4>;
    rows(values, n_keys, probs, n_queries, p_stride, head_dim, acc, a_stride, fetch);
}

//
// matrix path
//

// c[m][0 .. QV_NR vectors] (+)= a[m][0 .. n) * b[0 .. n)[...]
template <int MR, bool ADD>
inline void gemm_tile(const float * const * a, const float * b, int b_stride, int n, float * c, int c_stride) {
    vf acc[MR][QV_NR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
        for (int j = 0; j < QV_NR; j++) {
            acc[m][j] = ADD ? v_load(c + m * c_stride + j * QV_WIDTH) : v_zero();
        }
    }
    for (int i = 0; i < n; i++, b += b_stride) {
        vf y[QV_NR];
#pragma GCC unroll 16
        for (int j = 0; j < QV_NR; j++) {
            y[j] = v_load(b + j * QV_WIDTH);
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            const vf x = v_set1(a[m][i]);
#pragma GCC unroll 16
            for (int j = 0; j < QV_NR; j++) {
                acc[m][j] = v_fma(x, y[j], acc[m][j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
        for (int j = 0; j < QV_NR; j++) {
            v_store(c + m * c_stride + j * QV_WIDTH, acc[m][j]);
        }
    }
}

// MR rows of a by all columns of b
template <int MR, bool ADD>
void gemm_rows(const float * const * a, const float * b, int b_stride, int n, float * c, int c_stride, int n_columns) {
    for (int j = 0; j < n_columns; j += QV_NR * QV_WIDTH) {
        gemm_tile<MR, ADD>(a, b + j, b_stride, n, c + j, c_stride);
    }
}

// mr is 1 .. MR
template <int MR, bool ADD>
void gemm_rows_of(int mr, const float * const * a, const float * b, int b_stride, int n, float * c, int c_stride, int n_columns) {
    if (mr == MR) {
        gemm_rows<MR, ADD>(a, b, b_stride, n, c, c_stride, n_columns);
    } else if constexpr (MR > 1) {
        gemm_rows_of<MR - 1, ADD>(mr, a, b, b_stride, n, c, c_stride, n_columns);
    }
}

// row(m) gives row m of a
template <bool ADD, class F>
void gemm(int n_rows, const F & row, const float * b, int b_stride, int n, float * c, int c_stride, int n_columns) {
    const float * a[QV_MR];
    for (int m = 0; m < n_rows;) {
        const int left = n_rows - m;
        const int mr   = left >= 2 * QV_MR || left <= QV_MR ? min_i(left, QV_MR) : (left + 1) / 2;
        for (int i = 0; i < mr; i++) {
            a[i] = row(m + i);
        }
        float * cm = c + (size_t) m * c_stride;
        gemm_rows_of<QV_MR, ADD>(mr, a, b, b_stride, n, cm, c_stride, n_columns);
        m += mr;
    }
}

//
// softmax
//

// x[0 .. n) become logits: scaled and finite
inline void finish_logits(float * x, int n, float scale) {
    for (int i = 0; i < n; i += QV_WIDTH) {
        v_store(x + i, v_clamp_logit(v_mul(v_load(x + i), v_set1(scale))));
    }
}

// Logits x[0 .. n) of a block become weights relative to the running max, x[n .. n_block) become 0; max and sum are
// brought up to date. Returns what the accumulated output is to be multiplied by.
inline float update_softmax(float * x, int n, int n_block, float bias, float & max, float & sum) {
    const int n_padded = round_up(n_block, QV_WIDTH);
    if (n == 0) {
        for (int i = 0; i < n_padded; i++) {
            x[i] = 0.0f;
        }
        return 1.0f;
    }
    if (bias != 0.0f) {
        for (int i = 0; i < n; i += QV_WIDTH) {
            v_store(x + i, v_clamp_logit(v_add(v_load(x + i), v_set1(bias))));
        }
    }
    for (int i = n; i < n_padded; i++) {
        x[i] = -__builtin_inff();
    }
    vf block_max = v_set1(-__builtin_inff());
    for (int i = 0; i < n_padded; i += QV_WIDTH) {
        block_max = v_max(block_max, v_load(x + i));
    }
    const float m       = v_hmax(block_max);
    const float new_max = max > m ? max : m;
    vf          part    = v_zero();
    for (int i = 0; i < n_padded; i += QV_WIDTH) {
        const vf w = v_exp(v_sub(v_load(x + i), v_set1(new_max)));
        v_store(x + i, w);
        part = v_add(part, w);
    }
    float rescale = 1.0f;
    if (new_max != max) {
        float e[QV_WIDTH];
        v_store(e, v_exp(v_set1(max - new_max))); // 0 for the first block
        rescale = e[0];
    }
    sum = sum * rescale + v_sum(part);
    max = new_max;
    return rescale;
}

inline void scale_row(float * x, int n, float c) {
    for (int i = 0; i < n; i += QV_WIDTH) {
        v_store(x + i, v_mul(v_load(x + i), v_set1(c)));
    }
}

//
// one task: rows row0 .. row0 + n_rows - 1, of one sequence and modality, and one or more KV heads
//

// as qcache_attn_layout tells
struct scratch {
    qcache_attn_thread * thread;
    float *queries, *keys, *values, *logits, *acc[2], *max[2], *sum[2];
};

inline scratch scratch_of(const qcache_attn_params & p, uint8_t * wdata, int ith) {
    const qcache_attn_layout at = qcache_attn_layout_of(p);
    scratch                  s;
    s.thread   = qcache_attn_thread_of(at, wdata, ith);
    float * x  = (float *) ((uint8_t *) s.thread + QCACHE_ATTN_THREAD_BYTES);
    s.queries  = x + at.queries;
    s.keys     = x + at.keys;
    s.values   = x + at.values;
    s.logits   = x + at.logits;
    for (int i = 0; i < 2; i++) {
        s.acc[i] = x + at.acc[i];
        s.max[i] = x + at.max[i];
        s.sum[i] = x + at.sum[i];
    }
    return s;
}

inline bool skips(const qcache_attn_params & p) {
    return p.v_skip > 0.0f && p.score_op == QCACHE_SCORE_READ;
}

// Which V rows of inherited keys are not worth reading. load(b, m, x) gives the logits x of query m in block b, -inf where
// it sees no key, and returns how many there are, padded to whole vectors.
struct skipping {
    float max_share = 0.0f; // of a query's attention; 0: off
    int   n_keys    = 0;    // inherited ones, of the whole sequence
    int   n_seen    = 0;
    float log_sum[DIRECT_QUERIES]; // of the exp of all inherited keys' logits; own keys make the softmax's sum larger, not smaller
    float skipped[DIRECT_QUERIES]; // share of the attention so far, at most

    template <class F, class L>
    void start(const qcache_attn_seq & seq, int pos_max, int n_queries, float * x, const F & inherited, const L & load) {
        for (int ib = 0; ib < seq.n_blocks && seq.blocks[ib].first <= pos_max; ib++) {
            n_keys += inherited(seq.blocks[ib]) ? min_i(seq.blocks[ib].n, pos_max - seq.blocks[ib].first + 1) : 0;
        }
        for (int m = 0; m < n_queries; m++) {
            float max = -__builtin_inff(), sum = 0.0f;
            for (int ib = 0; ib < seq.n_blocks && seq.blocks[ib].first <= pos_max; ib++) {
                if (inherited(seq.blocks[ib])) {
                    const int n = load(seq.blocks[ib], m, x);
                    update_softmax(x, n, n, 0.0f, max, sum);
                }
            }
            log_sum[m] = max + __builtin_logf(sum);
            skipped[m] = 0.0f;
        }
    }

    // The share that may be left out accrues with the keys gone by, so that whatever the order of blocks it is never
    // passed, nor where a task is cut into pieces.
    template <class L> uint64_t keep(const qcache_attn_block & block, int n_queries, int n, float * x, const L & load) {
        const int n_tiles = (n + SKIP_ROWS - 1) / SKIP_ROWS;
        if (n_tiles > 63) {
            return KEEP_ALL;
        }
        float share[64][DIRECT_QUERIES];
        for (int m = 0; m < n_queries; m++) {
            const int n_padded = load(block, m, x);
            for (int i = 0; i < n_padded; i += QV_WIDTH) {
                v_store(x + i, v_exp(v_sub(v_load(x + i), v_set1(log_sum[m]))));
            }
            for (int t = 0; t < n_tiles; t++) {
                share[t][m] = 0.0f;
                for (int i = t * SKIP_ROWS; i < min_i((t + 1) * SKIP_ROWS, n); i++) {
                    share[t][m] += x[i];
                }
            }
        }
        uint64_t kept = KEEP_ALL;
        for (int t = 0; t < n_tiles; t++) {
            n_seen += min_i(SKIP_ROWS, n - t * SKIP_ROWS);
            const float allowed = max_share * ((float) n_seen / (float) n_keys);
            bool        skip    = true;
            for (int m = 0; m < n_queries; m++) {
                skip = skip && skipped[m] + share[t][m] <= allowed; // NaN is kept
            }
            for (int m = 0; m < n_queries && skip; m++) {
                skipped[m] += share[t][m];
            }
            kept &= skip ? ~((uint64_t) 1 << t) : KEEP_ALL;
        }
        return kept;
    }
};

// The rows of a tile and the KV heads kvh0 .. kvh0 + n_heads - 1, which lie one after the other in each block. Units are
// (block, head): all heads of a block, then the next block, so that memory is read in long stretches.
struct task {
    int row0, n_rows, kvh0, n_heads;

    // where the result of query m of all heads' goes
    float * out(const qcache_attn_params & p, float * dst, int m) const {
        const int n_group = p.n_head / p.n_head_kv;
        const int r       = m % (n_rows * n_group);
        const int h       = (kvh0 + m / (n_rows * n_group)) * n_group + r % n_group;
        return dst + ((size_t) (row0 + r / n_group) * p.n_head + h) * p.head_dim;
    }
};

// Units first .. end-1 of the task; acc, max and sum are left in the scratch of that slot. whole: the result goes to dst.
template <class TK, class TV>
void attn_task(const qcache_attn_params & p, const float * q_own, const float * q_leader, float * dst, const scratch & s, const task & t,
               int first, int end, int slot, bool whole) {
    const qcache_attn_step & step      = *p.step;
    const qcache_attn_row *  rows      = step.rows + t.row0;
    const qcache_attn_seq &  seq       = step.seqs[rows[0].seq];
    const int                modality  = rows[0].modality;
    const int                n_group   = p.n_head / p.n_head_kv;
    const int                n_queries = t.n_rows * n_group; // of a head: query m is row m / n_group, head h0 + m % n_group
    const int                head_dim  = p.head_dim;
    const int                dims      = (int) qcache_attn_pad(head_dim);
    const int                stride    = (int) qcache_attn_pad(p.n_block_tokens); // of keys
    const bool               direct    = n_queries <= DIRECT_QUERIES;

    int pos_max = 0;
    for (int r = 0; r < t.n_rows; r++) {
        pos_max = max_i(pos_max, rows[r].pos);
    }
    // query m of KV head kvh by source; the head's group lies together
    const auto query = [&](int source, int kvh, int m) {
        const int    r = m / n_group;
        const size_t i = source == QCACHE_Q_LEADER ? (size_t) (t.row0 + r) : (size_t) rows[r].q_own;
        return (source == QCACHE_Q_LEADER ? q_leader : q_own) + (i * p.n_head + kvh * n_group + m % n_group) * head_dim;
    };
    for (int m = 0; m < t.n_heads * n_queries; m++) {
        s.max[slot][m] = -__builtin_inff();
        s.sum[slot][m] = 0.0f;
    }
    for (int i = 0; i < t.n_heads * n_queries * dims; i++) {
        s.acc[slot][i] = 0.0f;
    }
    float * queries[2]; // of all heads, filled at first use
    queries[QCACHE_Q_OWN] = queries[QCACHE_Q_LEADER] = nullptr;
    const auto pack = [&](int source) {
        queries[source] = s.queries + source * t.n_heads * n_queries * dims;
        for (int m = 0; m < t.n_heads * n_queries; m++) {
            const float * q = query(source, t.kvh0 + m / n_queries, m % n_queries);
            for (int d = 0; d < dims; d++) {
                queries[source][m * dims + d] = d < head_dim ? q[d] : 0.0f;
            }
        }
    };

    // of query m, which sees n_row keys of the block
    const auto bias_of = [&](const qcache_attn_block & b, int kvh, int m) {
        const bool biased = p.vis_bias && modality == QCACHE_MODALITY_TEXT && b.modality == QCACHE_MODALITY_VISUAL;
        return biased ? p.vis_bias[kvh * n_group + m % n_group] : 0.0f;
    };
    const auto scores_of = [&](const qcache_attn_block & b, int kvh, int m) {
        return step.scores + qcache_score_index(step, p.n_head, t.row0 + m / n_group, kvh * n_group + m % n_group, b);
    };
    const auto n_seen_of = [&](const qcache_attn_block & b, int m) { return max_i(0, min_i(b.n, rows[m / n_group].pos - b.first + 1)); };

    const auto reads_scores = [&](const qcache_attn_block & b) {
        return p.score_op == QCACHE_SCORE_READ && p.q_source[modality][b.modality] == QCACHE_Q_LEADER;
    };
    const auto keys_of = [&](const qcache_attn_block & b, int kvh) {
        return b.data + p.k_offset[modality][b.modality] + (size_t) kvh * p.n_block_tokens * TK::row_bytes(head_dim);
    };
    const auto values_of = [&](const qcache_attn_block & b, int kvh) {
        return b.data + p.v_offset[b.modality] + (size_t) kvh * p.n_block_tokens * TV::row_bytes(head_dim);
    };

    // of a single head
    skipping   skip;
    const auto load_scores = [&](const qcache_attn_block & b, int m, float * x) {
        const int     n_row    = n_seen_of(b, m);
        const int     n_padded = round_up(min_i(b.n, pos_max - b.first + 1), QV_WIDTH);
        const float   bias     = bias_of(b, t.kvh0, m);
        const float * scores   = scores_of(b, t.kvh0, m);
        for (int i = 0; i < n_padded; i++) {
            x[i] = i < n_row ? scores[i] + bias : -__builtin_inff();
        }
        return n_padded;
    };
    const auto keep_of = [&](const qcache_attn_block & b) {
        return skip.max_share > 0.0f && reads_scores(b) ? skip.keep(b, n_queries, min_i(b.n, pos_max - b.first + 1), s.keys, load_scores) : KEEP_ALL;
    };
    if (skips(p) && direct) {
        skip.max_share = p.v_skip;
        skip.start(seq, pos_max, n_queries, s.keys, reads_scores, load_scores);
    }
    uint64_t keep = keep_of(seq.blocks[first / t.n_heads]);

    for (int ib = first / t.n_heads; ib * t.n_heads < end; ib++) {
        const qcache_attn_block & block  = seq.blocks[ib];
        const int                 source = p.q_source[modality][block.modality];
        const bool                read   = reads_scores(block);
        const int                 n      = min_i(block.n, pos_max - block.first + 1); // keys seen by any row
        const int                 h0     = max_i(first - ib * t.n_heads, 0);          // heads h0 .. h1 - 1 of the task
        const int                 h1     = min_i(end - ib * t.n_heads, t.n_heads);

        // logits
        if (!read && direct && queries[source] == nullptr) {
            pack(source);
        }
        for (int h = h0; h < h1 && !read; h++) {
            const uint8_t * k     = keys_of(block, t.kvh0 + h);
            const ahead     fetch = { h + 1 < h1 ? keys_of(block, t.kvh0 + h + 1) : values_of(block, t.kvh0 + h0) };
            if (direct) {
                qk_direct<TK>(k, n, queries[source] + h * n_queries * dims, n_queries, dims, head_dim, s.logits + h * n_queries * stride, stride,
                              fetch);
            } else {
                const int n_columns = round_up(n, 32);
                rows_to_float<TK>(k, n, head_dim, s.values, dims, fetch);
                for (int i = n * dims; i < n_columns * dims; i++) {
                    s.values[i] = 0.0f;
                }
                for (int i = 0; i < n_columns; i += 8) {
                    for (int d = 0; d < head_dim; d += 8) {
                        transpose_8x8(s.values + i * dims + d, dims, s.keys + d * stride + i, stride);
                    }
                }
                gemm<false>(n_queries, [&](int m) { return query(source, t.kvh0 + h, m); }, s.keys, stride, head_dim, s.logits, stride, n_columns);
            }
        }

        // the next block
        const bool                last      = (ib + 1) * t.n_heads >= end;
        const qcache_attn_block & next      = seq.blocks[last ? ib : ib + 1];
        const uint64_t            next_keep = last ? KEEP_ALL : keep_of(next);

        for (int h = h0; h < h1; h++) {
            const int kvh    = t.kvh0 + h;
            float *   logits = s.logits + h * n_queries * stride;
            float *   acc    = s.acc[slot] + h * n_queries * dims;

            // softmax
            for (int m = 0; m < n_queries; m++) {
                const int n_row  = n_seen_of(block, m);
                float *   x      = logits + m * stride;
                float *   scores = p.score_op != QCACHE_SCORE_NONE ? scores_of(block, kvh, m) : nullptr;
                if (read) {
                    for (int i = 0; i < n_row; i++) {
                        x[i] = scores[i];
                    }
                } else {
                    finish_logits(x, n_row, p.scale);
                    if (p.score_op == QCACHE_SCORE_WRITE) {
                        for (int i = 0; i < n_row; i++) {
                            scores[i] = x[i];
                        }
                    }
                }
                const int   i = h * n_queries + m;
                const float c = update_softmax(x, n_row, n, bias_of(block, kvh, m), s.max[slot][i], s.sum[slot][i]);
                if (c != 1.0f) {
                    scale_row(acc + m * dims, dims, c);
                }
            }

            // values
            const uint8_t * v = values_of(block, kvh);
            ahead           fetch{ nullptr };
            if (h + 1 < h1) {
                fetch.next = values_of(block, kvh + 1);
            } else if (!last) {
                fetch = { reads_scores(next) ? values_of(next, t.kvh0) : keys_of(next, t.kvh0), next_keep, TV::row_bytes(head_dim) };
            }
            if (skip.max_share > 0.0f && read) {
                const size_t row_bytes = TV::row_bytes(head_dim);
                for (int i = 0; i < n; i += SKIP_ROWS) {
                    const int n_tile = min_i(SKIP_ROWS, n - i);
                    if (keeps(keep, i / SKIP_ROWS)) {
                        pv_direct<TV>(v + i * row_bytes, n_tile, logits + i, n_queries, stride, head_dim, acc, dims, fetch.from(i * row_bytes));
                    } else {
                        fetch.from(i * row_bytes)(0, n_tile * row_bytes);
                        s.thread->v_rows_skipped += n_tile;
                    }
                }
                s.thread->v_rows += n;
            } else if (direct) {
                pv_direct<TV>(v, n, logits, n_queries, stride, head_dim, acc, dims, fetch);
            } else {
                rows_to_float<TV>(v, n, head_dim, s.values, dims, fetch);
                gemm<true>(n_queries, [&](int m) { return logits + m * stride; }, s.values, dims, n, acc, dims, dims);
            }
        }
        keep = next_keep;
    }

    for (int m = 0; whole && m < t.n_heads * n_queries; m++) {
        float *       out = t.out(p, dst, m);
        const float   c   = s.sum[slot][m] == 0.0f ? 0.0f : 1.0f / s.sum[slot][m]; // 0: a row that sees no key
        const float * acc = s.acc[slot] + m * dims;
        for (int d = 0; d < head_dim; d++) {
            out[d] = acc[d] * c;
        }
    }
}

// rows row0 .. of one tile; returns the row after them
inline int tile_end(const qcache_attn_step & step, int row0, int tile_rows) {
    int row = row0 + 1;
    while (row < step.n_rows && row < row0 + tile_rows && step.rows[row].seq == step.rows[row0].seq &&
           step.rows[row].modality == step.rows[row0].modality) {
        row++;
    }
    return row;
}

// blocks that any of the rows sees
inline int n_blocks_of(const qcache_attn_step & step, int row0, int row1) {
    int n = 0;
    for (int row = row0; row < row1; row++) {
        n = max_i(n, step.rows[row].block + 1);
    }
    return n;
}

// The units of all tasks, one task after the other, in equal shares: where each thread's begins.
struct shares {
    int64_t n_units;
    int     nth;
    int64_t begin(int ith) const { return n_units * ith / nth; }
    bool    none(int ith) const { return begin(ith) == begin(ith + 1); }
    int     of(int64_t unit) const { // the thread that has it
        int ith = (int) (unit * nth / n_units);
        while (begin(ith + 1) <= unit) {
            ith++;
        }
        return ith;
    }
    int slot(int ith, int64_t first) const { return begin(ith) >= first ? 0 : 1; } // for its piece of the task whose first unit that is
};

// Tells that a piece of the task of units first .. end-1 is done; the last to tell merges them all.
inline void finish_piece(const qcache_attn_params & p, float * dst, uint8_t * wdata, const shares & split, int64_t first, int64_t end, const task & t) {
    const int first_thread = split.of(first);
    const int last_thread  = split.of(end - 1);
    int       n_pieces     = 0;
    for (int ith = first_thread; ith <= last_thread; ith++) {
        n_pieces += !split.none(ith);
    }
    int * n_arrived = &scratch_of(p, wdata, first_thread).thread->n_arrived;
    if (__atomic_add_fetch(n_arrived, 1, __ATOMIC_ACQ_REL) < n_pieces) {
        return;
    }
    __atomic_store_n(n_arrived, 0, __ATOMIC_RELAXED); // for the next layer

    const int n_queries = t.n_heads * t.n_rows * (p.n_head / p.n_head_kv);
    const int dims      = (int) qcache_attn_pad(p.head_dim);
    for (int m = 0; m < n_queries; m++) {
        float * out = t.out(p, dst, m);
        float   max = -__builtin_inff(), sum = 0.0f;
        for (int ith = first_thread; ith <= last_thread; ith++) {
            const float x = split.none(ith) ? max : scratch_of(p, wdata, ith).max[split.slot(ith, first)][m];
            max           = x > max ? x : max;
        }
        for (int d = 0; d < p.head_dim; d++) {
            out[d] = 0.0f;
        }
        for (int ith = first_thread; ith <= last_thread; ith++) {
            const scratch s    = scratch_of(p, wdata, ith);
            const int     slot = split.slot(ith, first);
            if (split.none(ith) || s.max[slot][m] == -__builtin_inff()) {
                continue; // no key is seen there
            }
            float e[QV_WIDTH];
            v_store(e, v_exp(v_set1(s.max[slot][m] - max)));
            sum += e[0] * s.sum[slot][m];
            const float * acc = s.acc[slot] + m * dims;
            for (int d = 0; d < p.head_dim; d++) {
                out[d] += e[0] * acc[d];
            }
        }
        for (int d = 0; d < p.head_dim && sum != 0.0f; d++) {
            out[d] /= sum;
        }
    }
}

template <class TK, class TV>
void attn(const qcache_attn_params & p, const float * q_own, const float * q_leader, float * dst, uint8_t * wdata, int ith, int nth) {
    const qcache_attn_step & step      = *p.step;
    const int                n_group   = p.n_head / p.n_head_kv;
    const int                tile_rows = max_i(1, QCACHE_ATTN_TILE_QUERIES / n_group);
    const scratch            s         = scratch_of(p, wdata, ith);

    shares split   = { 0, nth };
    int    n_tiles = 0;
    bool   direct  = true;
    for (int row0 = 0, row1; row0 < step.n_rows; row0 = row1, n_tiles++) {
        row1   = tile_end(step, row0, tile_rows);
        direct = direct && (row1 - row0) * n_group <= DIRECT_QUERIES;
        split.n_units += (int64_t) n_blocks_of(step, row0, row1) * p.n_head_kv;
    }
    const int64_t mine = split.begin(ith), others = split.begin(ith + 1);

    // heads of a task: all, so that it reads the longest stretches, unless it would be cut into too many pieces
    const int n_groups = (nth + n_tiles * MOST_PIECES - 1) / (n_tiles * MOST_PIECES);
    const int together = direct && !skips(p) ? (p.n_head_kv + n_groups - 1) / n_groups : 1;

    int     index = 0;
    int64_t unit  = 0;
    for (int row0 = 0, row1; row0 < step.n_rows; row0 = row1) {
        row1               = tile_end(step, row0, tile_rows);
        const int n_blocks = n_blocks_of(step, row0, row1);
        for (int kvh = 0, n_units; kvh < p.n_head_kv; kvh += together, index++, unit += n_units) {
            const task t = { row0, row1 - row0, kvh, min_i(together, p.n_head_kv - kvh) };
            n_units      = n_blocks * t.n_heads;
            if (!direct) {
                if (index % nth == ith) {
                    attn_task<TK, TV>(p, q_own, q_leader, dst, s, t, 0, n_units, 0, true);
                }
                continue;
            }
            const int first = (int) (mine > unit ? mine - unit : 0);
            const int end   = others < unit + n_units ? (int) (others - unit) : n_units;
            if (first >= end) {
                continue;
            }
            const bool whole = first == 0 && end == n_units;
            attn_task<TK, TV>(p, q_own, q_leader, dst, s, t, first, end, split.slot(ith, unit), whole);
            if (!whole) {
                finish_piece(p, dst, wdata, split, unit, unit + n_units, t);
            }
        }
    }
}

template <class TK>
void attn_any_v(const qcache_attn_params & p, const float * q_own, const float * q_leader, float * dst, uint8_t * wdata, int ith, int nth) {
    const auto fn = p.type_v == QCACHE_TYPE_F16 ? attn<TK, kv_f16> : p.type_v == QCACHE_TYPE_Q8_0 ? attn<TK, kv_q8_0> : attn<TK, kv_q4_0>;
    fn(p, q_own, q_leader, dst, wdata, ith, nth);
}

void attn_any(const qcache_attn_params & p, const float * q_own, const float * q_leader, float * dst, uint8_t * wdata, int ith, int nth) {
    const auto fn = p.type_k == QCACHE_TYPE_F16 ? attn_any_v<kv_f16> : p.type_k == QCACHE_TYPE_Q8_0 ? attn_any_v<kv_q8_0> : attn_any_v<kv_q4_0>;
    fn(p, q_own, q_leader, dst, wdata, ith, nth);
}

} // namespace

const qcache_attn_kernel * QCACHE_ATTN_KERNEL() {
    static const qcache_attn_kernel found = { QCACHE_ATTN_NAME, attn_any };
    return &found;
}
