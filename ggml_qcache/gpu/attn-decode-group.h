// attn-decode-group.h: lazy attention of few query rows where three or more query heads share a KV head, on matrix units
//
// There the vector code of attn-decode.h would have more to compute than the memory of a large GPU leaves time for: a
// product takes 16 tokens and all 8 heads at once. A thread block has one row, up to 8 of the query heads that share a KV head,
// and a span of the row's KV blocks, which its warps take in turns, 16 tokens at a time, each warp with an online softmax of
// its own. K and V go from memory to registers as they lie: which dimensions and tokens a lane holds is chosen so that its
// 16 bytes are the operands, since sums don't depend on the order of what they add. Warps are merged at the end, spans by
// qg_attn_merge.
//
// K is exact, in q8_0 and q4_0 too, and Q and the probabilities are two f16 numbers each, which keeps 22 bits; V of quantised
// types is rounded to f16.
//
// Lane l: row = l / 4, quad = l % 4. Logits [token][head]: the lane has tokens row and row + 8, heads 2 quad and 2 quad + 1.
// Output [dimension][head]: m-tile (half, i) has dimensions 64 half + 8 row + 2 i and the one after it as rows `row` and
// `row + 8`, the same heads. Tokens of V: 2 quad + { 0, 1, 8, 9 }.
//
// grid: (n_head_kv * ceil(n_group / 8), n_rows, n_splits)

#pragma once

#include "attn-decode.h"

constexpr int QG_GROUP_HEADS  = 8;  // of a product
constexpr int QG_GROUP_TOKENS = 16; // of a product
constexpr int QG_GROUP_BLOCKS = QG_THREADS / 32; // KV blocks under way at once

// bytes of shared memory: what each warp has found for each head
QG_BOTH constexpr int qg_decode_group_shared(int dim) { return QG_GROUP_BLOCKS * QG_GROUP_HEADS * (dim + 2) * (int) sizeof(float); }

// x as the sum of two f16 numbers
QG_DEVICE void qg_split(float a, float b, uint32_t & high, uint32_t & low) {
    high = qg_pair(a, b);
    float rounded_a, rounded_b;
    qg_halves(high, rounded_a, rounded_b);
    low = qg_pair(a - rounded_a, b - rounded_b);
}

// DIM: head_dim rounded up to a multiple of 64 for which there is a kernel; what is over is zero
template <int DIM, int TYPE_K, int TYPE_V, class T> QG_DEVICE void qg_attn_decode_group(T & t, const qg_attn_args & p) {
    constexpr int CHUNKS = DIM / 32; // of K: the four lanes of a row take 8 dimensions each
    constexpr int HALVES = DIM / 64; // of V: eight lanes do

    const int n_group  = p.n_head / p.n_head_kv;
    const int n_chunks = (n_group + QG_GROUP_HEADS - 1) / QG_GROUP_HEADS;
    const int kv_head  = t.block_x() / n_chunks;
    const int in_group = t.block_x() % n_chunks * QG_GROUP_HEADS;
    const int head     = kv_head * n_group + in_group;
    const int n_heads  = qg_min(QG_GROUP_HEADS, n_group - in_group);
    const int ir       = t.block_y();
    const int in_tile  = t.lane() / 4; // "row" above
    const int quad     = t.lane() % 4;

    const qg_row     row      = ((const qg_row *) p.rows)[ir];
    const qg_block * blocks   = (const qg_block *) p.blocks + row.first_block;
    const int        per      = (row.n_blocks + p.n_splits - 1) / p.n_splits;
    const int        ib_first = per * t.block_z();
    const int        ib_end   = qg_min(row.n_blocks, ib_first + per);

    uint32_t q_high[CHUNKS][4], q_low[CHUNKS][4]; // of head `in_tile`, over q_unit
    float    q_unit[2] = { 0.0f, 0.0f };          // of heads 2 quad and 2 quad + 1: a power of two
    int      loaded    = -1;                      // which of own (0) and leader's (1) is there
    QG_UNROLL
    for (int c = 0; c < CHUNKS; c++) {
        QG_UNROLL
        for (int w = 0; w < 4; w++) {
            q_high[c][w] = q_low[c][w] = 0;
        }
    }

    float acc[HALVES][4][4], max[2] = { -INFINITY, -INFINITY }, sum[2] = { 0.0f, 0.0f };
    QG_UNROLL
    for (int h = 0; h < HALVES; h++) {
        QG_UNROLL
        for (int i = 0; i < 4; i++) {
            acc[h][i][0] = acc[h][i][1] = acc[h][i][2] = acc[h][i][3] = 0.0f;
        }
    }

    for (int ib = ib_first + t.warp(); ib < ib_end; ib += QG_GROUP_BLOCKS) {
        const qg_block  block  = blocks[ib];
        const int       n      = qg_min(block.n, row.pos - block.first + 1);
        const int       leads  = p.q_leads[row.modality][block.modality];
        const bool      reads  = p.score_op == 2 && leads;
        const bool      skips  = reads && p.v_limits != 0;
        const bool      bias   = p.vis_bias != 0 && row.modality == 0 && block.modality == 1;
        const uint64_t  first  = (uint64_t) kv_head * p.n_block_tokens;
        float *         scores = p.score_op != 0 ? (float *) p.scores + qg_score_index(p, ir, head, block) : nullptr;
        const uint8_t * k      = (const uint8_t *) block.data + p.k_offset[row.modality][block.modality] + first * p.k_row_bytes;
        const uint8_t * v      = (const uint8_t *) block.data + p.v_offset[block.modality] + first * p.v_row_bytes;

        if (!reads && loaded != leads) {
            const float * from = leads ? (const float *) p.q_leader + ((uint64_t) ir * p.n_head + head + in_tile) * p.head_dim
                                       : (const float *) p.q_own + ((uint64_t) row.q_own * p.n_head + head + in_tile) * p.head_dim;
            float largest = 0.0f;
            for (int c = 0; c < CHUNKS; c++) {
                for (int i = 0; i < 8; i++) {
                    const int   d = 32 * c + 8 * quad + i;
                    const float x = in_tile < n_heads && d < p.head_dim ? from[d] : 0.0f;
                    largest       = qg_max(x < 0.0f ? -x : x, largest);
                }
            }
            largest          = qg_max(t.shuffle_xor(largest, 1), largest);
            largest          = qg_max(t.shuffle_xor(largest, 2), largest);
            const float unit = qg_power_below(largest);
            QG_UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                QG_UNROLL
                for (int w = 0; w < 4; w++) {
                    const int  d     = 32 * c + 8 * quad + 2 * w;
                    const bool there = in_tile < n_heads && d < p.head_dim;
                    qg_split(there ? from[d] / unit : 0.0f, there ? from[d + 1] / unit : 0.0f, q_high[c][w], q_low[c][w]);
                }
            }
            q_unit[0] = t.shuffle(unit, 8 * quad);
            q_unit[1] = t.shuffle(unit, 8 * quad + 4);
            loaded    = leads;
        }
        for (int base = 0; base < n; base += QG_GROUP_TOKENS) {
            // all that this turn reads is asked for before anything waits
            qg_raw8 raw_k[CHUNKS][2], raw_v[HALVES][4];
            float   s[4]; // [2 r + e]: token in_tile + 8 r, head 2 quad + e
            QG_UNROLL
            for (int r = 0; r < 2; r++) {
                const int token = base + in_tile + 8 * r;
                QG_UNROLL
                for (int c = 0; c < CHUNKS; c++) {
                    qg_zero8(raw_k[c][r]);
                    if (!reads && token < n && 8 * (4 * c + quad) < p.head_dim) {
                        qg_load8(TYPE_K, k + token * p.k_row_bytes, 4 * c + quad, raw_k[c][r]);
                    }
                }
                QG_UNROLL
                for (int e = 0; e < 2; e++) {
                    const int g  = 2 * quad + e;
                    s[2 * r + e] = reads && token < n && g < n_heads ? scores[g * block.n + token] : 0.0f;
                }
            }
            uint32_t   kept   = ~0u; // four bits for each token: one of them says that some head wants its V
            const auto load_v = [&]() {
                QG_UNROLL
                for (int u = 0; u < 4; u++) {
                    const int token = 2 * quad + u % 2 + u / 2 * 8;
                    QG_UNROLL
                    for (int h = 0; h < HALVES; h++) {
                        qg_zero8(raw_v[h][u]); // what lies past the tokens is not V: 0 times NaN would be NaN
                        if (base + token < n && 8 * (8 * h + in_tile) < p.head_dim && (kept_of(u / 2) >> 4 * (token % 8) & 15)) {
                            qg_load8(TYPE_V, v + (base + token) * p.v_row_bytes, 8 * h + in_tile, raw_v[h][u]);
                        }
                    }
                }
            };
