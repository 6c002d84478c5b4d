// qcache-op.h: the lazy-attention operation, as a ggml node and as plain kernels
//
// Everything a kernel needs is in qcache_attn_params: raw pointers and sizes, no tensors, no allocation.
//
// One block of the paged KV holds n_block_tokens tokens of one modality, for all layers, in one allocation. Inside it
// a layer's V starts at v_offset[key modality] and the K it attends to (its own or its leader's, which depends on the
// row's modality too) at k_offset[row modality][key modality].
// K and V of a layer in a block are head-major: [row_bytes(head_dim), n_block_tokens, n_head_kv], one row per token.

#pragma once

#include <cstddef>
#include <cstdint>

struct ggml_context;
struct ggml_tensor;

// where a query row finds its logits' source
enum qcache_q_source : int8_t { QCACHE_Q_OWN = 0, QCACHE_Q_LEADER = 1 };

enum qcache_score_op : int8_t {
    QCACHE_SCORE_NONE  = 0,
    QCACHE_SCORE_WRITE = 1, // a leader: leave the logits of every key for the lazy layers
    QCACHE_SCORE_READ  = 2, // a lazy layer: logits of inherited keys are read, their K is not
};

struct qcache_attn_block {
    uint8_t * data;     // the block's allocation, an address of the device that runs the kernel
    int32_t   first;    // position of its first token in the sequence
    int32_t   n;        // tokens in it that belong to the sequence, 1 .. n_block_tokens
    int8_t    modality; // enum qcache_modality
    struct ggml_backend_buffer * buffer; // that data lies in; the composed path and a GPU need it
};

struct qcache_attn_seq {
    const qcache_attn_block * blocks; // ordered by first, without gaps: blocks[i + 1].first == blocks[i].first + blocks[i].n
    int32_t                   n_blocks;
};

struct qcache_attn_row {
    int32_t seq;      // index into seqs
    int32_t pos;      // position; the row attends to keys 0 .. pos
    int32_t q_own;    // row in the own Q tensor; read only where the layer needs an own query for this row
    int32_t block;    // index in seqs[seq].blocks of the block that holds position pos
    int8_t  modality; // enum qcache_modality
};

// what all layers of one step share; lives as long as the graph
struct qcache_attn_step {
    const qcache_attn_seq * seqs;
    const qcache_attn_row * rows;    // rows of one sequence are adjacent or not: no order may be assumed
    int32_t                 n_seqs;
    int32_t                 n_rows;
    float *                 scores;      // score cache, raw logits (scaled, no bias), at qcache_score_index; or NULL
    int32_t                 n_score_keys; // keys that a row has room for, >= qcache_n_score_keys
    struct ggml_backend_buffer * scores_buffer; // that scores lie in; only a GPU needs it
};

// Where the logits of a row and head for the keys of a block lie: for each row one block after the
// other, [n_head][block.n] of each, in which order a kernel reads them.
static inline size_t qcache_score_index(const qcache_attn_step & step, int32_t n_head, int32_t row, int32_t head, const qcache_attn_block & block) {
    return ((size_t) row * step.n_score_keys + block.first) * n_head + (size_t) head * block.n;
}

// all keys of the blocks that any row sees
int32_t qcache_n_score_keys(const qcache_attn_step & step);

// one layer
struct qcache_attn_params {
    int32_t         head_dim;
    int32_t         n_head;
    int32_t         n_head_kv;
    int32_t         n_block_tokens;
    int32_t         type_k;          // ggml_type
    int32_t         type_v;
    float           scale;           // 1 / sqrt(head_dim), usually
    // in visual mode a visual row reads the leader's K of text keys (PAPER.md's table) while a text row reads its own
    size_t          k_offset[2][2];  // [row modality][key modality]: own K or leader's K, in step with q_source
    size_t          v_offset[2];     // [key modality]
    qcache_q_source q_source[2][2];  // [row modality][key modality]
    qcache_score_op score_op;
    const float *   vis_bias;        // δ [n_head], added to the logits of (text row, visual key) pairs; or NULL
    float           v_skip;          // share of a row's attention that a lazy decode step may leave out; 0: none
    const qcache_attn_step * step;
};

// bytes of one K or V row; a head_dim that does not fill its last group of a quantised type is padded with zeros
size_t qcache_kv_row_bytes(int32_t type, int32_t head_dim);

// f16, q8_0 and q4_0 with any head_dim that is a multiple of 8 and at most 256
bool qcache_kv_type_supported(int32_t type, int32_t head_dim);

// the kernels: q_own and q_leader are [n][n_head][head_dim] f32 (either may be NULL where no row needs it),
// dst [n_rows][n_head][head_dim] f32. Threads call with ith = 0 .. nth-1; no barrier inside; work is split over
// (rows, KV heads), and decode steps over KV blocks too. wdata: nth * qcache_attn_scratch_bytes(params) bytes, which
// qcache_attn_scratch_init has seen once.
typedef void (*qcache_attn_fn)(const qcache_attn_params & p, const float * q_own, const float * q_leader, float * dst,
                               uint8_t * wdata, int ith, int nth);

struct qcache_attn_kernel {
    const char *   name; // "scalar", "avx2", "avx512", "neon"
    qcache_attn_fn fn;
};

const qcache_attn_kernel * qcache_attn_kernel_scalar();
const qcache_attn_kernel * qcache_attn_kernel_best(); // of this CPU, found at run time

size_t qcache_attn_scratch_bytes(const qcache_attn_params & p); // per thread
void   qcache_attn_scratch_init(const qcache_attn_params & p, uint8_t * wdata, int nth);

// V rows (of one KV head) in lazy decode steps with v_skip > 0, since qcache_attn_scratch_init
struct qcache_attn_v_rows {
    uint64_t n;         // that there were
    uint64_t n_skipped; // that were not read
};
qcache_attn_v_rows qcache_attn_count_v_rows(const qcache_attn_params & p, const uint8_t * wdata, int nth);

// writing K and V rows into their blocks, quantised as needed
struct qcache_append_params {
    int32_t head_dim;
    int32_t n_head_kv;
    int32_t n_block_tokens;
    int32_t type_k;
    int32_t type_v;
    size_t  k_offset[2]; // own K of this layer by modality; SIZE_MAX: this layer keeps none for that modality
    size_t  v_offset[2];
    const qcache_attn_step * step;
};

//
// the ggml nodes. Each checks its shapes and returns NULL with qcache_last_error() set when they do not fit.
// params must live as long as the graph.
//

// k: [head_dim, n_head_kv, n_k] f32, the rows whose modality keeps K, in row order (NULL when none);
// v: [head_dim, n_head_kv, n_rows] f32; -> a node to be expanded into the graph before the attention node
ggml_tensor * qcache_op_append(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, const qcache_append_params * params);

// q_own: [head_dim, n_head, n_own] f32 or NULL; q_leader: [head_dim, n_head, n_rows] f32 or NULL;
// after: the append node (order only); -> [head_dim * n_head, n_rows] f32
// wdata: nth_max * qcache_attn_scratch_bytes
struct qcache_attn_node {
    qcache_attn_params         params;
    const qcache_attn_kernel * kernel;
    uint8_t *                  wdata;
};
ggml_tensor * qcache_op_attn(ggml_context * ctx, ggml_tensor * q_own, ggml_tensor * q_leader, ggml_tensor * after,
                             const qcache_attn_node * node);

// the functions in our nodes, by which another backend recognises them
void qcache_op_append_cpu(ggml_tensor * dst, int ith, int nth, void * userdata);
void qcache_op_attn_cpu(ggml_tensor * dst, int ith, int nth, void * userdata);
