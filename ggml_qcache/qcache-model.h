// qcache-model.h: hyper-parameters and weights

#pragma once

#include "qcache-impl.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <gguf.h>

#include <memory>
#include <string>
#include <vector>

struct qcache_hparams {
    std::string architecture;

    int32_t n_layer     = 0;
    int32_t n_embd      = 0;
    int32_t n_ff        = 0;
    int32_t n_head      = 0;
    int32_t n_head_kv   = 0;
    int32_t head_dim    = 0;
    int32_t n_vocab     = 0;
    int32_t n_ctx_train = 0;

    float rms_eps = 0.0f;

    int     rope_type       = 0; // GGML_ROPE_TYPE_*
    int32_t n_rot           = 0;
    float   rope_freq_base  = 10000.0f;
    float   rope_freq_scale = 1.0f;
    float   rope_ext_factor  = 0.0f; // 1: YaRN
    float   rope_attn_factor = 1.0f; // what ggml multiplies cosine and sine by, beside YaRN's own factor
    int32_t rope_n_ctx_orig  = 0;    // context before scaling

    enum qcache_lazy_mode lazy_mode = QCACHE_LAZY_MODE_OFF;
    std::vector<int32_t>  lazy_leader; // [n_layer]; QCACHE_LEADER_NONE: no attention
};

// Reads and checks everything that the decoder needs to know before it sees a weight.
enum qcache_status qcache_hparams_read(const gguf_context * gguf, const char * path, qcache_hparams & hparams);

// The leader of a lazy layer is the nearest full layer before it, dropped layers aside. `source` names the origin in
// the error, which is of the given status.
enum qcache_status qcache_lazy_leader_check(const int32_t * leader, size_t n, int32_t n_layer, const char * source,
                                            enum qcache_status status);

struct qcache_layer {
    ggml_tensor * attn_norm = nullptr; // [n_embd]; this and the next four: NULL where a dropped layer has none
    ggml_tensor * wq        = nullptr; // [n_embd, n_head * head_dim]; NULL where a globally lazy layer has none
    ggml_tensor * wk        = nullptr; // [n_embd, n_head_kv * head_dim]; likewise
    ggml_tensor * wv        = nullptr; // [n_embd, n_head_kv * head_dim]
    ggml_tensor * wo        = nullptr; // [n_head * head_dim, n_embd]
    ggml_tensor * bq        = nullptr; // biases: NULL where the file has none
    ggml_tensor * bk        = nullptr;
    ggml_tensor * bv        = nullptr;
    ggml_tensor * bo        = nullptr;
    ggml_tensor * vis_bias  = nullptr; // δ [n_head] f32 in host memory, or NULL
    ggml_tensor * ffn_norm  = nullptr; // [n_embd]
    ggml_tensor * ffn_gate  = nullptr; // [n_embd, n_ff]
    ggml_tensor * ffn_up    = nullptr; // [n_embd, n_ff]
    ggml_tensor * ffn_down  = nullptr; // [n_ff, n_embd]
};

// consecutive layers whose weights lie on one device, which computes them
struct qcache_placement {
    ggml_backend_dev_t device;               // the CPU, or what qcache_backend_device gave
    int32_t            first, end;           // layers
    bool               is_gpu;
    ggml_tensor *      rope_freqs = nullptr; // [n_rot / 2] f32 frequency factors (Llama 3), or NULL
};

struct qcache_model {
    qcache_hparams hparams;

    std::vector<qcache_placement> placements; // in order of their layers; output_norm and output are with the last

    ggml_tensor * tok_embd    = nullptr; // [n_embd, n_vocab], in host memory
    ggml_tensor * output_norm = nullptr; // [n_embd]
    ggml_tensor * output      = nullptr; // [n_embd, n_vocab]; tok_embd's data where the file ties them
    ggml_tensor * output_bias = nullptr; // [n_vocab], or NULL

    std::vector<qcache_layer> layers;

    size_t n_params      = 0;
    size_t n_bytes       = 0;
    size_t n_bytes_extra = 0;
    size_t n_bytes_gpu   = 0;

    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> buffers;
};
