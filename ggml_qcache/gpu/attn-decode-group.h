// attn-decode-group.h: lazy attention of few query rows where three or more query heads share a KV head, on matrix units
//
// There the vector code of attn-decode.h has more to compute than the memory of a large GPU leaves time for; here a product
// takes 16 tokens and 8 heads at once. A thread block has one row, up to 8 of the query heads that share a KV head, and a span
// of the row's KV blocks. Its warps take a block each, 16 tokens at a time, with an online softmax of their own. K and V go from
// memory to registers as they lie: which dimensions and tokens a lane holds is chosen so that its 16 bytes are operands,
// since sums don't depend on the order of what they add. Warps are merged at the end, spans by qg_attn_merge.
//
// K is exact in every type. Q and the probabilities are two f16 numbers each, which keeps 22 bits. V of quantised types is
// rounded to f16.
//
// Lane l: place = l / 4, quad = l % 4. Logits: tokens `place` and `place + 8`, heads 2 quad and 2 quad + 1. Output: dimensions
// 64 half + 8 place + 0 .. 7, the same heads. V: tokens 2 quad + { 0, 1, 8, 9 }.
//
// grid: (n_head_kv * ceil(n_group / 8), n_rows, n_splits)

#pragma once

#include "attn-decode.h"

constexpr int QG_GROUP_HEADS  = 8;               // of a product
constexpr int QG_GROUP_TOKENS = 16;              // of a product
constexpr int QG_GROUP_WARPS  = QG_THREADS / 32; // KV blocks under way in a thread block

// bytes of shared memory: first Q, then what each warp has found for each head, which is more
QG_BOTH constexpr int qg_decode_group_shared(int dim) { return QG_GROUP_WARPS * QG_GROUP_HEADS * (dim + 2) * 4; }

// whether a row takes Q from there for keys whose logits it can't read; source: own (0), leader's (1)
QG_DEVICE bool qg_uses_source(const qg_attn_args & p, int modality, int source) {
    return (p.q_leads[modality][0] == source || p.q_leads[modality][1] == source) && !(source == 1 && p.score_op == 2);
}

// a and b as the sums of two f16 numbers each
QG_DEVICE void qg_split(float a, float b, uint32_t & high, uint32_t & low) {
    float rounded_a, rounded_b;
    high = qg_pair(a, b);
    qg_halves(high, rounded_a, rounded_b);
    low = qg_pair(a - rounded_a, b - rounded_b);
}

// DIM: head_dim rounded up to a multiple of 64 for which there is a kernel; what is over is zero
template <int DIM, int TYPE_K, int TYPE_V, class T> QG_DEVICE void qg_attn_decode_group(T & t, const qg_attn_args & p) {
    constexpr int CHUNKS = DIM / 32; // of K, a group of quantised ones: the four lanes of a token take 8 dimensions each
    constexpr int HALVES = DIM / 64; // of V: eight lanes do
    static_assert(CHUNKS * 2048 + 64 <= qg_decode_group_shared(DIM), "there is room for Q");

    const int n_group  = p.n_head / p.n_head_kv;
    const int n_parts  = (n_group + QG_GROUP_HEADS - 1) / QG_GROUP_HEADS;
    const int kv_head  = t.block_x() / n_parts;
    const int in_group = t.block_x() % n_parts * QG_GROUP_HEADS;
    const int head     = kv_head * n_group + in_group;
    const int n_heads  = qg_min(QG_GROUP_HEADS, n_group - in_group);
    const int ir       = t.block_y();
    const int place    = t.lane() / 4;
    const int quad     = t.lane() % 4;

    const qg_row     row      = ((const qg_row *) p.rows)[ir];
    const qg_block * blocks   = (const qg_block *) p.blocks + row.first_block;
    const int        per      = (row.n_blocks + p.n_splits - 1) / p.n_splits;
    const int        ib_first = per * t.block_z();
    const int        ib_end   = qg_min(row.n_blocks, ib_first + per);

    // A warp for each source of Q that counts, own (0) and leader's (1). A lane has head `place`, dimensions 32 c + 8 quad + 0 .. 7,
    // over a power of two that leaves all of their bits to f16.
    qg_u4 *   q      = (qg_u4 *) t.shared();                // [source][CHUNKS][high, low][lane]
    float *   units  = (float *) (q + 2 * CHUNKS * 2 * 32); // [source][QG_GROUP_HEADS]: that power
    const int source = t.warp();
    if (source < 2 && qg_uses_source(p, row.modality, source)) {
        const float * from    = qg_q_of(p, ir, row.q_own, head + place, source == 1);
        const int     n_dims  = place < n_heads ? p.head_dim : 0;
        float         largest = 0.0f;
        for (int c = 0; c < CHUNKS; c++) {
            for (int i = 0; i < 8; i++) {
                const int d = 32 * c + 8 * quad + i;
                largest     = d < n_dims ? qg_max(from[d] < 0.0f ? -from[d] : from[d], largest) : largest;
            }
        }
        largest          = qg_max(t.shuffle_xor(largest, 1), largest);
        largest          = qg_max(t.shuffle_xor(largest, 2), largest);
        const float unit = qg_power_of_two(largest), per_unit = 1.0f / unit;
        for (int c = 0; c < CHUNKS; c++) {
            float    x[8];
            uint32_t high[4], low[4];
            QG_UNROLL
            for (int i = 0; i < 8; i++) {
                const int d = 32 * c + 8 * quad + i;
                x[i]        = d < n_dims ? from[d] * per_unit : 0.0f;
            }
            QG_UNROLL
            for (int w = 0; w < 4; w++) {
                qg_split(x[2 * w], x[2 * w + 1], high[w], low[w]);
            }
            qg_u4 * to = q + (source * CHUNKS + c) * 2 * 32 + t.lane();
            to[0]      = { high[0], high[1], high[2], high[3] };
            to[32]     = { low[0], low[1], low[2], low[3] };
        }
        if (quad == 0) {
            units[source * QG_GROUP_HEADS + place] = unit;
        }
    }
    t.sync();

    // of dimensions 64 half + 8 place + 2 w (first two) and the one after (last two)
    float acc[HALVES][4][4], max[2] = { -INFINITY, -INFINITY }, sum[2] = { 0.0f, 0.0f };
    QG_UNROLL
    for (int half = 0; half < HALVES; half++) {
        QG_UNROLL
        for (int w = 0; w < 4; w++) {
            acc[half][w][0] = acc[half][w][1] = acc[half][w][2] = acc[half][w][3] = 0.0f;
        }
    }

    qg_block next = blocks[qg_min(ib_first + t.warp(), row.n_blocks - 1)];
    for (int ib = ib_first + t.warp(); ib < ib_end; ib += QG_GROUP_WARPS) {
        const qg_block block = next;
        next                 = blocks[qg_min(ib + QG_GROUP_WARPS, row.n_blocks - 1)]; // its place is known before its turn comes

        const int       n      = qg_min(block.n, row.pos - block.first + 1);
        const int       leads  = p.q_leads[row.modality][block.modality];
        const bool      reads  = p.score_op == 2 && leads;
        const bool      skips  = reads && p.v_limits != 0;
        const bool      bias   = p.vis_bias != 0 && row.modality == 0 && block.modality == 1;
        const uint64_t  first  = (uint64_t) kv_head * p.n_block_tokens;
        float *         scores = p.score_op != 0 ? (float *) p.scores + qg_score_index(p, ir, head, block) : nullptr;
        const uint8_t * k      = (const uint8_t *) block.data + p.k_offset[row.modality][block.modality] + first * p.k_row_bytes;
        const uint8_t * v      = (const uint8_t *) block.data + p.v_offset[block.modality] + first * p.v_row_bytes;

        const float * unit      = units + leads * QG_GROUP_HEADS + 2 * quad;
        const float   factor[2] = { reads ? 0.0f : p.scale * unit[0], reads ? 0.0f : p.scale * unit[1] }; // no Q, no unit

        for (int base = 0; base < n; base += QG_GROUP_TOKENS) {
            // All that this turn reads is asked for before anything waits.
            qg_raw8 raw_k[CHUNKS][2], raw_v[HALVES][4];
            float   s[4]; // [2 r + e]: token place + 8 r, head 2 quad + e
            QG_UNROLL
            for (int r = 0; r < 2; r++) {
                const int token = base + place + 8 * r;
                QG_UNROLL
                for (int c = 0; c < CHUNKS; c++) {
                    qg_zero8(raw_k[c][r]);
                    // every lane of a token needs its group's scale, past head_dim too: what is there is padding
                    if (!reads && token < n && (TYPE_K == QG_F16 ? 32 * c + 8 * quad : 32 * c) < p.head_dim) {
                        qg_load8(TYPE_K, k, token * p.k_row_bytes, 4 * c + quad, raw_k[c][r]);
                    }
                }
                QG_UNROLL
                for (int e = 0; e < 2; e++) {
                    const int g  = 2 * quad + e;
                    s[2 * r + e] = reads && token < n && g < n_heads ? scores[g * block.n + token] : 0.0f;
                }
            }
            const auto load_v = [&](uint32_t kept_first, uint32_t kept_last) { // four bits a token of 8, one of them set: V is wanted
                QG_UNROLL
                for (int u = 0; u < 4; u++) {
                    const int  token  = 2 * quad + u % 2 + u / 2 * 8;
                    const bool wanted = base + token < n && ((u < 2 ? kept_first : kept_last) >> 4 * (token % 8) & 15) != 0;
                    QG_UNROLL
                    for (int half = 0; half < HALVES; half++) {
                        qg_zero8(raw_v[half][u]); // what lies past the tokens is not V: 0 times NaN would be NaN
                        if (wanted && 8 * (8 * half + place) < p.head_dim) {
                            qg_load8(TYPE_V, v, (base + token) * p.v_row_bytes, 8 * half + place, raw_v[half][u]);
                        }
                    }
                }
            };
            if (!skips) {
                load_v(~0u, ~0u);
            }
            if (!reads) {
                QG_UNROLL
                for (int c = 0; c < CHUNKS; c++) {
                    qg_u4 words[2];
                    float scale[2];
                    QG_UNROLL
                    for (int r = 0; r < 2; r++) {
                        scale[r] = qg_unscaled8(TYPE_K, raw_k[c][r], 4 * c + quad, words[r]);
                    }
                    const uint32_t left[4] = { words[0].x, words[1].x, words[0].y, words[1].y };
                    const uint32_t right[4] = { words[0].z, words[1].z, words[0].w, words[1].w };
                    float          part[4]  = { 0.0f, 0.0f, 0.0f, 0.0f };
                    QG_UNROLL
                    for (int of = 1; of >= 0; of--) { // the low parts first
                        const qg_u4    eight       = q[((leads * CHUNKS + c) * 2 + of) * 32 + t.lane()];
                        const uint32_t q_left[2]  = { eight.x, eight.y }, q_right[2] = { eight.z, eight.w };
                        t.mma(part, left, q_left);
                        t.mma(part, right, q_right);
                    }
                    QG_UNROLL
                    for (int i = 0; i < 4; i++) {
                        s[i] += scale[i / 2] * part[i];
                    }
                }
            }
            QG_UNROLL
            for (int i = 0; i < 4; i++) {
                const int token = base + place + i / 2 * 8, g = 2 * quad + i % 2;
                if (!reads) {
                    s[i] = qg_clamp(s[i] * factor[i % 2]);
                    if (p.score_op == 1 && token < n && g < n_heads) {
                        scores[g * block.n + token] = s[i];
                    }
                }
                if (bias && g < n_heads) {
                    s[i] = qg_clamp(s[i] + ((const float *) p.vis_bias)[head + g]);
                }
                s[i] = token < n && g < n_heads ? s[i] : -INFINITY;
            }
            if (skips) {
                bool wants[2] = { false, false };
                QG_UNROLL
                for (int i = 0; i < 4; i++) {
                    const int g = 2 * quad + i % 2;
                    if (g < n_heads) {
                        wants[i / 2] = wants[i / 2] || !(s[i] <= ((const float *) p.v_limits)[(uint64_t) ir * p.n_head + head + g]);
                    }
                }
                load_v(t.ballot(wants[0]), t.ballot(wants[1]));
            }
            QG_UNROLL
            for (int e = 0; e < 2; e++) {
                float highest = qg_max(s[e], max[e]);
                highest       = qg_max(s[2 + e], highest);
                highest       = qg_max(t.shuffle_xor(highest, 4), highest); // the eight lanes of a head
                highest       = qg_max(t.shuffle_xor(highest, 8), highest);
                highest       = qg_max(t.shuffle_xor(highest, 16), highest);
                if (highest > max[e]) {
                    const float scale = qg_exp(max[e] - highest);
                    max[e]            = highest;
                    sum[e] *= scale;
                    QG_UNROLL
                    for (int half = 0; half < HALVES; half++) {
                        QG_UNROLL
                        for (int w = 0; w < 4; w++) {
                            acc[half][w][e] *= scale;
                            acc[half][w][2 + e] *= scale;
                        }
                    }
                }
                const float from = qg_f16_max(max[e]);
                s[e]             = qg_exp(s[e] - from); // from here on the probability
                s[2 + e]         = qg_exp(s[2 + e] - from);
                sum[e] += s[e] + s[2 + e];
            }
            uint32_t high[2], low[2];
            QG_UNROLL
            for (int r = 0; r < 2; r++) {
                qg_split(s[2 * r], s[2 * r + 1], high[r], low[r]);
                high[r] = t.transpose(high[r]); // a product adds up along a register, and that is along the tokens
                low[r]  = t.transpose(low[r]);
            }
            QG_UNROLL
            for (int half = 0; half < HALVES; half++) {
                uint32_t words[4][4]; // [token][two dimensions]
                QG_UNROLL
                for (int u = 0; u < 4; u++) {
                    const qg_u4 eight = qg_halves8(TYPE_V, raw_v[half][u], 8 * half + place);
                    words[u][0]       = eight.x;
                    words[u][1]       = eight.y;
                    words[u][2]       = eight.z;
                    words[u][3]       = eight.w;
                }
                QG_UNROLL
                for (int w = 0; w < 4; w++) {
                    const uint32_t a[4] = { qg_low_halves(words[0][w], words[1][w]), qg_high_halves(words[0][w], words[1][w]),
                                            qg_low_halves(words[2][w], words[3][w]), qg_high_halves(words[2][w], words[3][w]) };
                    float          part[4] = { 0.0f, 0.0f, 0.0f, 0.0f }; // a product's own sums are cut off, not rounded
                    t.mma(part, a, low);
                    t.mma(part, a, high);
                    QG_UNROLL
                    for (int i = 0; i < 4; i++) {
                        acc[half][w][i] += part[i];
                    }
                }
            }
        }
    }

    t.sync(); // all have read Q
    float *   shared = (float *) t.shared(); // [QG_GROUP_WARPS][QG_GROUP_HEADS][head_dim + 2]
    const int stride = p.head_dim + 2;
    QG_UNROLL
    for (int e = 0; e < 2; e++) {
        float * to = shared + (t.warp() * QG_GROUP_HEADS + 2 * quad + e) * stride;
        sum[e] += t.shuffle_xor(sum[e], 4);
        sum[e] += t.shuffle_xor(sum[e], 8);
        sum[e] += t.shuffle_xor(sum[e], 16);
        if (place == 0) {
            to[0] = sum[e];
            to[1] = max[e];
        }
        QG_UNROLL
        for (int half = 0; half < HALVES; half++) {
            QG_UNROLL
            for (int w = 0; w < 4; w++) {
                const int d = 64 * half + 8 * place + 2 * w;
                if (d < p.head_dim) {
                    to[2 + d] = acc[half][w][e];
                    to[3 + d] = acc[half][w][2 + e];
                }
            }
        }
    }
    t.sync();
    for (int i = t.index(); i < n_heads * p.head_dim; i += QG_THREADS) {
        const int g = i / p.head_dim, d = i % p.head_dim;
        qg_put(p, ir, head + g, t.block_z(), d, qg_merge(shared + g * stride, QG_GROUP_WARPS, QG_GROUP_HEADS * stride, d));
    }
}
