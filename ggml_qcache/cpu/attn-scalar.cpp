// attn-scalar.cpp: lazy attention, the reference kernel. Flags: none.
//
// One query row and head at a time, one key at a time, in doubles; what the other kernels are measured against.

#include "qcache.h"
#include "../qcache-op.h"
#include "attn-rows.h"

#include <cmath>

static void attn_row_head(const qcache_attn_params & p, const float * q_own, const float * q_leader, float * dst,
                          int32_t ir, int32_t h) {
    const qcache_attn_step & step = *p.step;
    const qcache_attn_row &  row  = step.rows[ir];
    const qcache_attn_seq &  seq  = step.seqs[row.seq];

    const int32_t kvh         = h / (p.n_head / p.n_head_kv);
    const size_t  k_row_bytes = qcache_kv_row_bytes(p.type_k, p.head_dim);
    const size_t  v_row_bytes = qcache_kv_row_bytes(p.type_v, p.head_dim);

    // online softmax: acc and sum are relative to exp(max)
    double max      = -INFINITY;
    double sum      = 0.0;
    double acc[256] = {};
    float  x[256]; // a K or V row

    for (int32_t ib = 0; ib < seq.n_blocks && seq.blocks[ib].first <= row.pos; ib++) {
        const qcache_attn_block & block  = seq.blocks[ib];
        const qcache_q_source     source = p.q_source[row.modality][block.modality];
        const bool                read   = p.score_op == QCACHE_SCORE_READ && source == QCACHE_Q_LEADER;

        const float * q = nullptr;
        if (!read) {
            q = source == QCACHE_Q_LEADER ? q_leader + ((size_t) ir * p.n_head + h) * p.head_dim
                                          : q_own + ((size_t) row.q_own * p.n_head + h) * p.head_dim;
        }
        double bias = 0.0;
        if (p.vis_bias && row.modality == QCACHE_MODALITY_TEXT && block.modality == QCACHE_MODALITY_VISUAL) {
            bias = p.vis_bias[h];
        }
        const size_t    head_row = (size_t) kvh * p.n_block_tokens;
        const uint8_t * k        = read ? nullptr : block.data + p.k_offset[row.modality][block.modality] + head_row * k_row_bytes;
        const uint8_t * v        = block.data + p.v_offset[block.modality] + head_row * v_row_bytes;
        float *         scores   = p.score_op == QCACHE_SCORE_NONE ? nullptr : step.scores + qcache_score_index(step, p.n_head, ir, h, block);

        for (int32_t i = 0; i < block.n && block.first + i <= row.pos; i++) {
            double logit = 0.0;
            if (read) {
                logit = scores[i];
            } else {
                qcache_kv_row(p.type_k, k + i * k_row_bytes, k_row_bytes, x);
                for (int32_t d = 0; d < p.head_dim; d++) {
                    logit += (double) q[d] * (double) x[d];
                }
                logit = qcache_clamp_logit(logit * p.scale);
                if (p.score_op == QCACHE_SCORE_WRITE) {
                    scores[i] = (float) logit;
                }
            }
            logit = qcache_clamp_logit(logit + bias);

            if (logit > max || std::isnan(logit)) {
                const double c = exp(max - logit);
                sum *= c;
                for (int32_t d = 0; d < p.head_dim; d++) {
                    acc[d] *= c;
                }
                max = logit;
            }
            const double w = exp(logit - max);
            sum += w;
            qcache_kv_row(p.type_v, v + i * v_row_bytes, v_row_bytes, x);
            for (int32_t d = 0; d < p.head_dim; d++) {
                acc[d] += w * (double) x[d];
            }
        }
    }

    float * out = dst + ((size_t) ir * p.n_head + h) * p.head_dim;
    for (int32_t d = 0; d < p.head_dim; d++) {
        out[d] = sum == 0.0 ? 0.0f : (float) (acc[d] / sum); // 0: a row that sees no key
    }
}

static void attn_scalar(const qcache_attn_params & p, const float * q_own, const float * q_leader, float * dst,
                        uint8_t * wdata, int ith, int nth) {
    (void) wdata;
    const int32_t n_tasks = p.step->n_rows * p.n_head;
    for (int32_t task = ith; task < n_tasks; task += nth) {
        attn_row_head(p, q_own, q_leader, dst, task / p.n_head, task % p.n_head);
    }
}

const qcache_attn_kernel * qcache_attn_kernel_scalar() {
    static const qcache_attn_kernel kernel = { "scalar", attn_scalar };
    return &kernel;
}
