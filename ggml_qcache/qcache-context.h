// qcache-context.h: what a context holds. qcache-context.cpp makes it and answers questions, qcache-decode.cpp computes

#pragma once

#include "qcache-backend.h"
#include "qcache-graph.h"

#include <ggml-alloc.h>

#include <memory>
#include <string>
#include <vector>

// one row of a batch with its place in the cache
struct qcache_placed_row {
    int32_t index; // in the batch
    int32_t seq_id;
    int32_t pos;      // in its sequence
    int32_t rope_pos;
    int32_t block;
    int8_t  modality;
    bool    is_token;
    bool    wants_logits;
};

// what the graphs of one chunk of a batch share: its rows in the order of the graph
struct qcache_chunk {
    std::vector<qcache_placed_row> rows;
    std::vector<qcache_attn_row>   attn_rows;
    std::vector<int32_t>           seq_ids;  // sequences in it, as attn_rows count them
    std::vector<int32_t>           index_of_seq; // [n_seq_max] the other way round, -1: not in it
    std::vector<int32_t>           out;      // rows whose logits are wanted
    std::vector<int32_t>           rope_pos;
    int32_t                        n_text  = 0;

    bool decoding() const { return rows.size() <= seq_ids.size(); }
};

// A graph serves all steps that differ in nothing but what its inputs and its step hold.
struct qcache_graph_shape {
    int32_t   n_rows, n_text, n_out;
    bool      use_scores;
    uint8_t * wdata;

    bool operator==(const qcache_graph_shape & o) const {
        return n_rows == o.n_rows && n_text == o.n_text && n_out == o.n_out && use_scores == o.use_scores && wdata == o.wdata;
    }
};

// consecutive layers that one device computes, with what it computes them in
struct qcache_stage {
    const qcache_placement & placement;
    int32_t                  first, end; // layers

    const qcache_attn_kernel * kernel; // on a GPU its own take the place; NULL: composed
    bool                       stock;  // the device computes ggml's operations alone

    ggml_backend_ptr  backend;
    ggml_gallocr_ptr  galloc;
    size_t            compute_bytes = 0; // of galloc's buffer
    qcache_buffer_ptr scores;

    // the current step and its graph
    std::vector<qcache_attn_block> blocks; // of all its sequences
    std::vector<qcache_attn_seq>   seqs;
    std::vector<int32_t>           out;    // rows whose results are wanted
    std::unique_ptr<qcache_step>   step;
    qcache_graph_shape             shape = {};
    std::vector<uint8_t>           graph_memory; // tensors and graph
    ggml_context_ptr               ggml;
    std::unique_ptr<qcache_graph>  graph; // NULL: the next step builds one
    ggml_cgraph *                  gf     = nullptr;
    ggml_tensor *                  result = nullptr;

    qcache_stage(const qcache_placement & placement, int32_t first, int32_t end, const qcache_attn_kernel * kernel, bool stock) :
        placement(placement), first(first), end(end), kernel(kernel), stock(stock), backend(ggml_backend_dev_init(placement.device, nullptr)),
        galloc(ggml_gallocr_new(buft())) {}

    ggml_backend_buffer_type_t buft() const { return ggml_backend_dev_buffer_type(placement.device); }
};

struct qcache_context {
    const qcache_model &         model;
    struct qcache_context_params params;
    std::vector<int32_t>         leader;
    enum qcache_lazy_mode        mode;
    std::vector<float>           vis_bias; // [n_layer][n_head], or empty: the model's
    std::vector<qcache_stage>    stages;
    qcache_cache                 cache;    // a part for each stage
    std::string                  attn_name;

    std::vector<uint8_t> scratch;    // of the CPU's attention kernel, all threads
    int32_t              n_scratch = 0;  // threads
    qcache_attn_v_rows   v_rows    = {}; // counted in scratch that has been replaced
    std::vector<float>   logits;     // [n_out][n_vocab]
    std::vector<int32_t> out_of_row; // [n_tokens] of the last batch: index into logits or -1
    int32_t              n_out = 0;

    // of the current batch; kept, so that a decode step allocates nothing
    std::vector<int32_t>           n_added;  // [n_seq_max]
    std::vector<qcache_placed_row> rows;
    qcache_chunk                   chunk;
    std::vector<float>             residual; // [n_rows][n_embd] of the current step, between stages
    std::vector<int32_t>           out_to, out_n_keys;

    std::unique_ptr<qcache_capture_store> capture; // NULL while nothing is captured

    qcache_context(const qcache_model & model, struct qcache_context_params params, std::vector<int32_t> leader,
                   enum qcache_lazy_mode mode, std::vector<float> vis_bias, std::vector<qcache_stage> stages,
                   std::vector<qcache_cache_part> parts, std::vector<int32_t> fingerprint) :
        model(model), params(params), leader(std::move(leader)), mode(mode), vis_bias(std::move(vis_bias)),
        stages(std::move(stages)),
        cache(std::move(parts), params.n_seq_max, params.kv_bytes_max, std::move(fingerprint)) {}

    bool has_logits() const { return params.layer_first + params.n_layers == model.hparams.n_layer; }

    int32_t n_lazy_layers() const {
        int32_t n = 0;
        for (int32_t il = 0; il < model.hparams.n_layer; il++) {
            n += leader[il] != il && leader[il] != QCACHE_LEADER_NONE;
        }
        return n;
    }

    // of a layer, as far as scratch depends on them
    qcache_attn_params attn_shape() const {
        qcache_attn_params p = {};
        p.head_dim           = model.hparams.head_dim;
        p.n_head             = model.hparams.n_head;
        p.n_head_kv          = model.hparams.n_head_kv;
        p.n_block_tokens     = params.n_block_tokens;
        return p;
    }

    qcache_attn_v_rows count_v_rows() const {
        const qcache_attn_v_rows now = qcache_attn_count_v_rows(attn_shape(), scratch.data(), n_scratch);
        return { v_rows.n + now.n, v_rows.n_skipped + now.n_skipped };
    }

    int32_t n_dropped_layers() const { return (int32_t) std::count(leader.begin(), leader.end(), QCACHE_LEADER_NONE); }
};

// Computes a batch. The caller commits or rolls back the blocks.
enum qcache_status qcache_context_decode(qcache_context & ctx, const struct qcache_batch & batch);
