// attn-args.h: what a GPU kernel is launched with. Plain data, the same for host and device.

#pragma once

#if defined(__METAL_VERSION__)
#    include <metal_stdlib>
#else
#    include <stdint.h>
#endif

enum qg_kv_type { QG_F16 = 0, QG_Q8_0 = 1, QG_Q4_0 = 2 };

// one block of the paged KV as one sequence sees it
struct qg_block {
    uint64_t data;     // device address of the block
    int32_t  first;    // position of its first token in the sequence
    int32_t  n;        // tokens that belong to the sequence
    int32_t  modality; // 0 text, 1 visual
    int32_t  reserved;
};

struct qg_row {
    int32_t first_block; // of its sequence, in the table of blocks
    int32_t n_blocks;    // blocks that the row sees, in part or whole
    int32_t pos;
    int32_t q_own;       // row in the own Q
    int32_t modality;
    int32_t block;       // in the table of blocks: where its own K and V go
    int32_t k_row[2];    // row in the append's K: where text and visual rows keep K, where text rows alone do
};

// rows of one sequence and modality that a prefill thread block computes together
struct qg_tile {
    int32_t first;       // in the table of tile rows
    int32_t n;
    int32_t first_block; // of the sequence
    int32_t n_blocks;    // that any of the rows sees
    int32_t modality;
};

#define QG_THREADS 128 // threads of every kernel's block

struct qg_attn_args {
    uint64_t blocks;    // qg_block []
    uint64_t rows;      // qg_row [n_rows]
    uint64_t tiles;     // qg_tile [n_tiles]
    uint64_t tile_rows; // int32_t []: rows of the tiles, ordered by position
    uint64_t q_own;     // float [n][n_head][head_dim], or 0
    uint64_t q_leader;  // float [n_rows][n_head][head_dim], or 0
    uint64_t dst;       // float [n_rows][n_head][head_dim]
    uint64_t scores;    // float []: qg_score_index, or 0
    uint64_t vis_bias;  // float [n_head], or 0
    uint64_t partial;   // float [n_rows][n_head][n_splits][head_dim + 2]: sum, maximum and weighted V; used where n_splits > 1
    uint64_t v_limits;  // float [n_rows][n_head]: inherited keys with no higher logit need no V, or 0; see v-skip.h

    uint64_t k_offset[2][2]; // [row modality][key modality]
    uint64_t v_offset[2];
    int32_t  q_leads[2][2];  // [row modality][key modality]: 1 where Q and K are the leader's

    int32_t head_dim, n_head, n_head_kv, n_block_tokens;
    int32_t n_rows, n_tiles, n_splits, n_score_keys;
    int32_t k_row_bytes, v_row_bytes;
    int32_t score_op; // enum qcache_score_op
    float   scale;
    float   v_skip; // share of the attention that may be left out
    int32_t reserved;
};

struct qg_append_args {
    uint64_t blocks, rows;
    uint64_t k, v;           // float [n][n_head_kv][head_dim]; k may be 0
    uint64_t k_offset[2];    // by modality; ~0: none is kept
    uint64_t v_offset[2];
    int32_t  head_dim, n_head_kv, n_block_tokens, n_rows;
    int32_t  k_row_bytes, v_row_bytes, type_k, type_v;
    int32_t  k_kind;         // which of qg_row.k_row counts: 0 every row keeps K, 1 the text rows alone
};

// one layout for the host's compiler and the device's
static_assert(sizeof(qg_block) == 24 && sizeof(qg_row) == 32 && sizeof(qg_tile) == 20, "padding");
static_assert(sizeof(qg_attn_args) == 208, "padding");
static_assert(sizeof(qg_append_args) == 104, "padding");
