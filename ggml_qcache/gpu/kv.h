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

// Q of a row and head: the leader's, or the row's own
QG_DEVICE QG_GLOBAL const float * qg_q_of(QG_CONSTANT const qg_attn_args & p, int row, int q_own, int head, bool leader) {
    return leader ? (QG_GLOBAL const float *) p.q_leader + ((uint64_t) row * p.n_head + head) * qg_head_dim(p)
                  : (QG_GLOBAL const float *) p.q_own + ((uint64_t) q_own * p.n_head + head) * qg_head_dim(p);
}

// of a row; as qcache_kv_row_bytes
QG_DEVICE int qg_row_bytes(int type, int head_dim) {
    return type == QG_F16 ? 2 * head_dim : (head_dim + 31) / 32 * (type == QG_Q8_0 ? 34 : 18);
}

// Eight elements of a row as they lie in memory, so that many loads are under way before the first is waited for. Of f16
// four words; of a quantised type halves of words, the scale last.
struct qg_raw8 {
    uint32_t words[5];
};

// elements 8 chunk .. 8 chunk + 7 of the row that begins `row` bytes after `rows`; one address of 64 bits for many rows
QG_DEVICE void qg_load8(int type, QG_GLOBAL const uint8_t * rows, int row, int chunk, QG_LOCAL qg_raw8 & raw) {
    if (type == QG_F16) {
        const qg_u4 v = qg_read16((QG_GLOBAL const qg_u4 *) (rows + (uint32_t) (row + 16 * chunk)));
        raw.words[0]  = v.x;
        raw.words[1]  = v.y;
        raw.words[2]  = v.z;
        raw.words[3]  = v.w;
        return;
    }
    const int                  group_bytes = type == QG_Q8_0 ? 34 : 18;
    const int                  first       = type == QG_Q8_0 ? 4 * (chunk % 4) : 4 * (chunk % 2); // half of a word in the group
    QG_GLOBAL const uint16_t * group       = (QG_GLOBAL const uint16_t *) (rows + (uint32_t) (row + group_bytes * (chunk / 4)));
    raw.words[4]                           = qg_read2(group);
    QG_UNROLL
    for (int i = 0; i < 4; i++) {
        raw.words[i] = qg_read2(group + 1 + first + i);
    }
}

QG_DEVICE void qg_zero8(QG_LOCAL qg_raw8 & raw) {
    QG_UNROLL
    for (int i = 0; i < 5; i++) {
        raw.words[i] = 0;
    }
}

// where `there` holds; else zeros
QG_DEVICE void qg_load8_of(bool there, int type, QG_GLOBAL const uint8_t * rows, int row, int chunk, QG_LOCAL qg_raw8 & raw) {
    qg_zero8(raw);
    if (there) {
        qg_load8(type, rows, row, chunk, raw);
    }
}

// Gives x[8], to be multiplied by what is returned.
QG_DEVICE float qg_unpack8(int type, QG_LOCAL const qg_raw8 & raw, int chunk, QG_LOCAL float * x) {
    if (type == QG_F16) {
        QG_UNROLL
        for (int i = 0; i < 4; i++) {
            qg_halves(raw.words[i], x[2 * i], x[2 * i + 1]);
        }
        return 1.0f;
    }
    if (type == QG_Q8_0) {
        QG_UNROLL
        for (int i = 0; i < 4; i++) {
            x[2 * i]     = (float) (int8_t) (raw.words[i] & 255);
            x[2 * i + 1] = (float) (int8_t) (raw.words[i] >> 8 & 255);
        }
    } else {
        const int shift = chunk % 4 >= 2 ? 4 : 0; // byte j holds elements j (low half) and j + 16
        QG_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint32_t two = raw.words[i] >> shift;
            x[2 * i]           = (float) ((int) (two & 15) - 8);
            x[2 * i + 1]       = (float) ((int) (two >> 8 & 15) - 8);
        }
    }
    return qg_from_half((uint16_t) raw.words[4]);
}

// The same as f16, exactly: to be multiplied by what is returned.
QG_DEVICE float qg_unscaled8(int type, QG_LOCAL const qg_raw8 & raw, int chunk, QG_LOCAL qg_u4 & eight) {
    if (type == QG_F16) {
        eight.x = raw.words[0];
        eight.y = raw.words[1];
        eight.z = raw.words[2];
        eight.w = raw.words[3];
        return 1.0f;
    }
    float       x[8];
    const float scale = qg_unpack8(type, raw, chunk, x);
    eight             = qg_eight(x);
    return scale;
}

// the elements as f16; quantised ones are rounded to it
QG_DEVICE qg_u4 qg_halves8(int type, QG_LOCAL const qg_raw8 & raw, int chunk) {
    qg_u4 eight;
    if (type == QG_F16) {
        qg_unscaled8(type, raw, chunk, eight);
        return eight;
    }
    float       x[8];
    const float scale = qg_unpack8(type, raw, chunk, x);
    QG_UNROLL
    for (int i = 0; i < 8; i++) {
        x[i] *= scale;
    }
    return qg_eight(x);
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
