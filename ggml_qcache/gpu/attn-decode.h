// attn-decode.h: lazy attention of few query rows: bound by the memory that K and V are read from
//
// A thread block has one row, up to G of the query heads that share a KV head, and a span of the row's KV blocks. Eight
// elements of a K or V row go to a lane, so that a row goes to `width` neighbouring lanes, a slot; a slot takes TOKENS
// tokens at a time and keeps an online softmax of its own, so no barrier stands in the loop. A lazy layer that has its
// leader's logits (score cache) reads no K at all. Slots are merged at the end, spans by qg_attn_merge.
//
// grid: (n_head_kv * ceil(n_group / G), n_rows, n_splits)

#pragma once

#include "kv.h"

// tokens that a slot takes at a time: loads in flight; with many heads registers are short
QG_BOTH constexpr int qg_decode_tokens(int n_heads) { return n_heads > 4 ? 2 : 4; }

// bytes of shared memory: the sums of all slots of one query head
enum { QG_DECODE_SHARED = 5120 };

// one element of what a slot or a span gives
struct qg_merged {
    float sum, max, value;
};

// Adds up n partial results { sum, maximum, weighted V }, a stride apart, for element d.
QG_DEVICE qg_merged qg_merge(QG_SHARED const float * partial, int n, int stride, int d) {
    qg_merged merged = { 0.0f, -INFINITY, 0.0f };
    for (int i = 0; i < n; i++) {
        merged.max = qg_max(partial[i * stride + 1], merged.max);
    }
    for (int i = 0; i < n; i++) {
        // a part without keys has sum 0; one of NaN only has maximum -inf and a sum that stays NaN
        const float max    = partial[i * stride + 1];
        const float weight = max == -INFINITY ? 0.0f : qg_exp(max - merged.max);
        merged.sum += weight * partial[i * stride];
        merged.value += weight * partial[i * stride + 2 + d];
    }
    return merged;
}

// Element d of a row and head: the result, or what its span gives to qg_attn_merge.
QG_DEVICE void qg_put(QG_CONSTANT const qg_attn_args & p, int row, int head, int split, int d, qg_merged merged) {
    const uint64_t at = (uint64_t) row * p.n_head + head;
    if (p.n_splits == 1) {
        ((QG_GLOBAL float *) p.dst)[at * qg_head_dim(p) + d] = merged.sum == 0.0f ? 0.0f : merged.value / merged.sum;
        return;
    }
    QG_GLOBAL float * out = (QG_GLOBAL float *) p.partial + (at * p.n_splits + split) * (qg_head_dim(p) + 2);
    if (d == 0) {
        out[0] = merged.sum;
        out[1] = merged.max;
    }
    out[2 + d] = merged.value;
}

template <int G, class T>
QG_DEVICE void qg_attn_decode(QG_LOCAL T & t, QG_CONSTANT const qg_attn_args & p, int head_dim, int type_k, int type_v) {
    constexpr int TOKENS = qg_decode_tokens(G);

    const int k_bytes  = qg_row_bytes(type_k, head_dim);
    const int v_bytes  = qg_row_bytes(type_v, head_dim);
    const int n_group  = p.n_head / p.n_head_kv;
    const int n_chunks = (n_group + G - 1) / G;
    const int kv_head  = t.block_x() / n_chunks;
    const int head     = kv_head * n_group + t.block_x() % n_chunks * G;
    const int n_heads  = qg_min(G, n_group - t.block_x() % n_chunks * G); // of G
    const int ir       = t.block_y();

    const qg_row               row      = ((QG_GLOBAL const qg_row *) p.rows)[ir];
    QG_GLOBAL const qg_block * blocks   = (QG_GLOBAL const qg_block *) p.blocks + row.first_block;
    const int                  per      = (row.n_blocks + p.n_splits - 1) / p.n_splits;
    const int                  ib_first = per * t.block_z();
    const int                  ib_end   = qg_min(row.n_blocks, ib_first + per);

    int width = 1;
    while (8 * width < head_dim) {
        width *= 2;
    }
    const int  n_slots = QG_THREADS / width;
    const int  slot    = t.index() / width;
    const int  chunk   = t.index() % width;
    const bool active  = 8 * chunk < head_dim;

    float q[G][8], acc[G][8], max[G], sum[G];
    QG_UNROLL
    for (int g = 0; g < G; g++) {
        max[g] = -INFINITY;
        sum[g] = 0.0f;
        QG_UNROLL
        for (int i = 0; i < 8; i++) {
            q[g][i] = acc[g][i] = 0.0f;
        }
    }
    int loaded = -1; // which of own (0) and leader's (1) is in q

    qg_block next = blocks[qg_min(ib_first, row.n_blocks - 1)];
    for (int ib = ib_first; ib < ib_end; ib++) {
        const qg_block block = next;
        next                 = blocks[qg_min(ib + 1, row.n_blocks - 1)]; // its place is known before its turn comes
        const int      n     = qg_min(block.n, row.pos - block.first + 1);
        const int      leads = p.q_leads[row.modality][block.modality];
        const bool     reads = qg_score_op(p) == 2 && leads;
        const bool     skips = reads && p.v_limits != 0;
        const bool     bias  = p.vis_bias != 0 && row.modality == 0 && block.modality == 1;
        const uint64_t first = (uint64_t) kv_head * p.n_block_tokens;

        QG_GLOBAL float *         scores = qg_score_op(p) != 0 ? (QG_GLOBAL float *) p.scores + qg_score_index(p, ir, head, block) : nullptr;
        QG_GLOBAL const uint8_t * data = (QG_GLOBAL const uint8_t *) block.data;
        QG_GLOBAL const uint8_t * k    = data + p.k_offset[row.modality][block.modality] + first * k_bytes;
        QG_GLOBAL const uint8_t * v    = data + p.v_offset[block.modality] + first * v_bytes;

        if (!reads && loaded != leads) {
            QG_GLOBAL const float * from = qg_q_of(p, ir, row.q_own, head, leads);
            QG_UNROLL
            for (int g = 0; g < G; g++) {
                QG_UNROLL
                for (int i = 0; i < 8; i++) {
                    q[g][i] = active && g < n_heads ? from[(uint64_t) g * head_dim + 8 * chunk + i] : 0.0f;
                }
            }
            loaded = leads;
        }
        for (int base = 0; base < n; base += TOKENS * n_slots) {
            // All that this turn reads is asked for before anything waits: loads in flight are what the memory's speed takes.
            // Past the tokens the last one is read once more, without a weight: loads under conditions of their own cost more.
            float   s[TOKENS][G];
            qg_raw8 raw_k[TOKENS], raw_v[TOKENS];
            if (!reads) {
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    qg_load8_of(active, type_k, k, qg_min(base + u * n_slots + slot, n - 1) * k_bytes, chunk, raw_k[u]);
                }
            }
            if (!skips) {
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    qg_load8_of(active, type_v, v, qg_min(base + u * n_slots + slot, n - 1) * v_bytes, chunk, raw_v[u]);
                }
            }
            if (reads) {
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    const int token = base + u * n_slots + slot;
                    QG_UNROLL
                    for (int g = 0; g < G; g++) {
                        s[u][g] = token < n && g < n_heads ? scores[g * block.n + token] : -INFINITY;
                    }
                }
            } else {
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    float       x[8];
                    const float scale = p.scale * qg_unpack8(type_k, raw_k[u], chunk, x);
                    QG_UNROLL
                    for (int g = 0; g < G; g++) {
                        float dot = 0.0f;
                        QG_UNROLL
                        for (int i = 0; i < 8; i++) {
                            dot += q[g][i] * x[i];
                        }
                        s[u][g] = dot * scale;
                    }
                }
                QG_NO_UNROLL // the tokens' shuffles stay together then, and wait for one another no more
                for (int step = width / 2; step > 0; step /= 2) {
                    QG_UNROLL
                    for (int u = 0; u < TOKENS; u++) {
                        QG_UNROLL
                        for (int g = 0; g < G; g++) {
                            s[u][g] += t.shuffle_xor(s[u][g], step);
                        }
                    }
                }
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    const int token = base + u * n_slots + slot;
                    QG_UNROLL
                    for (int g = 0; g < G; g++) {
                        s[u][g] = token < n ? qg_clamp(s[u][g]) : -INFINITY;
                        if (qg_score_op(p) == 1 && chunk == 0 && token < n && g < n_heads) {
                            scores[g * block.n + token] = s[u][g];
                        }
                    }
                }
            }
            if (bias) {
                QG_UNROLL
                for (int g = 0; g < G; g++) {
                    const float delta = g < n_heads ? ((QG_GLOBAL const float *) p.vis_bias)[head + g] : 0.0f;
                    QG_UNROLL
                    for (int u = 0; u < TOKENS; u++) {
                        s[u][g] = s[u][g] == -INFINITY ? s[u][g] : qg_clamp(s[u][g] + delta);
                    }
                }
            }
            if (skips) {
                int kept = 0; // bit u: some head wants V of that token
                QG_UNROLL
                for (int g = 0; g < G; g++) {
                    const float limit = g < n_heads ? ((QG_GLOBAL const float *) p.v_limits)[(uint64_t) ir * p.n_head + head + g] : INFINITY;
                    QG_UNROLL
                    for (int u = 0; u < TOKENS; u++) {
                        kept |= s[u][g] <= limit ? 0 : 1 << u;
                    }
                }
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    const int token = base + u * n_slots + slot;
                    qg_load8_of(active && token < n && (kept >> u & 1), type_v, v, token * v_bytes, chunk, raw_v[u]);
                }
            }
            QG_UNROLL
            for (int g = 0; g < G; g++) {
                float highest = max[g];
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    highest = qg_max(s[u][g], highest);
                }
                if (highest > max[g]) {
                    const float scale = qg_exp(max[g] - highest);
                    max[g] = highest;
                    sum[g] *= scale;
                    QG_UNROLL
                    for (int i = 0; i < 8; i++) {
                        acc[g][i] *= scale;
                    }
                }
                const float from = qg_finite_max(max[g]);
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    s[u][g] = qg_exp(s[u][g] - from); // from here on the probability
                    sum[g] += s[u][g];
                }
            }
            if (base + TOKENS * n_slots > n) {
                QG_UNROLL
                for (int u = 0; u < TOKENS; u++) {
                    if (base + u * n_slots + slot >= n) {
                        qg_zero8(raw_v[u]); // 0 times infinity would be NaN
                    }
                }
            }
            QG_UNROLL
            for (int u = 0; u < TOKENS; u++) {
                float       x[8];
                const float scale = qg_unpack8(type_v, raw_v[u], chunk, x);
                QG_UNROLL
                for (int g = 0; g < G; g++) {
                    const float weight = s[u][g] * scale;
                    QG_UNROLL
                    for (int i = 0; i < 8; i++) {
                        acc[g][i] += weight * x[i];
                    }
                }
            }
        }
    }

    QG_SHARED float * shared = (QG_SHARED float *) t.shared(); // [n_slots][head_dim + 2]
    const int         stride = head_dim + 2;
    for (int g = 0; g < n_heads; g++) {
        t.sync();
        QG_SHARED float * to = shared + slot * stride;
        QG_UNROLL
        for (int h = 0; h < G; h++) {
            if (h == g) { // an index known when compiled keeps the arrays in registers
                if (chunk == 0) {
                    to[0] = sum[h];
                    to[1] = max[h];
                }
                QG_UNROLL
                for (int i = 0; i < 8; i++) {
                    if (active) {
                        to[2 + 8 * chunk + i] = acc[h][i];
                    }
                }
            }
        }
        t.sync();
        for (int d = t.index(); d < head_dim; d += QG_THREADS) {
            qg_put(p, ir, head + g, t.block_z(), d, qg_merge(shared, n_slots, stride, d));
        }
    }
}

constexpr int qg_merge_shared(int n_splits) { return 8 * n_splits; }

// The spans' weights are worked out once, then every thread adds up its element with loads that don't wait for each other.
//
// grid: (n_head, n_rows, 1)
template <class T> QG_DEVICE void qg_attn_merge(QG_LOCAL T & t, QG_CONSTANT const qg_attn_args & p) {
    const uint64_t          at     = (uint64_t) t.block_y() * p.n_head + t.block_x();
    const int               stride = qg_head_dim(p) + 2;
    QG_GLOBAL const float * from   = (QG_GLOBAL const float *) p.partial + at * p.n_splits * stride;
    QG_SHARED float *       weight = (QG_SHARED float *) t.shared(); // [n_splits] maxima first
    QG_SHARED float *       sums   = weight + p.n_splits;            // [n_splits]
    for (int i = t.index(); i < p.n_splits; i += QG_THREADS) {
        sums[i]   = from[i * stride];
        weight[i] = from[i * stride + 1];
    }
    t.sync();
    float max = -INFINITY;
    for (int i = 0; i < p.n_splits; i++) {
        max = qg_max(weight[i], max);
    }
    t.sync(); // all have read the maxima
    for (int i = t.index(); i < p.n_splits; i += QG_THREADS) {
        weight[i] = weight[i] == -INFINITY ? 0.0f : qg_exp(weight[i] - max);
    }
    t.sync();
    float sum = 0.0f;
    for (int i = 0; i < p.n_splits; i++) {
        sum += weight[i] * sums[i];
    }
    for (int d = t.index(); d < qg_head_dim(p); d += QG_THREADS) {
        float value = 0.0f;
        for (int i = 0; i < p.n_splits; i++) {
            value += weight[i] * from[i * stride + 2 + d];
        }
        ((QG_GLOBAL float *) p.dst)[at * qg_head_dim(p) + d] = sum == 0.0f ? 0.0f : value / sum;
    }
}
