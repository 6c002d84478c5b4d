// kv.h: K and V rows of each type, eight elements at a time, as one lane reads and writes them
//
// A row of a quantised type is groups of 32 elements with an f16 scale before them, as ggml packs them; its groups are
// aligned to 2 bytes only, so they are read in halves of a word.

#pragma once

#include "simt.h"

// of the logit in the score cache that a row and head have for the block's first key; as qcache_score_index
QG_DEVICE uint64_t qg_score_index(QG_CONSTANT const qg_attn_args & p, int row, int head, QG_LOCAL const qg_block & block) {
    return ((uint64_t) row * p.n_score_keys + block.first) * p.n_head + (uint64_t) head * block.n;
}

// x[8] = elements 8 chunk .. 8 chunk + 7 of a row
QG_DEVICE void qg_load8(int type, QG_GLOBAL const uint8_t * row, int chunk, QG_LOCAL float * x) {
    if (type == QG_F16) {
        const qg_u4 v = *(QG_GLOBAL const qg_u4 *) (row + 16 * chunk);
        qg_halves(v.x, x[0], x[1]);
        qg_halves(v.y, x[2], x[3]);
        qg_halves(v.z, x[4], x[5]);
        qg_halves(v.w, x[6], x[7]);
    } else if (type == QG_Q8_0) {
        QG_GLOBAL const uint16_t * group = (QG_GLOBAL const uint16_t *) (row + 34 * (chunk / 4));
        const float                scale = qg_from_half(group[0]);
        QG_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint16_t two = group[1 + 4 * (chunk % 4) + i];
            x[2 * i]           = scale * (float) (int8_t) (two & 255);
            x[2 * i + 1]       = scale * (float) (int8_t) (two >> 8);
        }
    } else {
        // byte j holds elements j (low half) and j + 16
        QG_GLOBAL const uint16_t * group = (QG_GLOBAL const uint16_t *) (row + 18 * (chunk / 4));
        const float                scale = qg_from_half(group[0]);
        const int                  shift = chunk % 4 >= 2 ? 4 : 0;
        QG_UNROLL
        for (int i = 0; i < 4; i++) {
            const int two = group[1 + 4 * (chunk % 2) + i] >> shift;
            x[2 * i]      = scale * (float) ((two & 15) - 8);
            x[2 * i + 1]  = scale * (float) ((two >> 8 & 15) - 8);
        }
    }
}

// Writes a group of 32 elements (fewer at the end of an f16 row) with the 32 lanes of a warp: lane i has element i.
// The same rounding as ggml's reference, so that the bytes are those of the CPU.
template <class T> QG_DEVICE void qg_store_group(QG_LOCAL T & t, int type, QG_GLOBAL uint8_t * row, int group, int n, float x) {
    const int lane = t.lane();
    if (type == QG_F16) {
        if (lane < n) {
            ((QG_GLOBAL uint16_t *) row)[32 * group + lane] = qg_to_half(x);
        }
        return;
    }
    float largest = x; // the value of largest magnitude; of two, the first
    int   at      = lane;
    for (int step = 16; step > 0; step /= 2) {
        const float other    = t.shuffle_xor(largest, step);
        const int   other_at = t.shuffle_xor(at, step);
        const float a = largest < 0.0f ? -largest : largest, b = other < 0.0f ? -other : other;
        if (b > a || (b == a && other_at < at)) {
            largest = other;
            at      = other_at;
        }
    }
    if (type == QG_Q8_0) {
        const float         d  = (largest < 0.0f ? -largest : largest) / 127.0f;
        const float         id = d != 0.0f ? 1.0f / d : 0.0f;
        QG_GLOBAL uint8_t * to = row + 34 * group;
        if (lane == 0) {
            *(QG_GLOBAL uint16_t *) to = qg_to_half(d);
        }
        to[2 + lane] = (uint8_t) (int8_t) qg_round(x * id);
    } else {
        const float         d    = largest / -8.0f;
        const float         id   = d != 0.0f ? 1.0f / d : 0.0f;
        const int           q    = qg_min(15, (int) (int8_t) qg_mul_add(x, id, 8.5f));
        const int           high = t.shuffle_xor(q, 16);
        QG_GLOBAL uint8_t * to   = row + 18 * group;
        if (lane == 0) {
            *(QG_GLOBAL uint16_t *) to = qg_to_half(d);
        }
        if (lane < 16) {
            to[2 + lane] = (uint8_t) (q | high << 4);
        }
    }
}
