// attn-prefill.h: lazy attention of many query rows on matrix units
//
// A thread block has one query head and a tile of up to 64 rows of one sequence and modality; each of its four warps has
// 16 of them. Q, a tile of K and a transposed tile of V lie in shared memory as f16; products are m16n8k16 with f32
// sums; the softmax is online, in the registers that hold the products. Where the source of Q changes with the modality
// of the keys (visual mode), the tile of Q is loaded again: blocks come in runs, so that is rare.
//
// Registers of a product, lane l of its warp: A holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) + { 0, 1, 8, 9 }; B
// holds column l / 4, the same four rows; the sum holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) + { 0, 1 }.
//
// grid: (n_tiles, n_head, 1)

#pragma once

#include "kv.h"

constexpr int QG_TILE_ROWS = 64; // query rows of a tile

QG_BOTH constexpr int qg_prefill_keys(int dim) { return dim > 128 ? 16 : 32; } // of a tile of K and V

// The rows are 8 halves longer than they need be, so that no two lanes of a fragment meet in a bank.
QG_BOTH constexpr int qg_prefill_shared(int dim) {
    return 2 * ((QG_TILE_ROWS + qg_prefill_keys(dim)) * (dim + 8) + dim * (qg_prefill_keys(dim) + 8));
}

// DIM: head_dim rounded up to a multiple of 16 for which there is a kernel; what is over is zero
template <int DIM, int TYPE_K, int TYPE_V, class T> QG_DEVICE void qg_attn_prefill(T & t, const qg_attn_args & p) {
    constexpr int KEYS   = qg_prefill_keys(DIM);
    constexpr int STRIDE = DIM + 8;
    constexpr int V_STEP = KEYS + 8;

    const qg_tile   tile      = ((const qg_tile *) p.tiles)[t.block_x()];
    const int32_t * tile_rows = (const int32_t *) p.tile_rows + tile.first;
    const qg_row *  rows      = (const qg_row *) p.rows;
    const int       head      = t.block_y();
    const int       kv_head   = head / (p.n_head / p.n_head_kv);
    const int       lane      = t.lane();
    const int       in_warp   = 16 * t.warp(); // first row of this warp

    uint16_t * shared_q = (uint16_t *) t.shared();          // [QG_TILE_ROWS][STRIDE]
    uint16_t * shared_k = shared_q + QG_TILE_ROWS * STRIDE; // [KEYS][STRIDE]
    uint16_t * shared_v = shared_k + KEYS * STRIDE;         // [DIM][V_STEP]

    // what comes after may not be written yet
    const int n_seen = rows[tile_rows[tile.n - 1]].pos + 1;

    int pos[2]; // of this lane's two rows; -1: there is none
    QG_UNROLL
    for (int r = 0; r < 2; r++) {
        const int i = in_warp + lane / 4 + 8 * r;
        pos[r]      = i < tile.n ? rows[tile_rows[i]].pos : -1;
    }

    float out[DIM / 8][4], max[2], sum[2];
    QG_UNROLL
    for (int j = 0; j < DIM / 8; j++) {
        out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;
    }
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
    int loaded = -1;

    for (int ib = 0; ib < tile.n_blocks; ib++) {
        const qg_block  block = ((const qg_block *) p.blocks)[tile.first_block + ib];
        const int       leads = p.q_leads[tile.modality][block.modality];
        const int       n     = qg_min(block.n, n_seen - block.first);
        const bool      bias  = p.vis_bias != 0 && tile.modality == 0 && block.modality == 1;
        const float     delta = bias ? ((const float *) p.vis_bias)[head] : 0.0f;
        const uint64_t  first = (uint64_t) kv_head * p.n_block_tokens;
        const uint8_t * k     = (const uint8_t *) block.data + p.k_offset[tile.modality][block.modality] + first * p.k_row_bytes;
        const uint8_t * v     = (const uint8_t *) block.data + p.v_offset[block.modality] + first * p.v_row_bytes;

        if (leads != loaded) {
            t.sync(); // all have read the last tile of Q
            for (int i = t.index(); i < QG_TILE_ROWS * DIM / 2; i += QG_THREADS) {
                const int r = i / (DIM / 2), d = i % (DIM / 2) * 2;
                float     a = 0.0f, b = 0.0f;
                if (r < tile.n && d < p.head_dim) {
                    const int     ir   = tile_rows[r];
                    const float * from = leads ? (const float *) p.q_leader + ((uint64_t) ir * p.n_head + head) * p.head_dim
                                               : (const float *) p.q_own + ((uint64_t) rows[ir].q_own * p.n_head + head) * p.head_dim;
                    a = from[d] * p.scale;
                    b = from[d + 1] * p.scale;
                }
                *(uint32_t *) (shared_q + r * STRIDE + d) = qg_pair(a, b);
            }
            loaded = leads;
        }
        for (int base = 0; base < n; base += KEYS) {
            t.sync(); // all have read the last tiles of K and V
            for (int i = t.index(); i < KEYS * DIM / 8; i += QG_THREADS) {
                const int token = i / (DIM / 8), chunk = i % (DIM / 8);
                float     x[8] = {};
                if (base + token < n && 8 * chunk < p.head_dim) {
                    qg_load8(TYPE_K, k + (uint64_t) (base + token) * p.k_row_bytes, chunk, x);
                }
                *(qg_u4 *) (shared_k + token * STRIDE + 8 * chunk) = qg_eight(x);
            }
            for (int i = t.index(); i < KEYS * DIM / 8; i += QG_THREADS) {
                const int token = i % KEYS, chunk = i / KEYS;
                float     x[8] = {};
                if (base + token < n && 8 * chunk < p.head_dim) {
                    qg_load8(TYPE_V, v + (uint64_t) (base + token) * p.v_row_bytes, chunk, x);
                }
                QG_UNROLL
                for (int e = 0; e < 8; e++) {
                    shared_v[(8 * chunk + e) * V_STEP + token] = qg_to_half(x[e]);
                }
            }
            t.sync();

            float s[KEYS / 8][4];
            QG_UNROLL
            for (int j = 0; j < KEYS / 8; j++) {
                s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
            }
            QG_UNROLL
            for (int d = 0; d < DIM; d += 16) {
                const uint16_t * at = shared_q + (in_warp + lane / 4) * STRIDE + d + lane % 4 * 2;
                const uint32_t   a[4] = { *(const uint32_t *) at, *(const uint32_t *) (at + 8 * STRIDE), *(const uint32_t *) (at + 8),
                                          *(const uint32_t *) (at + 8 * STRIDE + 8) };
                QG_UNROLL
                for (int j = 0; j < KEYS / 8; j++) {
                    const uint16_t * column = shared_k + (8 * j + lane / 4) * STRIDE + d + lane % 4 * 2;
                    const uint32_t   b[2]   = { *(const uint32_t *) column, *(const uint32_t *) (column + 8) };
                    t.mma(s[j], a, b);
                }
            }
            QG_UNROLL
            for (int r = 0; r < 2; r++) {
                float highest = max[r];
                QG_UNROLL
                for (int j = 0; j < KEYS / 8; j++) {
                    QG_UNROLL
                    for (int e = 0; e < 2; e++) {
                        const int token = base + 8 * j + lane % 4 * 2 + e;
                        float &   x     = s[j][2 * r + e];
                        x = token < n && block.first + token <= pos[r] ? qg_clamp(qg_clamp(x) + delta) : -INFINITY;
                        highest = qg_max(x, highest);
                    }
                }
                highest           = qg_max(t.shuffle_xor(highest, 1), highest); // the four lanes of a row
                highest           = qg_max(t.shuffle_xor(highest, 2), highest);
                const float scale = max[r] == -INFINITY ? 0.0f : qg_exp(max[r] - highest);
                max[r]            = highest;
                sum[r] *= scale;
                QG_UNROLL
                for (int j = 0; j < DIM / 8; j++) {
                    out[j][2 * r] *= scale;
                    out[j][2 * r + 1] *= scale;
                }
                QG_UNROLL
                for (int j = 0; j < KEYS / 8; j++) {
                    QG_UNROLL
                    for (int e = 0; e < 2; e++) {
                        float & x = s[j][2 * r + e];
                        x = x == -INFINITY ? 0.0f : qg_exp(x - highest); // from here on the probability
                        sum[r] += x;
                    }
                }
            }
            QG_UNROLL
            for (int i = 0; i < KEYS / 16; i++) {
                const uint32_t a[4] = { qg_pair(s[2 * i][0], s[2 * i][1]), qg_pair(s[2 * i][2], s[2 * i][3]),
                                        qg_pair(s[2 * i + 1][0], s[2 * i + 1][1]), qg_pair(s[2 * i + 1][2], s[2 * i + 1][3]) };
                QG_UNROLL
                for (int j = 0; j < DIM / 8; j++) {
                    const uint16_t * column = shared_v + (8 * j + lane / 4) * V_STEP + 16 * i + lane % 4 * 2;
                    const uint32_t   b[2]   = { *(const uint32_t *) column, *(const uint32_t *) (column + 8) };
                    t.mma(out[j], a, b);
                }
            }
        }
    }
    QG_UNROLL
    for (int r = 0; r < 2; r++) {
        float total = sum[r] + t.shuffle_xor(sum[r], 1);
        total += t.shuffle_xor(total, 2);
        if (pos[r] < 0) {
            continue;
        }
        float * to = (float *) p.dst + ((uint64_t) tile_rows[in_warp + lane / 4 + 8 * r] * p.n_head + head) * p.head_dim;
        QG_UNROLL
        for (int j = 0; j < DIM / 8; j++) {
            const int d = 8 * j + lane % 4 * 2;
            if (d < p.head_dim) {
                to[d]     = total == 0.0f ? 0.0f : out[j][2 * r] / total;
                to[d + 1] = total == 0.0f ? 0.0f : out[j][2 * r + 1] / total;
            }
        }
    }
}
