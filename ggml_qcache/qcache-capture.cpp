// qcache-capture.cpp: what the layers computed for chosen rows
//
// Attention kernels never hold a row of probabilities (online softmax), so its logits are computed again here, one row
// and KV head at a time, for the rows that are captured alone.

#include "qcache-capture.h"

#include "cpu/attn-rows.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>

static int32_t index_of(enum qcache_capture kind) {
    return kind == QCACHE_CAPTURE_SCORES ? 0 : kind == QCACHE_CAPTURE_PROBS ? 1 : kind == QCACHE_CAPTURE_ATTN ? 2 : 3;
}

qcache_capture_store::qcache_capture_store(int32_t what, int32_t n_layer) : what(what), n_layer(n_layer) {}

void qcache_capture_store::begin_batch(int32_t n) {
    n_out = n;
    for (int32_t i = 0; i < n_kinds; i++) {
        values[i].clear();
        values[i].resize((what >> i & 1) != 0 ? (size_t) n_layer * n : 0);
    }
}

void qcache_capture_store::begin_step() {
    step.clear();
}

void qcache_capture_store::add(enum qcache_capture kind, int32_t il, ggml_tensor * x) {
    step.push_back({ kind, il, x });
}

void qcache_capture_store::store(const std::vector<int32_t> & out, const std::vector<int32_t> & n_keys) {
    for (const auto & a : step) {
        const bool    by_key    = a.kind == QCACHE_CAPTURE_SCORES || a.kind == QCACHE_CAPTURE_PROBS;
        const int64_t n_columns = by_key ? a.tensor->ne[0] : ggml_nelements(a.tensor) / (int64_t) out.size();
        const int64_t n_head    = by_key ? a.tensor->ne[1] : 1;
        for (size_t r = 0; r < out.size(); r++) {
            auto &       to     = values[index_of(a.kind)][(size_t) a.il * n_out + out[r]];
            const size_t n_kept = by_key ? n_keys[r] : n_columns;
            to.resize(n_kept * n_head);
            for (int64_t h = 0; h < n_head; h++) {
                ggml_backend_tensor_get(a.tensor, to.data() + h * n_kept, (r * n_head + h) * n_columns * sizeof(float), n_kept * sizeof(float));
            }
        }
    }
}

const std::vector<float> * qcache_capture_store::get(enum qcache_capture kind, int32_t il, int32_t k) const {
    const size_t i = (size_t) il * n_out + k;
    const auto & v = values[index_of(kind)];
    return k < n_out && i < v.size() && !v[i].empty() ? &v[i] : nullptr;
}

// one row and the query heads of one KV head; to: [n_keys] of the first of them
static void row_scores(const qcache_attn_params & p, const float * q_own, const float * q_leader, int32_t ir, int32_t kvh, float * to,
                       int64_t n_keys) {
    const qcache_attn_row & row       = p.step->rows[ir];
    const qcache_attn_seq & seq       = p.step->seqs[row.seq];
    const int32_t           n_group   = p.n_head / p.n_head_kv;
    const size_t            row_bytes = qcache_kv_row_bytes(p.type_k, p.head_dim);
    float                   x[256]; // a K row

    std::fill(to, to + n_group * n_keys, -INFINITY);
    for (int32_t ib = 0; ib < seq.n_blocks && seq.blocks[ib].first <= row.pos; ib++) {
        const qcache_attn_block & block  = seq.blocks[ib];
        const bool                leader = p.q_source[row.modality][block.modality] == QCACHE_Q_LEADER;
        const float *             q      = leader ? q_leader + (size_t) ir * p.n_head * p.head_dim : q_own + (size_t) row.q_own * p.n_head * p.head_dim;
        const bool                biased = p.vis_bias && row.modality == QCACHE_MODALITY_TEXT && block.modality == QCACHE_MODALITY_VISUAL;
        const uint8_t *           k      = block.data + p.k_offset[row.modality][block.modality] + (size_t) kvh * p.n_block_tokens * row_bytes;
        for (int32_t i = 0; i < block.n && block.first + i <= row.pos; i++) {
            qcache_kv_row(p.type_k, k + i * row_bytes, row_bytes, x);
            for (int32_t g = 0; g < n_group; g++) {
                const int32_t h     = kvh * n_group + g;
                double        logit = 0.0;
                for (int32_t d = 0; d < p.head_dim; d++) {
                    logit += (double) q[(size_t) h * p.head_dim + d] * (double) x[d];
                }
                logit = qcache_clamp_logit(logit * p.scale);
                to[g * n_keys + block.first + i] = (float) qcache_clamp_logit(logit + (biased ? p.vis_bias[h] : 0.0f));
            }
        }
    }
}

static void op_scores_cpu(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto &               node     = *(const qcache_scores_node *) userdata;
    const qcache_attn_params & p        = node.params;
    const float *              q_own    = dst->src[0] ? (const float *) dst->src[0]->data : nullptr;
    const float *              q_leader = dst->src[1] ? (const float *) dst->src[1]->data : nullptr;
    const int64_t              n_keys   = dst->ne[0];
    for (int32_t task = ith; task < node.n_rows * p.n_head_kv; task += nth) {
        const int32_t r   = task / p.n_head_kv;
        const int32_t kvh = task % p.n_head_kv;
        float *       to  = (float *) dst->data + ((size_t) r * p.n_head + kvh * (p.n_head / p.n_head_kv)) * n_keys;
        row_scores(p, q_own, q_leader, node.rows[r], kvh, to, n_keys);
    }
}

ggml_tensor * qcache_capture_scores(ggml_context * ctx, ggml_tensor * q_own, ggml_tensor * q_leader, ggml_tensor * after,
                                    const qcache_scores_node * node) {
    int64_t n_keys = 0;
    for (int32_t r = 0; r < node->n_rows; r++) {
        n_keys = std::max<int64_t>(n_keys, node->params.step->rows[node->rows[r]].pos + 1);
    }
    ggml_tensor * args[] = { q_own, q_leader, after };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n_keys, node->params.n_head, node->n_rows, 1, args, 3, op_scores_cpu, GGML_N_TASKS_MAX,
                          (void *) node);
}
