// attn-prefill.h: lazy attention of many query rows on matrix units
//
// A thread block has one query head and a tile of up to 64 rows of one sequence and modality; each of its four warps has
// 16 of them. Q and a tile each of K and V lie in shared memory as f16; products are m16n8k16 with f32 sums; the softmax is
// online, in the registers that hold the products. A tile of V is on its way from memory while logits are worked out, the next
// one of K while V is added up. Where the source of Q changes with the modality of the keys (visual mode), the tile of Q is loaded again: blocks
// come in runs, so that is rare.
//
// Registers of a product, lane l of its warp: A holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) + { 0, 1, 8, 9 }; B
// holds column l / 4, the same four rows; the sum holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) + { 0, 1 }.
//
// grid: (n_tiles, n_head, 1)

#pragma once

#include "kv.h"

constexpr int QG_TILE_ROWS = 64; // query rows of a tile

QG_BOTH constexpr int qg_prefill_keys(int dim) { return dim > 128 ? 16 : 32; } // of a tile of K and V

// The rows are 8 halves longer than they need be, so that no two of a matrix's eight meet in a bank.
QG_BOTH constexpr int qg_prefill_shared(int dim) { return 2 * (QG_TILE_ROWS + 2 * qg_prefill_keys(dim)) * (dim + 8); }

// what one turn of the loop works on: some of a block's keys
struct qg_key_tile {
    int             ib = 0, base = 0; // block of the sequence, first token in it
    int             n = 0;            // tokens from there on that the tile of rows may see
    int             first = 0;        // position of the first one
    int             modality = 0;
    const uint8_t * k = nullptr, * v = nullptr; // of the first one
};

// DIM: head_dim rounded up to a multiple of 16 for which there is a kernel; what is over is zero
template <int DIM, int TYPE_K, int TYPE_V, class T> QG_DEVICE void qg_attn_prefill(T & t, const qg_attn_args & p) {
    constexpr int KEYS   = qg_prefill_keys(DIM);
    constexpr int STRIDE = DIM + 8;
    constexpr int CHUNKS = (KEYS * DIM / 8 + QG_THREADS - 1) / QG_THREADS; // of 8 elements of K or V that a thread brings in
    constexpr bool EVEN  = CHUNKS * QG_THREADS * 8 == KEYS * DIM;          // every thread as many

    const qg_tile   tile      = ((const qg_tile *) p.tiles)[t.block_x()];
    const int32_t * tile_rows = (const int32_t *) p.tile_rows + tile.first;
    const qg_row *  rows      = (const qg_row *) p.rows;
    const int       head      = t.block_y();
    const int       kv_head   = head / (p.n_head / p.n_head_kv);
    const int       lane      = t.lane();
    const int       in_warp   = 16 * t.warp(); // first row of this warp

    uint16_t * shared_q = (uint16_t *) t.shared();          // [QG_TILE_ROWS][STRIDE]
    uint16_t * shared_k = shared_q + QG_TILE_ROWS * STRIDE; // [KEYS][STRIDE]
    uint16_t * shared_v = shared_k + KEYS * STRIDE;         // [KEYS][STRIDE]

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

    const auto tile_at = [&](int ib, int base) {
        qg_key_tile keys;
        keys.ib = ib;
        if (ib < tile.n_blocks) {
            const qg_block block = ((const qg_block *) p.blocks)[tile.first_block + ib];
            const uint64_t token = (uint64_t) kv_head * p.n_block_tokens + base;
            keys.base            = base;
            keys.n               = qg_min(block.n, n_seen - block.first) - base;
            keys.first           = block.first + base;
            keys.modality        = block.modality;
            keys.k = (const uint8_t *) block.data + p.k_offset[tile.modality][block.modality] + token * p.k_row_bytes;
            keys.v = (const uint8_t *) block.data + p.v_offset[block.modality] + token * p.v_row_bytes;
        }
        return keys;
    };
    // rows of a tile, from memory and, as f16, into shared memory
    qg_raw8    raw[CHUNKS];
    const auto bring = [&](int type, const uint8_t * from, int n, int row_bytes) {
        QG_UNROLL
        for (int i = 0; i < CHUNKS; i++) {
            const int token = (t.index() + i * QG_THREADS) / (DIM / 8), chunk = (t.index() + i * QG_THREADS) % (DIM / 8);
            qg_zero8(raw[i]);
            if (token < n && (EVEN || token < KEYS) && 8 * chunk < p.head_dim) {
                qg_load8(type, from, token * row_bytes, chunk, raw[i]);
            }
        }
    };
    const auto store = [&](int type, uint16_t * to) {
        QG_UNROLL
        for (int i = 0; i < CHUNKS; i++) {
            const int token = (t.index() + i * QG_THREADS) / (DIM / 8), chunk = (t.index() + i * QG_THREADS) % (DIM / 8);
            if (EVEN || token < KEYS) {
                *(qg_u4 *) (to + token * STRIDE + 8 * chunk) = qg_halves8(type, raw[i], chunk);
            }
        }
    };
    int        loaded    = -1; // which of own (0) and leader's (1) is in shared_q
    const auto store_q_k = [&](const qg_key_tile & keys) {
        const int leads = p.q_leads[tile.modality][keys.modality];
        if (leads != loaded) {
            QG_NO_UNROLL // rare: not worth registers
            for (int r = t.warp(); r < QG_TILE_ROWS; r += QG_THREADS / 32) {
                const int     ir   = tile_rows[r < tile.n ? r : 0];
                const float * from = qg_q_of(p, ir, rows[ir].q_own, head, leads);
                for (int d = 2 * lane; d < DIM; d += 64) {
                    const bool there = r < tile.n && d < p.head_dim;
                    *(uint32_t *) (shared_q + r * STRIDE + d) = there ? qg_pair(from[d] * p.scale, from[d + 1] * p.scale) : 0;
                }
            }
            loaded = leads;
        }
        store(TYPE_K, shared_k);
    };

    qg_key_tile keys = tile_at(0, 0);
    bring(TYPE_K, keys.k, keys.n, p.k_row_bytes);
    store_q_k(keys);
    t.sync();
    while (keys.ib < tile.n_blocks) {
        const qg_key_tile now = keys;
        bring(TYPE_V, now.v, now.n, p.v_row_bytes); // on its way while the logits are worked out

        float s[KEYS / 8][4];
        QG_UNROLL
        for (int j = 0; j < KEYS / 8; j++) {
            s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
        }
        QG_UNROLL
        for (int d = 0; d < DIM; d += 16) {
            uint32_t a[4];
            t.load_matrices(a, shared_q + in_warp * STRIDE + d, STRIDE, true);
            QG_UNROLL
            for (int j = 0; j < KEYS / 8; j += 2) {
                uint32_t m[4];
                t.load_matrices(m, shared_k + 8 * j * STRIDE + d, STRIDE, false);
                t.mma(s[j], a, m);
                t.mma(s[j + 1], a, m + 2);
            }
        }
        QG_UNROLL
        for (int j = 0; j < KEYS / 8; j++) {
            QG_UNROLL
            for (int e = 0; e < 4; e++) {
                s[j][e] = qg_clamp(s[j][e]);
            }
        }
        if (p.vis_bias != 0 && tile.modality == 0 && now.modality == 1) {
            const float delta = ((const float *) p.vis_bias)[head];
            QG_UNROLL
            for (int j = 0; j < KEYS / 8; j++) {
                QG_UNROLL
                for (int e = 0; e < 4; e++) {
                    s[j][e] = qg_clamp(s[j][e] + delta);
                }
            }
        }
        QG_UNROLL
        for (int r = 0; r < 2; r++) {
            const int n_visible = qg_min(now.n, pos[r] + 1 - now.first) - lane % 4 * 2; // to this lane
            float     highest   = max[r];
            QG_UNROLL
            for (int j = 0; j < KEYS / 8; j++) {
                QG_UNROLL
                for (int e = 0; e < 2; e++) {
                    float & x = s[j][2 * r + e];
                    x         = 8 * j + e < n_visible ? x : -INFINITY;
                    highest   = qg_max(x, highest);
                }
            }
            highest = qg_max(t.shuffle_xor(highest, 1), highest); // the four lanes of a row
            highest = qg_max(t.shuffle_xor(highest, 2), highest);
            if (highest > max[r]) {
                const float scale = qg_exp(max[r] - highest);
                max[r]            = highest;
                sum[r] *= scale;
                QG_UNROLL
                for (int j = 0; j < DIM / 8; j++) {
                    out[j][2 * r] *= scale;
                    out[j][2 * r + 1] *= scale;
                }
            }
            const float from = qg_f16_max(highest);
            QG_UNROLL
            for (int j = 0; j < KEYS / 8; j++) {
                QG_UNROLL
                for (int e = 0; e < 2; e++) {
                    float & x = s[j][2 * r + e];
                    x         = qg_exp(x - from); // from here on the probability
                    sum[r] += x;
                }
            }
        }
        store(TYPE_V, shared_v);
        keys = tile_at(now.n > KEYS ? now.ib : now.ib + 1, now.n > KEYS ? now.base + KEYS : 0);
        bring(TYPE_K, keys.k, keys.n, p.k_row_bytes); // on its way while V is added up
        t.sync();                                     // V is there, and all have read Q and K
        QG_UNROLL
        for (int i = 0; i < KEYS / 16; i++) {
            const uint32_t a[4] = { qg_pair(s[2 * i][0], s[2 * i][1]), qg_pair(s[2 * i][2], s[2 * i][3]),
                                    qg_pair(s[2 * i + 1][0], s[2 * i + 1][1]), qg_pair(s[2 * i + 1][2], s[2 * i + 1][3]) };
            QG_UNROLL
            for (int j = 0; j < DIM / 8; j += 2) {
                uint32_t m[4]; // transposed: a product adds up along a register, and that is along the tokens
                t.load_matrices_transposed(m, shared_v + 16 * i * STRIDE + 8 * j, STRIDE, true);
                t.mma(out[j], a, m);
                t.mma(out[j + 1], a, m + 2);
            }
        }
        if (keys.ib < tile.n_blocks) {
            store_q_k(keys);
        }
        t.sync(); // K is there, and all have read V
    }
    QG_UNROLL
    for (int r = 0; r < 2; r++) {
        float total = sum[r] + t.shuffle_xor(sum[r], 1);
        total += t.shuffle_xor(total, 2);
        if (pos[r] < 0) {
            continue;
        }
        const float share = total == 0.0f ? 0.0f : 1.0f / total;
        float * to = (float *) p.dst + ((uint64_t) tile_rows[in_warp + lane / 4 + 8 * r] * p.n_head + head) * p.head_dim;
        QG_UNROLL
        for (int j = 0; j < DIM / 8; j++) {
            const int d = 8 * j + lane % 4 * 2;
            if (d < p.head_dim) {
                to[d]     = out[j][2 * r] * share;
                to[d + 1] = out[j][2 * r + 1] * share;
            }
        }
    }
}
