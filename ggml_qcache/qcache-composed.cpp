// qcache-composed.cpp: lazy attention from stock ggml operations
//
// The keys of all sequences form columns. Where some pairs of a layer take their logits from its own Q and K and others
// from its leader's, a key has two columns, one per source; the mask leaves each row the one that counts and one softmax
// runs over both. So nothing is mixed by arithmetic that an infinite logit could turn into NaN.
// Cost grows with rows x keys of all sequences: this is for portability and for checking, not for speed.

#include "qcache-composed.h"

#include "qcache-impl.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

// Inputs of the layers that share q_source and shapes. The gather buffers serve one layer after the other.
struct composed_shape {
    qcache_q_source q_source[2][2];
    bool            needed[2][2]; // [source][key modality]: has columns
    int64_t         n_k_row;      // elements of a K row, padding included
    int64_t         n_v_row;
    int64_t         n_head_kv;
    int64_t         n_cols[2];    // by source
    ggml_tensor *   k[2];         // [n_k_row, n_cols, n_head_kv] f32, by source
    ggml_tensor *   v;            // [n_v_row, n_cols of both, n_head_kv] f32
    ggml_tensor *   mask;         // [n_cols of both, n_rows] f32, 0 or -inf
    ggml_tensor *   own_rows;     // [n_rows] i32: row in the own Q, 0 (masked) for a row that has none; made when needed
    ggml_tensor *   visual;       // [n_cols of both, n_rows] f32, 1 for a text row and a visual key; made when needed
};

struct composed_bias {
    ggml_tensor * tensor; // [1, 1, n_head]
    const float * data;
};

struct qcache_composed {
    const qcache_attn_step * step;
    int32_t                  n_block_tokens;
    bool                     has_rows[2]; // of a modality
    std::vector<int32_t>     n_seen;      // [n_seqs] keys that any row sees: those after it may not be written yet
    ggml_tensor *            slots = nullptr; // [n_rows] i64: of each row in its block; made when needed

    std::vector<std::unique_ptr<composed_shape>> shapes;
    std::vector<composed_bias>                   biases;
};

qcache_composed * qcache_composed_init(ggml_context * ctx, const qcache_attn_step * step, int32_t n_block_tokens) {
    (void) ctx; // inputs are made by the first layer that needs them
    auto * c          = new qcache_composed();
    c->step           = step;
    c->n_block_tokens = n_block_tokens;
    c->n_seen.resize(step->n_seqs);
    for (int32_t ir = 0; ir < step->n_rows; ir++) {
        const qcache_attn_row & row = step->rows[ir];
        c->has_rows[row.modality]   = true;
        c->n_seen[row.seq]          = std::max(c->n_seen[row.seq], row.pos + 1);
    }
    return c;
}

void qcache_composed_free(qcache_composed * c) {
    delete c;
}

// calls fn(first row, rows, block) for every run of rows that go to the same block
template <typename F> static void for_runs(const qcache_attn_step * step, F && fn) {
    for (int32_t ir = 0, n = 1; ir < step->n_rows; ir += n, n = 1) {
        const qcache_attn_row & row = step->rows[ir];
        while (ir + n < step->n_rows && step->rows[ir + n].seq == row.seq && step->rows[ir + n].block == row.block) {
            n++;
        }
        fn(ir, n, step->seqs[row.seq].blocks[row.block]);
    }
}

size_t qcache_composed_n_nodes(const qcache_attn_step * step) {
    size_t n_blocks = 0;
    for (int32_t is = 0; is < step->n_seqs; is++) {
        n_blocks += step->seqs[is].n_blocks;
    }
    size_t n_runs = 0;
    for_runs(step, [&](int32_t, int32_t, const qcache_attn_block &) { n_runs++; });
    // per block and source: tensor, view, view of the buffer and copy, for K and V; per run: tensor, two views, padding, copy
    // and node, likewise; the rest is a fixed number
    return 2 * 8 * n_blocks + 2 * 8 * n_runs + 48;
}

// calls fn(source, block, keys of it, first column, seq) for every block that has columns
template <typename F> static void for_columns(const qcache_composed * c, const composed_shape & shape, F && fn) {
    int64_t col = 0;
    for (int source = 0; source < 2; source++) {
        for (int32_t is = 0; is < c->step->n_seqs; is++) {
            for (int32_t ib = 0; ib < c->step->seqs[is].n_blocks; ib++) {
                const qcache_attn_block & block = c->step->seqs[is].blocks[ib];
                const int32_t             n     = std::min(block.n, c->n_seen[is] - block.first);
                if (n > 0 && shape.needed[source][block.modality]) {
                    fn(source, block, n, col, is);
                    col += n;
                }
            }
        }
    }
}

static int64_t n_row_elements(int32_t type, int32_t head_dim) {
    const int64_t n = ggml_blck_size((ggml_type) type);
    return (head_dim + n - 1) / n * n;
}

static composed_shape * get_shape(qcache_composed * c, ggml_context * ctx, const qcache_attn_params & p) {
    const int64_t n_k_row = n_row_elements(p.type_k, p.head_dim);
    const int64_t n_v_row = n_row_elements(p.type_v, p.head_dim);
    for (auto & shape : c->shapes) {
        if (memcmp(shape->q_source, p.q_source, sizeof(p.q_source)) == 0 && shape->n_k_row == n_k_row && shape->n_v_row == n_v_row &&
            shape->n_head_kv == p.n_head_kv) {
            return shape.get();
        }
    }
    c->shapes.emplace_back(new composed_shape());
    composed_shape & shape = *c->shapes.back();
    memcpy(shape.q_source, p.q_source, sizeof(p.q_source));
    shape.n_k_row   = n_k_row;
    shape.n_v_row   = n_v_row;
    shape.n_head_kv = p.n_head_kv;
    for (int rm = 0; rm < 2; rm++) {
        for (int km = 0; km < 2 && c->has_rows[rm]; km++) {
            shape.needed[p.q_source[rm][km]][km] = true;
        }
    }
    for_columns(c, shape, [&](int source, const qcache_attn_block &, int32_t n, int64_t, int32_t) { shape.n_cols[source] += n; });
    for (int source = 0; source < 2; source++) {
        if (shape.n_cols[source] > 0) {
            shape.k[source] = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_k_row, shape.n_cols[source], p.n_head_kv);
        }
    }
    const int64_t n_cols = shape.n_cols[0] + shape.n_cols[1];
    shape.v    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_v_row, n_cols, p.n_head_kv);
    shape.mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_cols, c->step->n_rows);
    ggml_set_input(shape.mask);
    return &shape;
}

// K or V of one layer in a block: [n_row, n_block_tokens, n_head_kv], in place
static ggml_tensor * block_rows(ggml_context * ctx, const qcache_attn_block & block, size_t offset, int32_t type, int64_t n_row, int32_t n_block_tokens,
                                int64_t n_head_kv) {
    if (block.buffer == nullptr) {
        qcache_fail(QCACHE_STATUS_INTERNAL, "composed attention: the block at position %d lies in no buffer", block.first);
        return nullptr;
    }
    ggml_tensor * rows = ggml_new_tensor_3d(ctx, (ggml_type) type, n_row, n_block_tokens, n_head_kv);
    // not ggml_backend_tensor_alloc: CUDA pads quantised tensors with zeros there, into what follows in the block
    rows->buffer = block.buffer;
    rows->data   = block.data + offset;
    return rows;
}

// rows first .. first+n-1 of x, [head_dim, n_head_kv, ...] f32, to their slots of a block
static ggml_tensor * store(qcache_composed * c, ggml_context * ctx, const qcache_append_params & p, const qcache_attn_block & block, size_t offset,
                           int32_t type, ggml_tensor * x, int32_t first, int32_t n, int32_t first_slot) {
    const int64_t n_row = n_row_elements(type, p.head_dim);
    ggml_tensor * rows  = block_rows(ctx, block, offset, type, n_row, p.n_block_tokens, p.n_head_kv);
    if (rows == nullptr) {
        return nullptr;
    }
    ggml_tensor * src = ggml_view_3d(ctx, x, p.head_dim, n, p.n_head_kv, x->nb[2], x->nb[1], first * x->nb[2]);
    if (n_row != p.head_dim) {
        src = ggml_pad(ctx, ggml_cont(ctx, src), (int) (n_row - p.head_dim), 0, 0, 0);
    }
    ggml_tensor * slots = ggml_view_1d(ctx, c->slots, n, first_slot * c->slots->nb[0]);
    return ggml_set_rows(ctx, rows, src, slots);
}

ggml_tensor * qcache_composed_append(qcache_composed * c, ggml_context * ctx, ggml_cgraph * graph, ggml_tensor * k, ggml_tensor * v,
                                     const qcache_append_params * params) {
    const qcache_append_params & p = *params;
    if (c->slots == nullptr) {
        c->slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, c->step->n_rows);
        ggml_set_input(c->slots);
    }
    bool          ok   = true;
    int32_t       n_k  = 0; // rows with K so far
    ggml_tensor * last = nullptr;
    for_runs(c->step, [&](int32_t ir, int32_t n, const qcache_attn_block & block) {
        if (p.k_offset[block.modality] != SIZE_MAX) {
            last = ok ? store(c, ctx, p, block, p.k_offset[block.modality], p.type_k, k, n_k, n, ir) : nullptr;
            ok   = last != nullptr;
            n_k += n;
            if (ok) {
                ggml_build_forward_expand(graph, last);
            }
        }
        last = ok ? store(c, ctx, p, block, p.v_offset[block.modality], p.type_v, v, ir, n, ir) : nullptr;
        ok   = last != nullptr;
        if (ok) {
            ggml_build_forward_expand(graph, last);
        }
    });
    return last;
}

// copies the rows of one layer in a block, f32 or converted to it, to columns of a gather buffer
static bool gather(ggml_context * ctx, ggml_cgraph * graph, const qcache_attn_block & block, int32_t n, size_t offset, int32_t type,
                   int32_t n_block_tokens, ggml_tensor * dst, int64_t col) {
    ggml_tensor * rows = block_rows(ctx, block, offset, type, dst->ne[0], n_block_tokens, dst->ne[2]);
    if (rows == nullptr) {
        return false;
    }
    ggml_tensor * src  = ggml_view_3d(ctx, rows, rows->ne[0], n, rows->ne[2], rows->nb[1], rows->nb[2], 0);
    ggml_tensor * cols = ggml_view_3d(ctx, dst, dst->ne[0], n, dst->ne[2], dst->nb[1], dst->nb[2], col * dst->nb[1]);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, src, cols));
    return true;
}

// [head_dim, n_head, n_rows] -> [head_dim, n_rows, n_head]
static ggml_tensor * by_head(ggml_context * ctx, ggml_tensor * q) {
    return ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));
}

ggml_tensor * qcache_composed_attn(qcache_composed * c, ggml_context * ctx, ggml_cgraph * graph, ggml_tensor * q_own,
                                   ggml_tensor * q_leader, ggml_tensor * after, const qcache_attn_params * params) {
    const qcache_attn_params & p      = *params;
    const int64_t              n_rows = c->step->n_rows;
    composed_shape &           shape  = *get_shape(c, ctx, p);

    if (after) {
        ggml_build_forward_expand(graph, after);
    }

    // K and V of every column
    bool ok = true;
    for_columns(c, shape, [&](int source, const qcache_attn_block & block, int32_t n, int64_t col, int32_t) {
        const int     km       = block.modality;
        const int     rm       = c->has_rows[0] && p.q_source[0][km] == source ? 0 : 1;
        const size_t  k_offset = p.k_offset[rm][km];
        const int64_t k_col    = source == QCACHE_Q_LEADER ? col - shape.n_cols[QCACHE_Q_OWN] : col;
        ok = ok && gather(ctx, graph, block, n, k_offset, p.type_k, c->n_block_tokens, shape.k[source], k_col) &&
             gather(ctx, graph, block, n, p.v_offset[km], p.type_v, c->n_block_tokens, shape.v, col);
    });
    if (!ok) {
        return nullptr;
    }

    // logits: [n_cols of both, n_rows, n_head]
    ggml_tensor * logits = nullptr;
    for (int source = 0; source < 2; source++) {
        if (shape.n_cols[source] == 0) {
            continue;
        }
        ggml_tensor * q = source == QCACHE_Q_LEADER ? q_leader : q_own; // q: [head_dim, n_head, n_rows]
        if (q == nullptr) {
            qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "composed attention: rows need the %s query and there is none",
                        source == QCACHE_Q_LEADER ? "leader's" : "own");
            return nullptr;
        }
        if (source == QCACHE_Q_OWN) {
            if (shape.own_rows == nullptr) {
                shape.own_rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
                ggml_set_input(shape.own_rows);
            }
            q = ggml_get_rows(ctx, ggml_reshape_2d(ctx, q, (int64_t) p.head_dim * p.n_head, q->ne[2]), shape.own_rows);
            q = ggml_reshape_3d(ctx, q, p.head_dim, p.n_head, n_rows);
        }
        ggml_tensor * k = shape.k[source]; // k: [head_dim, n_cols, n_head_kv]
        if (k->ne[0] != p.head_dim) {
            k = ggml_cont(ctx, ggml_view_3d(ctx, k, p.head_dim, k->ne[1], k->ne[2], k->nb[1], k->nb[2], 0));
        }
        ggml_tensor * part = ggml_mul_mat(ctx, k, by_head(ctx, q));
        ggml_prec_set_acc(part, GGML_PREC_F32);
        logits = logits ? ggml_concat(ctx, logits, part, 0) : part;
    }

    ggml_tensor * mask = shape.mask;
    if (p.vis_bias) {
        // bias of (text row, visual key) pairs by head, added to the mask: it is not scaled
        if (shape.visual == nullptr) {
            shape.visual = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, mask->ne[0], n_rows);
            ggml_set_input(shape.visual);
        }
        ggml_tensor * bias = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, 1, p.n_head);
        ggml_set_input(bias);
        c->biases.push_back({ bias, p.vis_bias });
        bias = ggml_mul(ctx, ggml_repeat_4d(ctx, shape.visual, mask->ne[0], n_rows, p.n_head, 1), bias);
        mask = ggml_add(ctx, bias, mask);
    }
    ggml_tensor * probs = ggml_soft_max_ext(ctx, logits, mask, p.scale, 0.0f);

    // v: [n_cols, head_dim, n_head_kv]
    ggml_tensor * v = ggml_view_3d(ctx, shape.v, p.head_dim, shape.v->ne[1], shape.v->ne[2], shape.v->nb[1], shape.v->nb[2], 0);
    v               = ggml_cont(ctx, ggml_transpose(ctx, v));

    ggml_tensor * out = ggml_mul_mat(ctx, v, probs); // [head_dim, n_rows, n_head]
    ggml_prec_set_acc(out, GGML_PREC_F32);
    out = ggml_reshape_2d(ctx, ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3)), (int64_t) p.head_dim * p.n_head, n_rows);

    // before the next layer fills the gather buffers again
    ggml_build_forward_expand(graph, out);
    return out;
}

static void set(ggml_tensor * tensor, const void * data) {
    // one that no node uses has no memory
    if (tensor != nullptr && tensor->buffer != nullptr) {
        ggml_backend_tensor_set(tensor, data, 0, ggml_nbytes(tensor));
    }
}

void qcache_composed_set_inputs(const qcache_composed * c) {
    const int64_t n_rows = c->step->n_rows;

    std::vector<int64_t> slots;
    for (int64_t ir = 0; ir < n_rows && c->slots != nullptr; ir++) {
        const qcache_attn_row & row = c->step->rows[ir];
        slots.push_back(row.pos - c->step->seqs[row.seq].blocks[row.block].first);
    }
    set(c->slots, slots.data());

    for (const auto & shape : c->shapes) {
        std::vector<int32_t> own_rows;
        for (int64_t ir = 0; ir < n_rows; ir++) {
            const qcache_attn_row & row = c->step->rows[ir];
            const bool own = shape->q_source[row.modality][0] == QCACHE_Q_OWN || shape->q_source[row.modality][1] == QCACHE_Q_OWN;
            own_rows.push_back(own ? row.q_own : 0);
        }
        set(shape->own_rows, own_rows.data());

        const int64_t      n_cols = shape->mask->ne[0];
        std::vector<float> mask(n_cols * n_rows, -INFINITY);
        std::vector<float> visual(n_cols * n_rows, 0.0f);
        for_columns(c, *shape, [&](int source, const qcache_attn_block & block, int32_t n, int64_t col, int32_t is) {
            for (int64_t ir = 0; ir < n_rows; ir++) {
                const qcache_attn_row & row = c->step->rows[ir];
                if (row.seq != is || shape->q_source[row.modality][block.modality] != source) {
                    continue;
                }
                for (int32_t i = 0; i < n && block.first + i <= row.pos; i++) {
                    mask[ir * n_cols + col + i] = 0.0f;
                    visual[ir * n_cols + col + i] = row.modality == QCACHE_MODALITY_TEXT && block.modality == QCACHE_MODALITY_VISUAL;
                }
            }
        });
        set(shape->mask, mask.data());
        set(shape->visual, visual.data());
    }
    for (const composed_bias & bias : c->biases) {
        set(bias.tensor, bias.data);
    }
}
