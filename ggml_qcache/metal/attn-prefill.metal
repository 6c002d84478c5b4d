// attn-prefill.metal: lazy attention of many query rows on simdgroup_matrix
//
// A threadgroup has one query head and a tile of up to 32 rows of one sequence and modality; each of its four SIMD groups
// has 8 of them. Q and a tile of K, then of V, lie in threadgroup memory as f16; products are 8x8 with f32 sums. Which lane
// holds which element of a simdgroup_matrix is not specified, so the softmax goes through threadgroup memory: logits are
// stored there as f32, four lanes take a row, and leave its probabilities as f16 in the row's place. Sums are rescaled by a
// product with a diagonal matrix. It would spread a NaN from its row to others (0 times NaN), so NaN is kept in the row's
// sum alone and comes back with the division at the end.
//
// grid: (n_tiles, n_head, 1)

#include "../gpu/kv.h"
#include "prefill-shape.h"
#include "thread.metal"

#include <metal_simdgroup_matrix>

// KEYS rows of K or V from `from` on as f16; zeros past the n-th and past head_dim
template <int DIM>
inline void qg_metal_stage(thread qg_metal_thread & t, int type, device const uint8_t * from, int row_bytes, int n, int head_dim,
                           threadgroup half * to) {
    for (int i = t.index(); i < qg_metal_prefill_keys(DIM) * DIM / 8; i += QG_THREADS) {
        const int token = i / (DIM / 8), chunk = i % (DIM / 8);
        qg_u4     eight = qg_u4(0);
        if (token < n && 8 * chunk < head_dim) {
            qg_raw8 raw;
            qg_load8(type, from, token * row_bytes, chunk, raw);
            eight = qg_halves8(type, raw, chunk);
        }
        *(threadgroup qg_u4 *) (to + token * qg_metal_prefill_stride(DIM) + 8 * chunk) = eight;
    }
}

// DIM: head_dim rounded up to one for which there is a kernel; what is over is zero
template <int DIM> inline void qg_metal_prefill(thread qg_metal_thread & t, constant const qg_attn_args & p, int type_k, int type_v) {
    constexpr int KEYS = qg_metal_prefill_keys(DIM), STRIDE = qg_metal_prefill_stride(DIM), LOGITS = qg_metal_prefill_logits(DIM);
    constexpr int EACH = KEYS / 4; // logits of a row that one lane takes

    const qg_tile          tile      = ((device const qg_tile *) p.tiles)[t.block_x()];
    device const int32_t * tile_rows = (device const int32_t *) p.tile_rows + tile.first;
    device const qg_row *  rows      = (device const qg_row *) p.rows;
    const int              head_dim  = qg_head_dim(p);
    const int              head      = t.block_y();
    const int              kv_head   = head / (p.n_head / p.n_head_kv);
    const int              in_group  = t.lane() / 4; // row of the SIMD group's 8
    const int              part      = t.lane() % 4; // of that row
    const int              in_tile   = 8 * t.warp() + in_group;

    threadgroup half *  shared_q  = (threadgroup half *) t.shared();        // [QG_METAL_TILE_ROWS][STRIDE]
    threadgroup half *  shared_kv = shared_q + QG_METAL_TILE_ROWS * STRIDE; // [KEYS][STRIDE]
    threadgroup float * logits    = (threadgroup float *) (shared_kv + KEYS * STRIDE) + 8 * t.warp() * LOGITS; // [8][LOGITS], this SIMD group's
    threadgroup float * diagonal  = logits + KEYS;                                                              // [8][8] in the same rows
    threadgroup half *  weights   = (threadgroup half *) logits;                                                // [8][2 LOGITS] likewise

    threadgroup float * own_logits  = logits + in_group * LOGITS + part * EACH; // this lane's
    threadgroup half *  own_weights = weights + in_group * 2 * LOGITS + part * EACH;

    // what comes after may not be written yet
    const int n_seen = rows[tile_rows[tile.n - 1]].pos + 1;
    const int pos    = in_tile < tile.n ? rows[tile_rows[in_tile]].pos : -1; // -1: there is no such row

    simdgroup_float8x8 out[DIM / 8];
    QG_UNROLL
    for (int j = 0; j < DIM / 8; j++) {
        out[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    float highest = -INFINITY, sum = 0.0f;
    int   loaded = -1;

    for (int ib = 0; ib < tile.n_blocks; ib++) {
        const qg_block         block = ((device const qg_block *) p.blocks)[tile.first_block + ib];
        const int              leads = p.q_leads[tile.modality][block.modality];
        const int              n     = qg_min(block.n, n_seen - block.first);
        const bool             bias  = p.vis_bias != 0 && tile.modality == 0 && block.modality == 1;
        const float            delta = bias ? ((device const float *) p.vis_bias)[head] : 0.0f;
        const uint64_t         first = (uint64_t) kv_head * p.n_block_tokens;
        device const uint8_t * data  = (device const uint8_t *) block.data;
        device const uint8_t * k     = data + p.k_offset[tile.modality][block.modality] + first * p.k_row_bytes;
        device const uint8_t * v     = data + p.v_offset[block.modality] + first * p.v_row_bytes;

        if (leads != loaded) {
            // the last tile of Q was read before the barriers around the last tile of V
            for (int i = t.index(); i < QG_METAL_TILE_ROWS * DIM / 8; i += QG_THREADS) {
                const int r = i / (DIM / 8), chunk = i % (DIM / 8);
                qg_u4     eight = qg_u4(0);
                if (r < tile.n && 8 * chunk < head_dim) {
                    const int            ir   = tile_rows[r];
                    device const float * from = qg_q_of(p, ir, rows[ir].q_own, head, leads);
                    float x[8];
                    QG_UNROLL
                    for (int e = 0; e < 8; e++) {
                        x[e] = from[8 * chunk + e] * p.scale;
                    }
                    eight = qg_eight(x);
                }
                *(threadgroup qg_u4 *) (shared_q + r * STRIDE + 8 * chunk) = eight;
            }
            loaded = leads;
        }
        for (int base = 0; base < n; base += KEYS) {
            t.sync(); // all have read the last tile of V
            qg_metal_stage<DIM>(t, type_k, k + (uint64_t) base * p.k_row_bytes, p.k_row_bytes, n - base, head_dim, shared_kv);
            t.sync();

            simdgroup_float8x8 s[KEYS / 8];
            QG_UNROLL
            for (int j = 0; j < KEYS / 8; j++) {
                s[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            }
            QG_UNROLL
            for (int d = 0; d < DIM; d += 8) {
                simdgroup_half8x8 q;
                simdgroup_load(q, shared_q + 8 * t.warp() * STRIDE + d, STRIDE);
                QG_UNROLL
                for (int j = 0; j < KEYS / 8; j++) {
                    simdgroup_half8x8 keys;
                    simdgroup_load(keys, shared_kv + 8 * j * STRIDE + d, STRIDE, ulong2(0, 0), true);
                    simdgroup_multiply_accumulate(s[j], q, keys, s[j]);
                }
            }
            QG_UNROLL
            for (int j = 0; j < KEYS / 8; j++) {
                simdgroup_store(s[j], logits + 8 * j, LOGITS);
            }
            t.sync_warp();

            float x[EACH], new_highest = highest;
            QG_UNROLL
            for (int e = 0; e < EACH; e++) {
                const int token = base + part * EACH + e;
                x[e]            = token < n && block.first + token <= pos ? qg_clamp(qg_clamp(own_logits[e]) + delta) : -INFINITY;
                new_highest     = qg_max(x[e], new_highest);
            }
            new_highest       = qg_max(t.shuffle_xor(new_highest, 1), new_highest); // the four lanes of a row
            new_highest       = qg_max(t.shuffle_xor(new_highest, 2), new_highest);
            const float scale = highest == new_highest ? 1.0f : highest == -INFINITY ? 0.0f : qg_exp(highest - new_highest);
            highest           = new_highest;
            sum *= scale;
            t.sync_warp(); // the lanes of a row have read its logits
            QG_UNROLL
            for (int e = 0; e < EACH; e++) {
                const float weight = x[e] == -INFINITY ? 0.0f : qg_exp(x[e] - highest);
                sum += weight;
                own_weights[e] = weight == weight ? (half) weight : (half) 0.0f;
            }
            QG_UNROLL
            for (int e = 0; e < 2; e++) {
                diagonal[in_group * LOGITS + 2 * part + e] = 2 * part + e == in_group ? scale : 0.0f;
            }
            t.sync(); // all have read the tile of K
            qg_metal_stage<DIM>(t, type_v, v + (uint64_t) base * p.v_row_bytes, p.v_row_bytes, n - base, head_dim, shared_kv);
            t.sync();

            if (simd_any(scale != 1.0f)) {
                simdgroup_float8x8 scales;
                simdgroup_load(scales, diagonal, LOGITS);
                QG_UNROLL
                for (int j = 0; j < DIM / 8; j++) {
                    simdgroup_multiply(out[j], scales, out[j]);
                }
            }
            QG_UNROLL
            for (int i = 0; i < KEYS / 8; i++) {
                simdgroup_half8x8 w;
                simdgroup_load(w, weights + 8 * i, 2 * LOGITS);
                QG_UNROLL
                for (int j = 0; j < DIM / 8; j++) {
                    simdgroup_half8x8 values;
                    simdgroup_load(values, shared_kv + 8 * i * STRIDE + 8 * j, STRIDE);
                    simdgroup_multiply_accumulate(out[j], w, values, out[j]);
                }
            }
        }
    }

    sum += t.shuffle_xor(sum, 1);
    sum += t.shuffle_xor(sum, 2);
    QG_UNROLL
    for (int j = 0; j < DIM / 8; j += KEYS / 8) { // as many columns as there is room for in the rows of logits
        t.sync_warp();                            // they have been read
        QG_UNROLL
        for (int i = 0; i < KEYS / 8; i++) {
            simdgroup_store(out[j + i], logits + 8 * i, LOGITS);
        }
        t.sync_warp();
        if (pos >= 0) {
            device float * to = (device float *) p.dst + ((uint64_t) tile_rows[in_tile] * p.n_head + head) * head_dim;
            QG_UNROLL
            for (int e = 0; e < EACH; e++) {
                const int d = 8 * j + part * EACH + e;
                if (d < head_dim) {
                    to[d] = sum == 0.0f ? 0.0f : own_logits[e] / sum;
                }
            }
        }
    }
}
