// qcache-graph.h: the pieces that decoder graphs are built from, and the decoders themselves
//
// Rows of a step are ordered text first, visual last, so that "the rows that keep their own Q and K" is a prefix of the
// rows in every layer: all of them, the text rows, or none.

#pragma once

#include "qcache-cache.h"
#include "qcache-capture.h"
#include "qcache-composed.h"
#include "qcache-matmul.h"
#include "qcache-model.h"
#include "qcache-op.h"

#include <deque>
#include <memory>
#include <vector>

struct qcache_composed_deleter {
    void operator()(qcache_composed * c) const { qcache_composed_free(c); }
};

// what one step computes
struct qcache_step {
    const qcache_model &         model;
    const std::vector<int32_t> & leader; // [n_layer]
    enum qcache_lazy_mode        mode;
    const float *                vis_bias; // δ [n_layer][n_head]; NULL: the model's
    float                        v_skip;   // of lazy layers
    int32_t                      layer_first, layer_end;
    ggml_tensor *                rope_freqs; // on the device of these layers, or NULL
    const qcache_layout &        layout;

    qcache_attn_step           attn;      // rows, sequences, score cache
    bool                       use_scores;
    const qcache_attn_kernel * kernel;    // NULL: composed
    bool                       stock;     // of ggml's operations alone, new K and V too
    uint8_t *                  wdata;     // scratch of all threads

    int32_t         n_text;   // rows, before the visual ones
    int32_t         n_out;    // rows whose results are wanted
    const int32_t * out_rows; // [n_out] which

    qcache_capture_store * capture; // NULL: nothing is captured

    bool has_logits() const { return layer_end == model.hparams.n_layer; }
};

class qcache_graph {
  public:
    qcache_graph(const qcache_step & step, ggml_context * ctx, ggml_cgraph * gf);

    // inputs, to be filled once the graph is allocated; NULL where the step has none
    ggml_tensor * inp_embd = nullptr; // [n_embd, n_rows] f32
    ggml_tensor * inp_pos  = nullptr; // [n_rows] i32
    ggml_tensor * inp_out  = nullptr; // [n_out] i32

    void set_composed_inputs() const;

    // for the decoders: shapes in ggml order
    const qcache_model & model;
    const qcache_step &  step;
    const int32_t        n_rows;

    ggml_tensor * embed();                                                       // -> [n_embd, n_rows]
    ggml_tensor * norm(ggml_tensor * x, ggml_tensor * weight);                   // RMS
    ggml_tensor * linear(ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * x);
    ggml_tensor * rope(ggml_tensor * x, int32_t n_head);                         // [n_head * head_dim, n] -> [head_dim, n_head, n], rows 0 .. n-1
    ggml_tensor * swiglu(ggml_tensor * gate, ggml_tensor * up);
    ggml_tensor * add(ggml_tensor * a, ggml_tensor * b);

    bool    has_attention(int32_t il) const;
    int32_t last_attention() const; // the last of the step's layers that has attention, -1: none has

    // Rows that keep their own Q and K in a layer: a prefix of the rows.
    int32_t       n_own(int32_t il) const;
    ggml_tensor * first_rows(ggml_tensor * x, int32_t n);

    // Attention of layer il. q: [head_dim, n_head, n_own] and k: [head_dim, n_head_kv, n_own] with rope, NULL when
    // n_own is 0; v: [n_head_kv * head_dim, n_rows]. A leader's q becomes the Q Cache of its lazy layers.
    // -> [n_head * head_dim, n_rows]; NULL when a shape does not fit (qcache_last_error)
    ggml_tensor * lazy_attention(int32_t il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v);

    // Keeps only the rows whose logits are wanted.
    ggml_tensor * out_rows(ggml_tensor * x);

    // Tells of the residual stream after layer il, in case it is captured. x: [n_embd, n_rows or n_out]
    void capture_hidden(int32_t il, ggml_tensor * x);
    bool          has_out() const { return step.n_out > 0; }

    static size_t n_nodes_max(const qcache_step & step);

  private:
    bool leads(int32_t il) const; // lazy layers of this step follow it
    void capture_attention(int32_t il, ggml_tensor * q, ggml_tensor * q_leader, ggml_tensor * written, ggml_tensor * attn);
    void capture(enum qcache_capture kind, int32_t il, ggml_tensor * x);

    ggml_context *      ctx;
    ggml_cgraph *       gf;
    ggml_tensor *       q_cache = nullptr; // the current leader's q
    ggml_tensor *       quantised_from = nullptr; // the last input of a product with packed weights, and what became of it
    ggml_tensor *       quantised      = nullptr;

    std::unique_ptr<qcache_composed, qcache_composed_deleter> composed;
    std::vector<qcache_attn_node>                             attn_nodes; // [n_layer], what the nodes point to
    std::vector<qcache_append_params>                         append_nodes;
    std::deque<qcache_matmul_node>                            matmul_nodes;
    std::vector<qcache_scores_node>                           scores_nodes; // [n_layer] when scores are captured
};

// The decoders, one family per file under models/: -> logits [n_vocab, n_out], or the residual stream [n_embd, n_out] of a
// step that ends before the last layer, or the last append node (or the input rows) when no row is wanted; NULL on failure.
ggml_tensor * qcache_build_llama(qcache_graph & g);
