// qcache-op.cpp: the lazy-attention operation as ggml nodes: shapes, checks, dispatch

#include "qcache-op.h"

#include "qcache-impl.h"

#include "ggml.h"

#include <algorithm>
#include <cstring>

static constexpr int32_t HEAD_DIM_MAX = 256;

size_t qcache_kv_row_bytes(int32_t type, int32_t head_dim) {
    const int64_t n_group = ggml_blck_size((ggml_type) type);
    return ggml_row_size((ggml_type) type, (head_dim + n_group - 1) / n_group * n_group);
}

bool qcache_kv_type_supported(int32_t type, int32_t head_dim) {
    return (type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0) && head_dim > 0 && head_dim <= HEAD_DIM_MAX && head_dim % 8 == 0;
}

//
// checks
//

static bool check_dims(const char * op, int32_t type_k, int32_t type_v, int32_t head_dim, int32_t n_head_kv,
                       int32_t n_block_tokens, const qcache_attn_step * step) {
    if (!qcache_kv_type_supported(type_k, head_dim) || !qcache_kv_type_supported(type_v, head_dim)) {
        qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: K type %d, V type %d with head_dim %d (f16 = %d, q8_0 = %d and q4_0 = %d, multiples of 8 up to %d)",
                    op, type_k, type_v, head_dim, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, HEAD_DIM_MAX);
        return false;
    }
    if (n_head_kv < 1 || n_block_tokens < 1 || n_block_tokens > 4096) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "%s: n_head_kv %d, n_block_tokens %d", op, n_head_kv, n_block_tokens);
        return false;
    }
    if (step == nullptr || step->n_rows < 1 || step->rows == nullptr || step->n_seqs < 1 || step->seqs == nullptr) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "%s: a step needs rows and sequences, it has %d and %d", op,
                    step ? step->n_rows : 0, step ? step->n_seqs : 0);
        return false;
    }
    for (int32_t ir = 0; ir < step->n_rows; ir++) {
        const qcache_attn_row & row = step->rows[ir];
        if (row.seq < 0 || row.seq >= step->n_seqs || (row.modality & ~1) != 0 || row.block < 0 ||
            row.block >= step->seqs[row.seq].n_blocks) {
            qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "%s: row %d: sequence %d of %d, block %d, modality %d", op, ir, row.seq,
                        step->n_seqs, row.block, row.modality);
            return false;
        }
        const qcache_attn_block & block = step->seqs[row.seq].blocks[row.block];
        if (row.pos < block.first || row.pos - block.first >= block.n || block.n > n_block_tokens || block.modality != row.modality) {
            qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT,
                        "%s: row %d: position %d, modality %d is not in block %d: positions %d..%d, modality %d, %d tokens at most", op, ir,
                        row.pos, row.modality, row.block, block.first, block.first + block.n - 1, block.modality, n_block_tokens);
            return false;
        }
    }
    return true;
}

static bool check_tensor(const char * op, const char * name, const ggml_tensor * t, int64_t ne0, int64_t ne1, int64_t ne2) {
    if (t->type != GGML_TYPE_F32 || t->ne[0] != ne0 || t->ne[1] != ne1 || t->ne[2] != ne2 || t->ne[3] != 1 || !ggml_is_contiguous(t)) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT,
                    "%s: %s is %s [%lld, %lld, %lld, %lld]%s, expected contiguous f32 [%lld, %lld, %lld]", op, name, ggml_type_name(t->type),
                    (long long) t->ne[0], (long long) t->ne[1], (long long) t->ne[2], (long long) t->ne[3],
                    ggml_is_contiguous(t) ? "" : " not contiguous", (long long) ne0, (long long) ne1, (long long) ne2);
        return false;
    }
    return true;
}

//
// append
//

static void write_row(int32_t type, const float * x, uint8_t * dst, int32_t head_dim) {
    if (type == GGML_TYPE_F16) {
        ggml_fp32_to_fp16_row(x, (ggml_fp16_t *) dst, head_dim);
        return;
    }
    const ggml_from_float_t quantize = ggml_get_type_traits((ggml_type) type)->from_float_ref;
    const int32_t           n_full   = head_dim / 32 * 32;
    if (n_full > 0) {
        quantize(x, dst, n_full);
    }
    if (n_full < head_dim) {
        float group[32] = {};
        memcpy(group, x + n_full, (head_dim - n_full) * sizeof(float));
        quantize(group, dst + ggml_row_size((ggml_type) type, n_full), 32);
    }
}

// one task is one KV head of one row
void qcache_op_append_cpu(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const qcache_append_params & p    = *(const qcache_append_params *) userdata;
    const qcache_attn_step &     step = *p.step;

    const float * v = (const float *) dst->src[0]->data;
    const float * k = dst->src[1] ? (const float *) dst->src[1]->data : nullptr;

    const size_t k_row_bytes = qcache_kv_row_bytes(p.type_k, p.head_dim);
    const size_t v_row_bytes = qcache_kv_row_bytes(p.type_v, p.head_dim);

    int32_t task = 0;
    int32_t ik   = 0; // row in k
    for (int32_t ir = 0; ir < step.n_rows; ir++) {
        const qcache_attn_row &   row    = step.rows[ir];
        const qcache_attn_block & block  = step.seqs[row.seq].blocks[row.block];
        const bool                with_k = p.k_offset[row.modality] != SIZE_MAX;
        for (int32_t h = 0; h < p.n_head_kv; h++, task++) {
            if (task % nth != ith) {
                continue;
            }
            const size_t slot = (size_t) h * p.n_block_tokens + (row.pos - block.first);
            write_row(p.type_v, v + ((size_t) ir * p.n_head_kv + h) * p.head_dim,
                      block.data + p.v_offset[row.modality] + slot * v_row_bytes, p.head_dim);
            if (with_k) {
                write_row(p.type_k, k + ((size_t) ik * p.n_head_kv + h) * p.head_dim,
                          block.data + p.k_offset[row.modality] + slot * k_row_bytes, p.head_dim);
            }
        }
        ik += with_k;
    }
}

ggml_tensor * qcache_op_append(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, const qcache_append_params * params) {
    const qcache_append_params & p = *params;
    if (!check_dims("append", p.type_k, p.type_v, p.head_dim, p.n_head_kv, p.n_block_tokens, p.step)) {
        return nullptr;
    }
    int32_t n_k = 0;
    for (int32_t ir = 0; ir < p.step->n_rows; ir++) {
        n_k += p.k_offset[p.step->rows[ir].modality] != SIZE_MAX;
    }
    if (v == nullptr || (k == nullptr) != (n_k == 0)) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "append: %s, but %d of %d rows keep K", v == nullptr ? "no V" : k ? "K given" : "no K",
                    n_k, p.step->n_rows);
        return nullptr;
    }
    if (!check_tensor("append", "v", v, p.head_dim, p.n_head_kv, p.step->n_rows) ||
        (k && !check_tensor("append", "k", k, p.head_dim, p.n_head_kv, n_k))) {
        return nullptr;
    }
    // the result carries nothing but the order of execution
    ggml_tensor * args[] = { v, k };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 2, qcache_op_append_cpu, GGML_N_TASKS_MAX, (void *) params);
}

//
// attention
//

int32_t qcache_n_score_keys(const qcache_attn_step & step) {
    int32_t n_keys = 0;
    for (int32_t ir = 0; ir < step.n_rows; ir++) {
        const qcache_attn_block & block = step.seqs[step.rows[ir].seq].blocks[step.rows[ir].block];
        n_keys                          = std::max(n_keys, block.first + block.n);
    }
    return n_keys;
}

void qcache_op_attn_cpu(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const qcache_attn_node & node     = *(const qcache_attn_node *) userdata;
    const float *            q_own    = dst->src[0] ? (const float *) dst->src[0]->data : nullptr;
    const float *            q_leader = dst->src[1] ? (const float *) dst->src[1]->data : nullptr;
    node.kernel->fn(node.params, q_own, q_leader, (float *) dst->data, node.wdata, ith, nth);
}

ggml_tensor * qcache_op_attn(ggml_context * ctx, ggml_tensor * q_own, ggml_tensor * q_leader, ggml_tensor * after,
                             const qcache_attn_node * node) {
    const qcache_attn_params & p = node->params;
    if (!check_dims("attention", p.type_k, p.type_v, p.head_dim, p.n_head_kv, p.n_block_tokens, p.step)) {
        return nullptr;
    }
    const qcache_attn_step & step = *p.step;
    if (p.n_head < 1 || p.n_head % p.n_head_kv != 0) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "attention: %d query heads do not divide into %d KV heads", p.n_head, p.n_head_kv);
        return nullptr;
    }
    if (node->kernel == nullptr || node->wdata == nullptr) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "attention: no %s", node->kernel ? "work memory" : "kernel");
        return nullptr;
    }

    // which Q tensors do the rows need, how many own rows?
    int32_t n_own       = 0;
    bool    needs_own    = false;
    bool    needs_leader = false;
    for (int32_t ir = 0; ir < step.n_rows; ir++) {
        const qcache_attn_row & row = step.rows[ir];
        for (int32_t m = 0; m < 2; m++) {
            if (p.q_source[row.modality][m] == QCACHE_Q_LEADER) {
                needs_leader = needs_leader || p.score_op != QCACHE_SCORE_READ;
            } else {
                needs_own = true;
                n_own     = row.q_own + 1 > n_own ? row.q_own + 1 : n_own;
                if (row.q_own < 0) {
                    qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "attention: row %d (modality %d) needs a query of its own and has none",
                                ir, row.modality);
                    return nullptr;
                }
            }
        }
    }
    if ((needs_own && q_own == nullptr) || (needs_leader && q_leader == nullptr)) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "attention: rows need the %s query and there is none",
                    needs_own && q_own == nullptr ? "own" : "leader's");
        return nullptr;
    }
    if (q_own && !check_tensor("attention", "q_own", q_own, p.head_dim, p.n_head, q_own->ne[2])) {
        return nullptr;
    }
    if (q_own && q_own->ne[2] < n_own) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "attention: q_own has %lld rows, the step refers to %d", (long long) q_own->ne[2], n_own);
        return nullptr;
    }
    if (q_leader && !check_tensor("attention", "q_leader", q_leader, p.head_dim, p.n_head, step.n_rows)) {
        return nullptr;
    }
    if (p.score_op != QCACHE_SCORE_NONE && (step.scores == nullptr || step.n_score_keys < qcache_n_score_keys(step))) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "attention: score cache of %d keys a row, %d needed", step.scores ? step.n_score_keys : 0,
                    qcache_n_score_keys(step));
        return nullptr;
    }

    ggml_tensor * args[] = { q_own, q_leader, after };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, (int64_t) p.head_dim * p.n_head, step.n_rows, 1, 1, args, 3, qcache_op_attn_cpu,
                          GGML_N_TASKS_MAX, (void *) node);
}
