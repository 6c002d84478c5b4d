// v-skip.h: which V rows of inherited keys a lazy decode step need not read
//
// The leader's logits are there before any V is read, so the softmax of the inherited keys is too. Keys whose logit is at
// most a limit are left out. Of sixteen limits, a factor of two in probability apart, a row and head takes the highest
// below which no more than v_skip of the attention lies; the lowest, v_skip over the number of keys, is always within that.
// Own keys only make the softmax's sum larger, and the share left out smaller.
//
// grid: (n_head, n_rows, 1)

#pragma once

#include "kv.h"

enum { QG_V_LIMITS = 16, QG_V_SKIP_SHARED = 4 * QG_V_LIMITS * (QG_THREADS / 32) };

// softmax of the logits given to it, online
struct qg_softmax {
    float max, sum;

    QG_DEVICE void take(float x) {
        if (x > max) {
            sum *= qg_exp(max - x);
            max = x;
        }
        sum += x == -INFINITY ? 0.0f : qg_exp(x - max);
    }
};

// share of the attention at or below each limit
struct qg_shares {
    float log_sum, lowest; // of the softmax; the first limit
    float share[QG_V_LIMITS];

    QG_DEVICE float limit(int i) { return lowest + 0.693147181f * (float) i; }

    QG_DEVICE void take(float x) {
        const float probability = qg_exp(x - log_sum);
        QG_UNROLL
        for (int i = 0; i < QG_V_LIMITS; i++) {
            share[i] += x <= limit(i) ? probability : 0.0f;
        }
    }
};

// Gives every inherited key's logit, bias included, to one of the threads; returns how many keys that are. A warp takes a
// block at a time.
template <class F, class T> QG_DEVICE int qg_each_inherited(QG_LOCAL T & t, QG_CONSTANT const qg_attn_args & p, QG_LOCAL F & f) {
    const int                  head   = t.block_x();
    const qg_row               row    = ((QG_GLOBAL const qg_row *) p.rows)[t.block_y()];
    QG_GLOBAL const qg_block * blocks = (QG_GLOBAL const qg_block *) p.blocks + row.first_block;

    int n_keys = 0;
    for (int ib = 0; ib < row.n_blocks; ib++) {
        const qg_block block = blocks[ib];
        if (!p.q_leads[row.modality][block.modality]) {
            continue;
        }
        const int   n     = qg_min(block.n, row.pos - block.first + 1);
        const bool  bias  = p.vis_bias != 0 && row.modality == 0 && block.modality == 1;
        const float delta = bias ? ((QG_GLOBAL const float *) p.vis_bias)[head] : 0.0f;
        QG_GLOBAL const float * scores = (QG_GLOBAL const float *) p.scores + qg_score_index(p, t.block_y(), head, block);
        n_keys += n;
        for (int i = t.lane(); ib % (QG_THREADS / 32) == t.warp() && i < n; i += 32) {
            const float x = scores[i];
            f.take(bias ? qg_clamp(x + delta) : x);
        }
    }
    return n_keys;
}

template <class T> QG_DEVICE void qg_v_limits(QG_LOCAL T & t, QG_CONSTANT const qg_attn_args & p) {
    QG_SHARED float * shared = (QG_SHARED float *) t.shared(); // a warp's results
    constexpr int     N_WARPS = QG_THREADS / 32;

    qg_softmax softmax = { -INFINITY, 0.0f };
    const int  n_keys  = qg_each_inherited(t, p, softmax);
    for (int step = 16; step > 0; step /= 2) {
        const qg_softmax other = { t.shuffle_xor(softmax.max, step), t.shuffle_xor(softmax.sum, step) };
        const float      max   = qg_max(softmax.max, other.max);
        // of threads without keys the maximum is -inf and the sum 0
        softmax.sum = (softmax.max == -INFINITY ? softmax.sum : softmax.sum * qg_exp(softmax.max - max)) +
                      (other.max == -INFINITY ? other.sum : other.sum * qg_exp(other.max - max));
        softmax.max = max;
    }
    if (t.lane() == 0) {
        shared[2 * t.warp()]     = softmax.max;
        shared[2 * t.warp() + 1] = softmax.sum;
    }
    t.sync();
    float max = -INFINITY, sum = 0.0f;
    for (int i = 0; i < N_WARPS; i++) {
        max = qg_max(max, shared[2 * i]);
    }
    for (int i = 0; i < N_WARPS; i++) {
        sum += shared[2 * i] == -INFINITY ? shared[2 * i + 1] : shared[2 * i + 1] * qg_exp(shared[2 * i] - max);
    }
    t.sync(); // all have read

    qg_shares shares;
    shares.log_sum = max + qg_log(sum);
    shares.lowest  = shares.log_sum + qg_log(p.v_skip / (float) n_keys);
    QG_UNROLL
    for (int i = 0; i < QG_V_LIMITS; i++) {
        shares.share[i] = 0.0f;
    }
    qg_each_inherited(t, p, shares);
    QG_UNROLL
    for (int i = 0; i < QG_V_LIMITS; i++) {
        for (int step = 16; step > 0; step /= 2) {
            shares.share[i] += t.shuffle_xor(shares.share[i], step);
        }
        if (t.lane() == 0) {
            shared[i * N_WARPS + t.warp()] = shares.share[i];
        }
    }
    t.sync();
    if (t.index() == 0) {
        float limit = -INFINITY; // none, also where NaN is among the logits
        for (int i = 0; i < QG_V_LIMITS; i++) {
            float share = 0.0f;
            for (int w = 0; w < N_WARPS; w++) {
                share += shared[i * N_WARPS + w];
            }
            limit = share <= p.v_skip ? shares.limit(i) : limit;
        }
        ((QG_GLOBAL float *) p.v_limits)[(uint64_t) t.block_y() * p.n_head + t.block_x()] = limit;
    }
}
