// qcache.h: the public C API of ggml-qcache
//
// Runs LLaVA-like decoders with Lazy Attention (arXiv 2602.01901): a lazy layer takes its query and key from its
// leader and keeps only its own V; a dropped layer has no attention at all and keeps nothing. Plain C, opaque types,
// status codes; no exception crosses this header. It includes no ggml header, so that a binding can read it as it is.
//
// Threads: a model is read-only once loaded, but for qcache_model_set_weight, and may serve several contexts; a context
// belongs to one thread at a time.

#ifndef QCACHE_H
#define QCACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#    ifdef QCACHE_BUILD
#        define QCACHE_API __declspec(dllexport)
#    else
#        define QCACHE_API __declspec(dllimport)
#    endif
#else
#    define QCACHE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

//
// status
//

// 0: done; < 0: failed; > 0: failed but recoverable by the caller (free something, send less).
// Whatever the code, the context stays usable and holds what it held before the call.
enum qcache_status {
    QCACHE_STATUS_SUCCESS          =  0,
    QCACHE_STATUS_NO_BLOCKS        =  1, // kv_bytes_max reached: remove sequences, or raise the limit
    QCACHE_STATUS_CONTEXT_FULL     =  2, // a sequence would grow past n_ctx
    QCACHE_STATUS_INVALID_ARGUMENT = -1,
    QCACHE_STATUS_FILE             = -2, // cannot be opened, read or written
    QCACHE_STATUS_INVALID_MODEL    = -3, // not a GGUF file, truncated, or a key or tensor that is missing or wrong
    QCACHE_STATUS_UNSUPPORTED      = -4, // valid, but nothing that this version runs
    QCACHE_STATUS_OUT_OF_MEMORY    = -5,
    QCACHE_STATUS_INVALID_STATE    = -6, // a saved state that is damaged or belongs to another configuration
    QCACHE_STATUS_VERSION          = -7, // the ggml found at run time is not the one built against
    QCACHE_STATUS_INTERNAL         = -8,
};

// Constant name of a status, e.g. "NO_BLOCKS".
QCACHE_API const char * qcache_status_name(enum qcache_status status);

// What failed in this thread's last failing call, with the offending values. Valid until the next failing call.
QCACHE_API const char * qcache_last_error(void);

// "0.1.0"
QCACHE_API const char * qcache_version(void);

// SUCCESS, or VERSION when `ggml_version` (as ggml_version() gives it) is not the version this library was built for.
QCACHE_API enum qcache_status qcache_check_ggml_version(const char * ggml_version);

//
// model
//

enum qcache_lazy_mode {
    QCACHE_LAZY_MODE_OFF    = 0, // every layer is full
    QCACHE_LAZY_MODE_GLOBAL = 1, // every token shares Q and K with the leader (GLA)
    QCACHE_LAZY_MODE_VISUAL = 2, // visual tokens share Q and K, text tokens keep their own (VLA)
    QCACHE_LAZY_MODE_FILE   = 3, // context parameter only: as the model file says
};

enum qcache_modality {
    QCACHE_MODALITY_TEXT   = 0,
    QCACHE_MODALITY_VISUAL = 1,
};

// In place of a leader: the layer is dropped. It has no attention, only its FFN: no Q, K, V or output projection, and no
// K and V in the cache. It may stand anywhere, inside a Lazy Block too: its neighbours lead and follow across it.
#define QCACHE_LEADER_NONE (-1)

typedef struct qcache_model   qcache_model_t;
typedef struct qcache_context qcache_context_t;

// Called while weights are read, progress in 0 .. 1; returning false stops the load (INVALID_ARGUMENT, "cancelled").
typedef bool (*qcache_progress_callback)(float progress, void * user_data);

struct qcache_model_params {
    bool                     use_extra_bufts; // pack quantised weights for this CPU, by ourselves or where ggml offers it; default true
    qcache_progress_callback progress;        // may be NULL
    void *                   progress_user_data;
    int32_t                  n_gpu_layers; // last layers to compute on a GPU, < 0: all, default 0; fewer where that would tear
                                           // a Lazy Block of the file
    int32_t                  main_gpu;     // which of ggml's GPUs, default 0; one without kernels of ours computes attention composed
};

QCACHE_API struct qcache_model_params qcache_model_default_params(void);

// Reads a `llama` or `qwen2` GGUF. On success *model must be given to qcache_model_free.
// FILE, INVALID_MODEL, UNSUPPORTED (the model, or no GPU), INVALID_ARGUMENT (main_gpu),
// OUT_OF_MEMORY, VERSION: *model is NULL.
QCACHE_API enum qcache_status qcache_model_init(const char * path, struct qcache_model_params params, qcache_model_t ** model);

// Contexts of the model must be freed first. NULL is fine.
QCACHE_API void qcache_model_free(qcache_model_t * model);

struct qcache_model_info {
    const char *          architecture;  // "llama", "qwen2"; lives as long as the model
    int32_t               n_layer;
    int32_t               n_embd;
    int32_t               n_head;
    int32_t               n_head_kv;
    int32_t               head_dim;
    int32_t               n_vocab;
    int32_t               n_ctx_train;
    size_t                n_params;      // weights, counted
    size_t                n_bytes;       // bytes of weights in memory
    size_t                n_bytes_extra; // of those, bytes of packed weights
    size_t                n_bytes_gpu;   // of those, bytes on the GPU
    int32_t               n_gpu_layers;  // layers computed on the GPU
    const char *          gpu;           // its name in ggml, "CUDA0"; NULL: none
    enum qcache_lazy_mode lazy_mode;     // as in the file; OFF where every layer of the file is full
    const int32_t *       lazy_leader;   // [n_layer]; lazy_leader[il] == il is a full layer, QCACHE_LEADER_NONE one without
                                         // attention; lives as long as the model
};

QCACHE_API struct qcache_model_info qcache_model_get_info(const qcache_model_t * model);

// Replaces a weight of the file by `values`, as many as it has and in its order, rounded to its type. For calibration:
// what contexts hold was computed with the old weight, and none may be computing.
// INVALID_ARGUMENT: no such weight, another n_values, or NaN or infinity among them. UNSUPPORTED: a type that is only
// written with an importance matrix. The weight is as before then.
QCACHE_API enum qcache_status qcache_model_set_weight(qcache_model_t * model, const char * name, const float * values, size_t n_values);

//
// context
//

enum qcache_attn_impl {
    QCACHE_ATTN_IMPL_AUTO     = 0, // the best vector kernel of this CPU
    QCACHE_ATTN_IMPL_SCALAR   = 1, // the reference kernel
    QCACHE_ATTN_IMPL_COMPOSED = 2, // stock ggml operations only
};

enum qcache_score_cache {
    QCACHE_SCORE_CACHE_AUTO = 0, // a cost model decides per step
    QCACHE_SCORE_CACHE_OFF  = 1, // lazy layers recompute from the Q Cache and the leader's K
    QCACHE_SCORE_CACHE_ON   = 2, // the leader's logits are always kept for its lazy layers
};

struct qcache_context_params {
    int32_t                 n_ctx;           // most tokens one sequence may hold; 0: n_ctx_train of the model
    int32_t                 n_ubatch;        // most rows computed at once (prefill chunk), 1 .. 65535, default 512
    int32_t                 n_seq_max;       // sequence ids are 0 .. n_seq_max-1, default 1
    int32_t                 n_threads;       // decode; 0: all cores
    int32_t                 n_threads_batch; // prefill; 0: all cores
    int32_t                 type_k;          // a ggml_type: 1 (f16, default), 8 (q8_0) or 2 (q4_0)
    int32_t                 type_v;          // likewise
    int32_t                 n_block_tokens;  // tokens in a KV block: 16, 32 (default) or 64
    size_t                  kv_bytes_max;    // limit on KV bytes, 0: none
    enum qcache_lazy_mode   lazy_mode;       // default FILE
    const int32_t *         lazy_leader;     // [n_lazy_leader], only with GLOBAL or VISUAL; NULL: the file's. Copied. Of a
                                             // full layer itself, of a lazy one the nearest full layer before it, of a
                                             // dropped one QCACHE_LEADER_NONE
    int32_t                 n_lazy_leader;
    const float *           vis_bias;        // δ [n_layer][n_head] of lazy layers in VISUAL; NULL: the file's. Copied.
    int32_t                 n_vis_bias;      // floats
    int32_t                 layer_first;     // computes layers layer_first .. layer_first+n_layers-1 only, default 0; above 0
                                             // rows are given as embeddings: the residual stream before that layer
    int32_t                 n_layers;        // default 0: to the last. A context that ends before it has no logits; the
                                             // residual stream after its last layer can be captured
    enum qcache_attn_impl   attn_impl;
    enum qcache_score_cache score_cache;
    float                   v_skip;          // V skipping: share of a row's attention, 0 .. 1, that lazy layers may leave out when they
                                             // decode, default 0: none. Their output is off by at most v_skip max |v|. Needs
                                             // the score cache (it stays on) and a kernel of ours
};

QCACHE_API struct qcache_context_params qcache_context_default_params(void);

// The model must outlive the context.
// INVALID_ARGUMENT (values out of range, leaders that break the rules), UNSUPPORTED (a layer would need weights of its
// attention that the file left out; a KV type), OUT_OF_MEMORY, INTERNAL (our kernels don't start on the GPU): *ctx is NULL.
QCACHE_API enum qcache_status qcache_context_init(const qcache_model_t * model, struct qcache_context_params params, qcache_context_t ** ctx);

QCACHE_API void qcache_context_free(qcache_context_t * ctx);

// Rows to append, each to the end of its sequence. Token and embedding rows may be mixed.
struct qcache_batch {
    int32_t         n_tokens;
    const int32_t * token;    // [n_tokens]; -1: this row comes from embd. NULL: all rows come from embd
    const float *   embd;     // [n_tokens][n_embd]; only rows without a token are read. NULL: all rows are tokens
    const int32_t * seq_id;   // [n_tokens]; NULL: all in sequence 0
    const int8_t *  modality; // [n_tokens] enum qcache_modality; NULL: tokens are text, embeddings are visual
    const int8_t *  logits;   // [n_tokens] != 0: keep this row's logits; NULL: the last row only
    const int32_t * pos;      // [n_tokens] position of each row for RoPE, 0 or more; NULL: its index in its sequence, which
                              // is what attention is causal in either way
};

// Appends the batch and computes it, in chunks of n_ubatch rows. Rows of one sequence are in order; its rows see its
// earlier rows, those in this batch included.
// SUCCESS: every row is in the cache, the logits asked for can be read.
// INVALID_ARGUMENT, CONTEXT_FULL, NO_BLOCKS, OUT_OF_MEMORY, INTERNAL, UNSUPPORTED (an operation that a GPU without kernels of ours
// lacks): nothing was appended, earlier logits are gone.
QCACHE_API enum qcache_status qcache_decode(qcache_context_t * ctx, struct qcache_batch batch);

// Logits [n_vocab] of row i of the last batch (i < 0 counts from the end of the rows that have logits), or NULL
// where that row, or a context that ends before the last layer, has none. Valid until the next decode or load.
QCACHE_API const float * qcache_get_logits_ith(qcache_context_t * ctx, int32_t i);

QCACHE_API int32_t qcache_n_ctx(const qcache_context_t * ctx);

// The lazy mode and leaders in force. `leader` (may be NULL) receives n_layer values.
QCACHE_API enum qcache_lazy_mode qcache_get_lazy(const qcache_context_t * ctx, int32_t * leader);

// "avx512", "avx2", "neon", "scalar", "cuda", "metal" or "composed": what attention runs on in this context, in the order of
// the layers where that is two, as "avx2, cuda". A GPU without kernels of ours adds why: "composed, as MTL0: its ...".
QCACHE_API const char * qcache_attn_name(const qcache_context_t * ctx);

// Threads of later decodes, as in the parameters: 0: all cores.
QCACHE_API void qcache_set_n_threads(qcache_context_t * ctx, int32_t n_threads, int32_t n_threads_batch);

//
// sequences
//

// Tokens held by a sequence, -1 for an id out of range.
QCACHE_API int32_t qcache_seq_len(const qcache_context_t * ctx, int32_t seq_id);

// Removes positions p0 .. p1-1; p1 < 0: to the end. Only a tail can be removed (INVALID_ARGUMENT otherwise).
// seq_id -1: every sequence.
QCACHE_API enum qcache_status qcache_seq_rm(qcache_context_t * ctx, int32_t seq_id, int32_t p0, int32_t p1);

// Makes dst hold the first p1 tokens of src (p1 < 0: all). Blocks are shared until one side writes. dst's old content goes.
QCACHE_API enum qcache_status qcache_seq_cp(qcache_context_t * ctx, int32_t src, int32_t dst, int32_t p1);

// Removes every sequence and frees every block.
QCACHE_API void qcache_clear(qcache_context_t * ctx);

struct qcache_kv_usage {
    size_t  bytes;            // KV bytes allocated now, blocks counted once however often shared
    size_t  bytes_if_full;    // what the same blocks would take with every layer full
    size_t  bytes_max;        // the limit, 0: none
    size_t  bytes_block_text; // one block of text tokens
    size_t  bytes_block_visual;
    size_t  bytes_block_full; // one block of a full cache, either modality
    int32_t n_block_tokens;
    int32_t n_blocks;
    int32_t n_blocks_text;
    int32_t n_blocks_visual;
    int32_t n_tokens_text;    // summed over sequences
    int32_t n_tokens_visual;
    int32_t n_lazy_layers;
    int32_t n_dropped_layers;
    int64_t n_v_rows;         // of one KV head, in lazy layers on the CPU that decoded with v_skip above 0, since the context was made
    int64_t n_v_rows_skipped; // of those, rows that were not read
};

QCACHE_API struct qcache_kv_usage qcache_get_kv_usage(const qcache_context_t * ctx);

//
// state: all sequences with their K and V (not the logits: decode once before sampling)
//

QCACHE_API size_t qcache_state_size(const qcache_context_t * ctx);

// INVALID_ARGUMENT when size is not qcache_state_size().
QCACHE_API enum qcache_status qcache_state_get(const qcache_context_t * ctx, uint8_t * data, size_t size);

// INVALID_STATE (damaged, or saved with another model shape, KV type, block size or lazy configuration), NO_BLOCKS,
// OUT_OF_MEMORY: the context holds what it held.
QCACHE_API enum qcache_status qcache_state_set(qcache_context_t * ctx, const uint8_t * data, size_t size);

// As above, to and from a file; written atomically.
QCACHE_API enum qcache_status qcache_state_save_file(const qcache_context_t * ctx, const char * path);
QCACHE_API enum qcache_status qcache_state_load_file(qcache_context_t * ctx, const char * path);

//
// capture: what each layer computed, for the rows whose logits were asked for; for calibration and analysis
//

enum qcache_capture {
    QCACHE_CAPTURE_SCORES = 1, // [n_head][n_keys] logits of the attention, scaled: a lazy layer's as it mixes them from
                               // its leader's and its own, δ included; n_keys is the row's position + 1
    QCACHE_CAPTURE_PROBS  = 2, // [n_head][n_keys] their softmax
    QCACHE_CAPTURE_ATTN   = 4, // [n_head][head_dim] attention output, before W_o
    QCACHE_CAPTURE_HIDDEN = 8, // [n_embd] residual stream after the layer
};

// From the next decode on, keeps `what` (enum qcache_capture, added up) of every layer for the rows that have logits,
// until it is stopped or started with something else. What was captured before goes. Costs nothing while it is off.
// A dropped layer has HIDDEN alone.
// INVALID_ARGUMENT (no or unknown bits), UNSUPPORTED (layers on a GPU), OUT_OF_MEMORY: capture is as before.
QCACHE_API enum qcache_status qcache_capture_start(qcache_context_t * ctx, int32_t what);

// Ends the capture and frees what it holds.
QCACHE_API void qcache_capture_stop(qcache_context_t * ctx);

// One kind of what layer il computed for row i of the last batch (i as for qcache_get_logits_ith), or NULL where that
// was not captured. n_values (may be NULL) receives the number of floats. Valid until the next decode or load.
QCACHE_API const float * qcache_get_captured_ith(qcache_context_t * ctx, enum qcache_capture what, int32_t il, int32_t i, int32_t * n_values);

// Copies the V that layer il keeps of a sequence, as f32: v [n_head_kv][qcache_seq_len][head_dim], n_values floats.
// INVALID_ARGUMENT: a sequence or layer out of range, a dropped layer, or another n_values.
QCACHE_API enum qcache_status qcache_seq_get_v(const qcache_context_t * ctx, int32_t seq_id, int32_t il, float * v, size_t n_values);

//
// quantising, for converters
//

// Quantises f32 values to blocks of a type (ggml's number: q8_0, q4_K, q5_K, q6_K), to the bits that ggml_quantize_chunk gives without an
// importance matrix, several times as fast. Rows are whole blocks, so any number of them is one call. Threads may call it at once.
// UNSUPPORTED: another type, a CPU without AVX2, or a ggml that was found to give other bits: call ggml's.
// INVALID_ARGUMENT: no whole blocks, n_bytes isn't what they take, or NULL. NaN and infinities are the caller's to refuse.
QCACHE_API enum qcache_status qcache_quantize(int32_t type, const float * values, void * blocks, int64_t n_values, size_t n_bytes);

//
// vision: libmtmd encodes the images
//

struct ggml_tensor;

struct qcache_mtmd_state {
    bool    class_token_last;
    int32_t n_corrected; // inputs written so far
};

// An evaluation callback for libmtmd (mtmd_context_params.cb_eval, with a zeroed qcache_mtmd_state as its user data):
// the llava graph of llama.cpp 0.5.0 puts CLIP's class token after the patches but feeds position and patch indices
// of the order with the class token first (ggml-org/llama.cpp#25814), so that every patch gets its neighbour's
// position. This writes the right indices into such a graph before it is computed, and leaves every other alone.
QCACHE_API bool qcache_mtmd_eval_callback(struct ggml_tensor * node, bool ask, void * state);

#ifdef __cplusplus
}
#endif

#endif // QCACHE_H
