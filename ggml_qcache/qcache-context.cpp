// qcache-context.cpp: decode: batch -> rows and blocks -> graph -> logits

#include "qcache-backend.h"
#include "qcache-graph.h"

#include "cpu/attn-rows.h"

#include <ggml-alloc.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>

// AUTO keeps the leader's logits while they fit the last-level cache of a small machine: then reading them beats
// recomputing from K, whatever the number of rows; beyond it both are bound by memory
static const size_t SCORE_CACHE_AUTO_BYTES = 32u << 20;

// consecutive layers that one device computes, with what it computes them in
struct qcache_stage {
    const qcache_placement & placement;
    int32_t                  first, end; // layers

    ggml_backend_ptr        backend;
    ggml_gallocr_ptr        galloc;
    ggml_backend_buffer_ptr scores;
    std::vector<uint8_t>    graph_memory; // tensors and graph of the current step

    qcache_stage(const qcache_placement & placement, int32_t first, int32_t end) :
        placement(placement), first(first), end(end), backend(ggml_backend_dev_init(placement.device, nullptr)),
        galloc(ggml_gallocr_new(buft())) {}

    ggml_backend_buffer_type_t buft() const { return ggml_backend_dev_buffer_type(placement.device); }
};

struct qcache_context {
    const qcache_model &         model;
    struct qcache_context_params params;
    std::vector<int32_t>         leader;
    enum qcache_lazy_mode        mode;
    std::vector<float>           vis_bias; // [n_layer][n_head], or empty: the model's
    const qcache_attn_kernel *   kernel;   // NULL: composed
    std::vector<qcache_stage>    stages;
    qcache_cache                 cache;    // a part for each stage
    std::string                  attn_name;

    std::vector<uint8_t> scratch;    // of the CPU's attention kernel, all threads
    std::vector<float>   residual;   // [n_rows][n_embd] of the current step, between stages
    std::vector<float>   logits;     // [n_out][n_vocab]
    std::vector<int32_t> out_of_row; // [n_tokens] of the last batch: index into logits or -1
    int32_t              n_out = 0;

    std::unique_ptr<qcache_capture_store> capture; // NULL while nothing is captured

    qcache_context(const qcache_model & model, struct qcache_context_params params, std::vector<int32_t> leader,
                   enum qcache_lazy_mode mode, std::vector<float> vis_bias, const qcache_attn_kernel * kernel,
                   std::vector<qcache_stage> stages, std::vector<qcache_cache_part> parts, std::vector<int32_t> fingerprint) :
        model(model), params(params), leader(std::move(leader)), mode(mode), vis_bias(std::move(vis_bias)), kernel(kernel),
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

    int32_t n_dropped_layers() const { return (int32_t) std::count(leader.begin(), leader.end(), QCACHE_LEADER_NONE); }
};

namespace {

// one row of a batch with its place in the cache
struct placed_row {
    int32_t index; // in the batch
    int32_t seq_id;
    int32_t pos;      // in its sequence
    int32_t rope_pos;
    int32_t block;
    int8_t  modality;
    bool    is_token;
    bool    wants_logits;
};

bool is_token(const struct qcache_batch & batch, int32_t i) {
    return batch.token != nullptr && batch.token[i] >= 0;
}

enum qcache_status check_batch(const qcache_context & ctx, const struct qcache_batch & batch) {
    if (batch.n_tokens < 1) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "a batch has at least one row, got n_tokens %d", batch.n_tokens);
    }
    if (batch.token == nullptr && batch.embd == nullptr) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "a batch needs tokens or embeddings, both are NULL");
    }
    std::vector<int32_t> added(ctx.params.n_seq_max);
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        if (batch.token != nullptr && (batch.token[i] < -1 || batch.token[i] >= ctx.model.hparams.n_vocab)) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "token %d of row %d is out of range, the vocabulary has %d", batch.token[i],
                               i, ctx.model.hparams.n_vocab);
        }
        if (!is_token(batch, i) && batch.embd == nullptr) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "row %d has no token, and embd is NULL", i);
        }
        if (is_token(batch, i) && ctx.params.layer_first > 0) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "row %d is token %d: a context that starts at layer %d takes embeddings", i,
                               batch.token[i], ctx.params.layer_first);
        }
        if (batch.pos != nullptr && batch.pos[i] < 0) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "pos %d of row %d is negative", batch.pos[i], i);
        }
        if (batch.modality != nullptr && batch.modality[i] != QCACHE_MODALITY_TEXT && batch.modality[i] != QCACHE_MODALITY_VISUAL) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "modality %d of row %d is not one of 0 (text), 1 (visual)", batch.modality[i], i);
        }
        const int32_t seq_id = batch.seq_id == nullptr ? 0 : batch.seq_id[i];
        if (seq_id < 0 || seq_id >= ctx.params.n_seq_max) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "sequence %d of row %d is out of range, n_seq_max is %d", seq_id, i,
                               ctx.params.n_seq_max);
        }
        added[seq_id]++;
    }
    for (int32_t s = 0; s < ctx.params.n_seq_max; s++) {
        const int32_t len = ctx.cache.blocks().len(s);
        if (added[s] > ctx.params.n_ctx - len) {
            return qcache_fail(QCACHE_STATUS_CONTEXT_FULL, "sequence %d holds %d tokens and would grow by %d, n_ctx is %d", s, len,
                               added[s], ctx.params.n_ctx);
        }
    }
    return QCACHE_STATUS_SUCCESS;
}

// a block for every row; NO_BLOCKS when the limit is reached
enum qcache_status place(qcache_context & ctx, const struct qcache_batch & batch, std::vector<placed_row> & rows) {
    auto & blocks = ctx.cache.blocks();
    rows.resize(batch.n_tokens);
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        auto & row       = rows[i];
        row.index        = i;
        row.seq_id       = batch.seq_id == nullptr ? 0 : batch.seq_id[i];
        row.is_token     = is_token(batch, i);
        row.modality     = batch.modality != nullptr ? batch.modality[i] : (int8_t) (row.is_token ? QCACHE_MODALITY_TEXT : QCACHE_MODALITY_VISUAL);
        row.wants_logits = batch.logits == nullptr ? i == batch.n_tokens - 1 : batch.logits[i] != 0;
        row.pos          = blocks.len(row.seq_id);
        row.rope_pos     = batch.pos != nullptr ? batch.pos[i] : row.pos;
        row.block        = blocks.append(row.seq_id, row.modality);
        if (row.block < 0) {
            return qcache_fail(QCACHE_STATUS_NO_BLOCKS,
                               "no KV block left for row %d of %d (sequence %d, position %d): %zu bytes are in use, kv_bytes_max is %zu", i,
                               batch.n_tokens, row.seq_id, row.pos, blocks.bytes(), blocks.bytes_limit());
        }
    }
    return QCACHE_STATUS_SUCCESS;
}

// what the graphs of one chunk of a batch share: its rows in the order of the graph
struct chunk {
    std::vector<placed_row>      rows;
    std::vector<qcache_attn_row> attn_rows;
    std::vector<int32_t>         seq_ids;  // sequences in it, as attn_rows count them
    std::vector<int32_t>         out;      // rows whose logits are wanted
    std::vector<int32_t>         rope_pos;
    int32_t                      n_text  = 0;
    int32_t                      pos_max = 0;

    bool decoding() const { return rows.size() <= seq_ids.size(); }
};

// rows i0 .. i1-1 of the batch, text before visual: see qcache-graph.h
chunk make_chunk(const std::vector<placed_row> & all, int32_t i0, int32_t i1, int32_t n_seq_max) {
    chunk c;
    c.rows.assign(all.begin() + i0, all.begin() + i1);
    std::stable_sort(c.rows.begin(), c.rows.end(), [](const auto & a, const auto & b) { return a.modality < b.modality; });

    std::vector<int32_t> index_of_seq(n_seq_max, -1);
    for (const auto & row : c.rows) {
        if (index_of_seq[row.seq_id] < 0) {
            index_of_seq[row.seq_id] = (int32_t) c.seq_ids.size();
            c.seq_ids.push_back(row.seq_id);
        }
        const auto ir = (int32_t) c.attn_rows.size();
        if (row.wants_logits) {
            c.out.push_back(ir);
        }
        c.attn_rows.push_back({ index_of_seq[row.seq_id], row.pos, ir, row.block, row.modality });
        c.rope_pos.push_back(row.rope_pos);
        c.n_text += row.modality == QCACHE_MODALITY_TEXT;
        c.pos_max = std::max(c.pos_max, row.pos);
    }
    return c;
}

// the residual stream before the first layer: token embeddings, or what the caller gave
void embed(qcache_context & ctx, const struct qcache_batch & batch, const chunk & c) {
    const ggml_tensor * table  = ctx.model.tok_embd;
    const size_t        n_embd = ctx.model.hparams.n_embd;
    const auto          expand = ggml_get_type_traits(table->type)->to_float;
    ctx.residual.resize(c.rows.size() * n_embd);
    float * to = ctx.residual.data();
    for (const auto & row : c.rows) {
        if (!row.is_token) {
            memcpy(to, batch.embd + row.index * n_embd, n_embd * sizeof(float));
        } else {
            const char * from = (const char *) table->data + batch.token[row.index] * table->nb[1];
            if (table->type == GGML_TYPE_F32) {
                memcpy(to, from, n_embd * sizeof(float));
            } else {
                expand(from, to, (int64_t) n_embd);
            }
        }
        to += n_embd;
    }
}

// memory for the logits that leaders leave for their lazy layers, where they are to leave any
enum qcache_status prepare_scores(const qcache_context & ctx, qcache_stage & stage, bool decoding, qcache_step & step) {
    const size_t n_bytes = sizeof(float) * step.attn.n_rows * ctx.model.hparams.n_head * step.attn.n_score_keys;
    // a GPU computes many rows on matrix units, which leave no logits behind
    const bool pays = stage.placement.is_gpu ? decoding : n_bytes <= SCORE_CACHE_AUTO_BYTES;
    step.use_scores = ctx.kernel != nullptr && ctx.n_lazy_layers() > 0 &&
                      (ctx.params.score_cache == QCACHE_SCORE_CACHE_ON || (ctx.params.score_cache == QCACHE_SCORE_CACHE_AUTO && pays));
    if (!step.use_scores) {
        return QCACHE_STATUS_SUCCESS;
    }
    if (!stage.scores || ggml_backend_buffer_get_size(stage.scores.get()) < n_bytes) {
        stage.scores.reset();
        stage.scores.reset(ggml_backend_buft_alloc_buffer(stage.buft(), n_bytes + n_bytes / 2)); // contexts grow token by token
        if (!stage.scores) {
            return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot allocate %zu bytes for the logits of leaders", n_bytes);
        }
    }
    step.attn.scores = (float *) ggml_backend_buffer_get_base(stage.scores.get());
    return QCACHE_STATUS_SUCCESS;
}

// One graph: the layers of a stage for a chunk, from the residual stream to the residual stream, or to the logits.
enum qcache_status compute_stage(qcache_context & ctx, size_t i_stage, const chunk & c) {
    const auto &   hp      = ctx.model.hparams;
    qcache_stage & stage   = ctx.stages[i_stage];
    const bool     is_last = i_stage + 1 == ctx.stages.size();

    std::vector<std::vector<qcache_attn_block>> blocks;
    std::vector<qcache_attn_seq>                seqs;
    for (const int32_t seq_id : c.seq_ids) {
        blocks.emplace_back();
        for (const auto & block : ctx.cache.blocks().seq(seq_id)) {
            blocks.back().push_back(ctx.cache.view(block, i_stage));
        }
    }
    for (const auto & b : blocks) {
        seqs.push_back({ b.data(), (int32_t) b.size() });
    }
    std::vector<int32_t> out = c.out;
    if (!is_last) {
        out.resize(c.rows.size()); // the next stage needs every row
        std::iota(out.begin(), out.end(), 0);
    }
    qcache_step step = { ctx.model, ctx.leader, ctx.mode, ctx.vis_bias.empty() ? nullptr : ctx.vis_bias.data(), stage.first, stage.end,
                         stage.placement.rope_freqs, ctx.cache.layout(i_stage), {}, false, ctx.kernel, nullptr, c.n_text,
                         (int32_t) out.size(), out.data(), ctx.capture.get() };
    step.attn.seqs         = seqs.data();
    step.attn.rows         = c.attn_rows.data();
    step.attn.n_seqs       = (int32_t) seqs.size();
    step.attn.n_rows       = (int32_t) c.attn_rows.size();
    step.attn.scores       = nullptr;
    step.attn.n_score_keys = c.pos_max + 1;

    if (const enum qcache_status status = prepare_scores(ctx, stage, c.decoding(), step); status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    const int32_t n_threads = c.decoding() ? ctx.params.n_threads : ctx.params.n_threads_batch;
    if (ctx.kernel != nullptr) {
        qcache_attn_params p = {};
        p.head_dim           = hp.head_dim;
        p.n_head             = hp.n_head;
        p.n_head_kv          = hp.n_head_kv;
        p.n_block_tokens     = ctx.params.n_block_tokens;
        p.type_k             = ctx.params.type_k;
        p.type_v             = ctx.params.type_v;
        p.step               = &step.attn;
        const size_t bytes   = qcache_attn_scratch_bytes(p) * n_threads;
        if (ctx.scratch.size() < bytes) {
            ctx.scratch.resize(bytes);
        }
        step.wdata = ctx.scratch.data();
    }

    const size_t n_nodes = qcache_graph::n_nodes_max(step);
    stage.graph_memory.resize(std::max(stage.graph_memory.size(), ggml_tensor_overhead() * n_nodes * 2 + ggml_graph_overhead_custom(n_nodes, false)));
    ggml_context_ptr ggml{ ggml_init({ stage.graph_memory.size(), stage.graph_memory.data(), true }) };
    if (!ggml) {
        return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot create a graph of %zu nodes", n_nodes);
    }
    ggml_cgraph * gf = ggml_new_graph_custom(ggml.get(), n_nodes, false);
    qcache_graph  graph(step, ggml.get(), gf);
    if (ctx.capture) {
        ctx.capture->begin_step();
    }

    ggml_tensor * result = qcache_build_llama(graph);
    if (result == nullptr) {
        return QCACHE_STATUS_INTERNAL; // qcache_last_error() has the shapes
    }
    ggml_set_output(result);
    ggml_build_forward_expand(gf, result);
    if (!ggml_gallocr_alloc_graph(stage.galloc.get(), gf)) {
        return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot allocate the compute buffer for %d rows on %s", step.attn.n_rows,
                           ggml_backend_name(stage.backend.get()));
    }
    const auto set = [](ggml_tensor * tensor, const void * data) {
        if (tensor != nullptr && tensor->buffer != nullptr) {
            ggml_backend_tensor_set(tensor, data, 0, ggml_nbytes(tensor));
        }
    };
    set(graph.inp_embd, ctx.residual.data());
    set(graph.inp_pos, c.rope_pos.data());
    set(graph.inp_out, out.data());
    graph.set_composed_inputs();

    if (ggml_backend_is_cpu(stage.backend.get())) {
        ggml_backend_cpu_set_n_threads(stage.backend.get(), n_threads);
    }
    const enum ggml_status status = ggml_backend_graph_compute(stage.backend.get(), gf);
    if (status != GGML_STATUS_SUCCESS) {
        return qcache_fail(status == GGML_STATUS_ALLOC_FAILED ? QCACHE_STATUS_OUT_OF_MEMORY : QCACHE_STATUS_INTERNAL,
                           "computing %d rows on %s failed: %s", step.attn.n_rows, ggml_backend_name(stage.backend.get()),
                           ggml_status_to_string(status));
    }
    if (!is_last) {
        ggml_backend_tensor_get(result, ctx.residual.data(), 0, ggml_nbytes(result));
        return QCACHE_STATUS_SUCCESS;
    }
    // rows were reordered: each output goes to its row's place in the batch
    std::vector<int32_t> to, n_keys;
    for (const int32_t ir : out) {
        to.push_back(ctx.out_of_row[c.rows[ir].index]);
        n_keys.push_back(c.rows[ir].pos + 1);
    }
    // as few copies as there are runs: each waits for the device
    for (size_t k = 0, n = 1; step.has_logits() && k < to.size(); k += n, n = 1) {
        while (k + n < to.size() && to[k + n] == to[k] + (int32_t) n) {
            n++;
        }
        const size_t row_bytes = (size_t) hp.n_vocab * sizeof(float);
        ggml_backend_tensor_get(result, ctx.logits.data() + (size_t) to[k] * hp.n_vocab, k * row_bytes, n * row_bytes);
    }
    if (ctx.capture) {
        ctx.capture->store(to, n_keys);
    }
    return QCACHE_STATUS_SUCCESS;
}

// rows i0 .. i1-1 of the batch, through all stages
enum qcache_status compute(qcache_context & ctx, const struct qcache_batch & batch, const std::vector<placed_row> & all, int32_t i0,
                           int32_t i1, int32_t & n_out_done) {
    const chunk c = make_chunk(all, i0, i1, ctx.params.n_seq_max);
    embed(ctx, batch, c);
    enum qcache_status status = QCACHE_STATUS_SUCCESS;
    for (size_t i = 0; i < ctx.stages.size() && status == QCACHE_STATUS_SUCCESS; i++) {
        status = compute_stage(ctx, i, c);
    }
    n_out_done += status == QCACHE_STATUS_SUCCESS ? (int32_t) c.out.size() : 0;
    return status;
}

enum qcache_status decode(qcache_context & ctx, const struct qcache_batch & batch) {
    enum qcache_status status = check_batch(ctx, batch);
    if (status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    auto & blocks = ctx.cache.blocks();
    blocks.begin();

    std::vector<placed_row> rows;
    status = place(ctx, batch, rows);
    if (status == QCACHE_STATUS_SUCCESS && !ctx.cache.sync()) {
        status = qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot allocate KV blocks: %zu bytes are in use or wanted", blocks.bytes());
    }
    if (status == QCACHE_STATUS_SUCCESS) {
        int32_t n_out = 0;
        ctx.out_of_row.assign(batch.n_tokens, -1);
        for (const auto & row : rows) {
            if (row.wants_logits) {
                ctx.out_of_row[row.index] = n_out++;
            }
        }
        ctx.logits.resize(ctx.has_logits() ? (size_t) n_out * ctx.model.hparams.n_vocab : 0);
        if (ctx.capture) {
            ctx.capture->begin_batch(n_out);
        }
        int32_t n_done = 0;
        for (int32_t i = 0; i < batch.n_tokens && status == QCACHE_STATUS_SUCCESS; i += ctx.params.n_ubatch) {
            status = compute(ctx, batch, rows, i, std::min(i + ctx.params.n_ubatch, batch.n_tokens), n_done);
        }
        ctx.n_out = n_done;
    }
    return status;
}

enum qcache_status check_params(const qcache_model & model, struct qcache_context_params & p) {
    const auto invalid = [](const char * name, long long value, const char * expected) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "%s is %lld, expected %s", name, value, expected);
    };
    const int32_t n_cores = std::max(1, (int32_t) std::thread::hardware_concurrency());
    if (p.n_ctx < 0) {
        return invalid("n_ctx", p.n_ctx, "0 (the model's) or more");
    }
    if (p.n_ubatch < 1 || p.n_ubatch > 65535) { // the extent of a GPU's grid
        return invalid("n_ubatch", p.n_ubatch, "1 .. 65535");
    }
    if (p.n_seq_max < 1 || p.n_seq_max > 65536) {
        return invalid("n_seq_max", p.n_seq_max, "1 .. 65536");
    }
    if (p.n_threads < 0 || p.n_threads > 512) {
        return invalid("n_threads", p.n_threads, "0 (all cores) .. 512");
    }
    if (p.n_threads_batch < 0 || p.n_threads_batch > 512) {
        return invalid("n_threads_batch", p.n_threads_batch, "0 (all cores) .. 512");
    }
    if (p.n_block_tokens != 16 && p.n_block_tokens != 32 && p.n_block_tokens != 64) {
        return invalid("n_block_tokens", p.n_block_tokens, "16, 32 or 64");
    }
    for (const int32_t type : { p.type_k, p.type_v }) {
        if (!qcache_kv_type_supported(type, model.hparams.head_dim)) {
            const bool known = type >= 0 && type < GGML_TYPE_COUNT && ggml_type_name((enum ggml_type) type) != nullptr;
            return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "a KV cache of type %d (%s) with head_dim %d is not supported (f16, q8_0 and q4_0 are)",
                               type, known ? ggml_type_name((enum ggml_type) type) : "unknown", model.hparams.head_dim);
        }
    }
    if (p.lazy_mode < QCACHE_LAZY_MODE_OFF || p.lazy_mode > QCACHE_LAZY_MODE_FILE) {
        return invalid("lazy_mode", p.lazy_mode, "0 (off), 1 (global), 2 (visual) or 3 (as the file says)");
    }
    if (p.lazy_leader != nullptr && p.lazy_mode != QCACHE_LAZY_MODE_GLOBAL && p.lazy_mode != QCACHE_LAZY_MODE_VISUAL) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "lazy_leader goes with lazy_mode 1 (global) or 2 (visual), got %d", p.lazy_mode);
    }
    if (p.attn_impl < QCACHE_ATTN_IMPL_AUTO || p.attn_impl > QCACHE_ATTN_IMPL_COMPOSED) {
        return invalid("attn_impl", p.attn_impl, "0 (auto), 1 (scalar) or 2 (composed)");
    }
    if (p.score_cache < QCACHE_SCORE_CACHE_AUTO || p.score_cache > QCACHE_SCORE_CACHE_ON) {
        return invalid("score_cache", p.score_cache, "0 (auto), 1 (off) or 2 (on)");
    }
    p.n_ctx           = p.n_ctx == 0 ? model.hparams.n_ctx_train : p.n_ctx;
    p.n_threads       = p.n_threads == 0 ? n_cores : p.n_threads;
    p.n_threads_batch = p.n_threads_batch == 0 ? n_cores : p.n_threads_batch;
    if (p.layer_first < 0 || p.layer_first >= model.hparams.n_layer) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "layer_first is %d, the model has layers 0 .. %d", p.layer_first,
                           model.hparams.n_layer - 1);
    }
    if (p.n_layers < 0 || p.n_layers > model.hparams.n_layer - p.layer_first) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "n_layers is %d, from layer %d on the model has %d", p.n_layers, p.layer_first,
                           model.hparams.n_layer - p.layer_first);
    }
    p.n_layers = p.n_layers == 0 ? model.hparams.n_layer - p.layer_first : p.n_layers;
    if (p.vis_bias != nullptr) {
        const int32_t expected = model.hparams.n_layer * model.hparams.n_head;
        if (p.n_vis_bias != expected) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "vis_bias has %d values, %d layers of %d heads need %d", p.n_vis_bias,
                               model.hparams.n_layer, model.hparams.n_head, expected);
        }
        for (int32_t i = 0; i < expected; i++) {
            if (!std::isfinite(p.vis_bias[i])) {
                return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "vis_bias of layer %d, head %d is %g", i / model.hparams.n_head,
                                   i % model.hparams.n_head, p.vis_bias[i]);
            }
        }
    }
    return QCACHE_STATUS_SUCCESS;
}

// last layer of the Lazy Block of layer il
int32_t last_of_block(const std::vector<int32_t> & leader, int32_t il) {
    const auto last = std::find(leader.rbegin(), leader.rend(), leader[il]);
    return (int32_t) (leader.rend() - last) - 1;
}

// the leaders and the mode in force, and whether the weights they need are there
enum qcache_status choose_lazy(const qcache_model & model, const struct qcache_context_params & p, std::vector<int32_t> & leader,
                               enum qcache_lazy_mode & mode) {
    const auto & hp = model.hparams;
    mode            = p.lazy_mode == QCACHE_LAZY_MODE_FILE ? hp.lazy_mode : p.lazy_mode;
    leader          = hp.lazy_leader;
    if (p.lazy_leader != nullptr) {
        const enum qcache_status status =
            qcache_lazy_leader_check(p.lazy_leader, (size_t) std::max(p.n_lazy_leader, 0), hp.n_layer, "lazy_leader", QCACHE_STATUS_INVALID_ARGUMENT);
        if (status != QCACHE_STATUS_SUCCESS) {
            return status;
        }
        leader.assign(p.lazy_leader, p.lazy_leader + p.n_lazy_leader);
    }
    bool any = false;
    for (int32_t il = 0; il < hp.n_layer; il++) {
        const bool computed = il >= p.layer_first && il < p.layer_first + p.n_layers;
        leader[il]          = mode == QCACHE_LAZY_MODE_OFF || !computed ? il : leader[il];
        any                 = any || leader[il] != il;
        if (!computed || leader[il] == QCACHE_LEADER_NONE) {
            continue;
        }
        if (leader[il] < p.layer_first) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "layer %d is lazy and its leader %d comes before layer_first %d", il, leader[il],
                               p.layer_first);
        }
        const auto & layer = model.layers[il];
        for (const auto & placement : model.placements) {
            if (leader[il] < placement.first && placement.first <= il && il < placement.end) {
                return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT,
                                   "layer %d is lazy and on the GPU, its leader %d is not: with these layers n_gpu_layers %d or %d would do", il,
                                   leader[il], hp.n_layer - 1 - last_of_block(leader, il), hp.n_layer - leader[il]);
            }
        }
        if (layer.attn_norm == nullptr || layer.wv == nullptr || layer.wo == nullptr) {
            return qcache_fail(QCACHE_STATUS_UNSUPPORTED,
                               "layer %d needs blk.%d.attn_norm.weight, attn_v.weight and attn_output.weight, which the file left out because "
                               "the layer has no attention there: convert with --keep-qk to run it in another way",
                               il, il);
        }
        if ((leader[il] == il || mode != QCACHE_LAZY_MODE_GLOBAL) && (layer.wq == nullptr || layer.wk == nullptr)) {
            return qcache_fail(QCACHE_STATUS_UNSUPPORTED,
                               "layer %d needs blk.%d.attn_q.weight and attn_k.weight, which the file left out because the layer is lazy in "
                               "global mode there: convert with --keep-qk to run it in another way",
                               il, il);
        }
    }
    mode = any ? mode : QCACHE_LAZY_MODE_OFF;
    return QCACHE_STATUS_SUCCESS;
}

// no exception may cross the C API
template <typename F> enum qcache_status guarded(F && f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return qcache_fail(QCACHE_STATUS_INTERNAL, "%s", e.what());
    }
}

} // namespace

struct qcache_context_params qcache_context_default_params(void) {
    struct qcache_context_params p = {};

    p.n_ubatch       = 512;
    p.n_seq_max      = 1;
    p.type_k         = GGML_TYPE_F16;
    p.type_v         = GGML_TYPE_F16;
    p.n_block_tokens = 32;
    p.lazy_mode      = QCACHE_LAZY_MODE_FILE;
    p.attn_impl      = QCACHE_ATTN_IMPL_AUTO;
    p.score_cache    = QCACHE_SCORE_CACHE_AUTO;
    return p;
}

enum qcache_status qcache_context_init(const qcache_model_t * model, struct qcache_context_params params, qcache_context_t ** ctx) {
    if (model == nullptr || ctx == nullptr) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "model and ctx must not be NULL");
    }
    *ctx = nullptr;
    return guarded([&] {
        enum qcache_status    status = check_params(*model, params);
        std::vector<int32_t>  leader;
        enum qcache_lazy_mode mode = QCACHE_LAZY_MODE_OFF;
        if (status == QCACHE_STATUS_SUCCESS) {
            status = choose_lazy(*model, params, leader, mode);
        }
        if (status != QCACHE_STATUS_SUCCESS) {
            return status;
        }
        std::vector<float> vis_bias;
        if (params.vis_bias != nullptr) {
            vis_bias.assign(params.vis_bias, params.vis_bias + params.n_vis_bias);
        }
        params.lazy_leader = nullptr; // copied
        params.vis_bias    = nullptr;
        const auto &         hp          = model->hparams;
        std::vector<int32_t> fingerprint = { hp.n_layer,    hp.n_embd,     hp.n_head,     hp.n_head_kv, hp.head_dim,
                                             params.type_k, params.type_v, params.n_block_tokens, (int32_t) mode,
                                             params.layer_first, params.n_layers };
        fingerprint.insert(fingerprint.end(), leader.begin(), leader.end());

        const qcache_attn_kernel * kernel = params.attn_impl == QCACHE_ATTN_IMPL_AUTO   ? qcache_attn_kernel_best()
                                            : params.attn_impl == QCACHE_ATTN_IMPL_SCALAR ? qcache_attn_kernel_scalar()
                                                                                          : nullptr;
        std::vector<qcache_stage>      stages;
        std::vector<qcache_cache_part> parts;
        std::string                    attn_name;
        for (const auto & placement : model->placements) {
            const int32_t first = std::max(placement.first, params.layer_first);
            const int32_t end   = std::min(placement.end, params.layer_first + params.n_layers);
            if (first >= end) {
                continue;
            }
            if (placement.is_gpu && params.attn_impl == QCACHE_ATTN_IMPL_SCALAR) {
                return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "attn_impl 1 (scalar) runs on the CPU alone, layers %d .. %d are on %s", first,
                                   end - 1, ggml_backend_dev_name(placement.device));
            }
            stages.emplace_back(placement, first, end);
            if (!stages.back().backend || !stages.back().galloc) {
                return placement.is_gpu ? QCACHE_STATUS_OUT_OF_MEMORY : qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot create the CPU backend");
            }
            parts.push_back({ qcache_layout(hp, leader, mode, first, end, params.n_block_tokens, params.type_k, params.type_v), stages.back().buft() });
            attn_name += attn_name.empty() ? "" : ", ";
            attn_name += kernel == nullptr ? "composed" : placement.is_gpu ? qcache_backend_kernels(placement.device) : kernel->name;
        }
        auto made = std::make_unique<qcache_context>(*model, params, leader, mode, std::move(vis_bias), kernel, std::move(stages),
                                                     std::move(parts), std::move(fingerprint));
        made->attn_name = attn_name;
        *ctx = made.release();
        return QCACHE_STATUS_SUCCESS;
    });
}

void qcache_context_free(qcache_context_t * ctx) {
    delete ctx;
}

enum qcache_status qcache_decode(qcache_context_t * ctx, struct qcache_batch batch) {
    ctx->n_out = 0;
    ctx->out_of_row.clear();
    const enum qcache_status status = guarded([&] { return decode(*ctx, batch); });
    const enum qcache_status ended  = guarded([&] {
        auto & blocks = ctx->cache.blocks();
        if (status == QCACHE_STATUS_SUCCESS) {
            blocks.commit();
        } else {
            blocks.rollback();
            ctx->n_out = 0;
            ctx->out_of_row.clear();
        }
        ctx->cache.sync(); // only frees here
        return status;
    });
    return status == QCACHE_STATUS_SUCCESS ? ended : status;
}

// index among the rows with logits of row i of the last batch, or -1
static int32_t out_index(const qcache_context_t * ctx, int32_t i) {
    const int32_t n_rows = (int32_t) ctx->out_of_row.size();
    if (i < -ctx->n_out || i >= n_rows) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "row %d is out of range: the last batch has %d rows, %d with logits", i, n_rows, ctx->n_out);
        return -1;
    }
    const int32_t k = i < 0 ? ctx->n_out + i : ctx->out_of_row[i];
    if (k < 0) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "row %d of the last batch has no logits: they were not asked for", i);
    }
    return k;
}

const float * qcache_get_logits_ith(qcache_context_t * ctx, int32_t i) {
    if (!ctx->has_logits()) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "no row has logits: the context computes layers %d .. %d of %d", ctx->params.layer_first,
                    ctx->params.layer_first + ctx->params.n_layers - 1, ctx->model.hparams.n_layer);
        return nullptr;
    }
    const int32_t k = out_index(ctx, i);
    return k < 0 ? nullptr : ctx->logits.data() + (size_t) k * ctx->model.hparams.n_vocab;
}

int32_t qcache_n_ctx(const qcache_context_t * ctx) {
    return ctx->params.n_ctx;
}

enum qcache_lazy_mode qcache_get_lazy(const qcache_context_t * ctx, int32_t * leader) {
    if (leader != nullptr) {
        memcpy(leader, ctx->leader.data(), ctx->leader.size() * sizeof(int32_t));
    }
    return ctx->mode;
}

const char * qcache_attn_name(const qcache_context_t * ctx) {
    return ctx->attn_name.c_str();
}

void qcache_set_n_threads(qcache_context_t * ctx, int32_t n_threads, int32_t n_threads_batch) {
    const int32_t n_cores = std::max(1, (int32_t) std::thread::hardware_concurrency());

    ctx->params.n_threads       = n_threads < 1 ? n_cores : std::min(n_threads, 512);
    ctx->params.n_threads_batch = n_threads_batch < 1 ? n_cores : std::min(n_threads_batch, 512);
}

//
// capture
//

// a graph that captures may have as many nodes as one that does not, but other outputs and another order: the allocator
// would take it for the one it knows
static void forget_graph(qcache_context_t * ctx) {
    for (auto & stage : ctx->stages) {
        stage.galloc.reset(ggml_gallocr_new(stage.buft()));
    }
}

enum qcache_status qcache_capture_start(qcache_context_t * ctx, int32_t what) {
    const int32_t all = QCACHE_CAPTURE_SCORES | QCACHE_CAPTURE_PROBS | QCACHE_CAPTURE_ATTN | QCACHE_CAPTURE_HIDDEN;
    if (what == 0 || (what & ~all) != 0) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "what to capture is %d, expected enum qcache_capture, added up (1 .. %d)", what, all);
    }
    if (ctx->model.placements.back().is_gpu) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "capture reads what the CPU computes: load the model with n_gpu_layers 0, it has %d",
                           qcache_model_get_info(&ctx->model).n_gpu_layers);
    }
    return guarded([&] {
        if (!ctx->capture || ctx->capture->kinds() != what) {
            forget_graph(ctx);
        }
        ctx->capture = std::make_unique<qcache_capture_store>(what, ctx->model.hparams.n_layer);
        return QCACHE_STATUS_SUCCESS;
    });
}

void qcache_capture_stop(qcache_context_t * ctx) {
    ctx->capture.reset();
    forget_graph(ctx);
}

const float * qcache_get_captured_ith(qcache_context_t * ctx, enum qcache_capture what, int32_t il, int32_t i, int32_t * n_values) {
    if (il < 0 || il >= ctx->model.hparams.n_layer) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "layer %d is out of range, the model has %d", il, ctx->model.hparams.n_layer);
        return nullptr;
    }
    const int32_t k = out_index(ctx, i);
    if (k < 0) {
        return nullptr;
    }
    if (what != QCACHE_CAPTURE_HIDDEN && ctx->leader[il] == QCACHE_LEADER_NONE) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "layer %d has no attention: there is nothing of kind %d", il, (int) what);
        return nullptr;
    }
    const std::vector<float> * values = ctx->capture ? ctx->capture->get(what, il, k) : nullptr;
    if (values == nullptr) {
        qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "kind %d was not captured in the last batch: %s", (int) what,
                    ctx->capture ? "it was not asked for before that" : "capture is off");
        return nullptr;
    }
    if (n_values != nullptr) {
        *n_values = (int32_t) values->size();
    }
    return values->data();
}

enum qcache_status qcache_seq_get_v(const qcache_context_t * ctx, int32_t seq_id, int32_t il, float * v, size_t n_values) {
    const auto & hp = ctx->model.hparams;
    const int32_t end = ctx->params.layer_first + ctx->params.n_layers;
    if (seq_id < 0 || seq_id >= ctx->params.n_seq_max || il < ctx->params.layer_first || il >= end) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "sequence %d, layer %d: n_seq_max is %d, the context has layers %d .. %d", seq_id, il,
                           ctx->params.n_seq_max, ctx->params.layer_first, end - 1);
    }
    if (ctx->leader[il] == QCACHE_LEADER_NONE) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "layer %d has no attention and keeps no V", il);
    }
    const int32_t n_tokens = ctx->cache.blocks().len(seq_id);
    const size_t  expected = (size_t) hp.n_head_kv * n_tokens * hp.head_dim;
    if (n_values != expected) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "n_values is %zu, V of %d tokens has %zu", n_values, n_tokens, expected);
    }
    const size_t row_bytes = qcache_kv_row_bytes(ctx->params.type_v, hp.head_dim);
    float        row[256]; // padding included
    size_t       i_stage = 0;
    while (ctx->stages[i_stage].end <= il) {
        i_stage++;
    }
    const auto &         layout = ctx->cache.layout(i_stage);
    std::vector<uint8_t> rows(row_bytes * ctx->params.n_block_tokens * hp.n_head_kv); // of a block
    for (const auto & part : ctx->cache.blocks().seq(seq_id)) {
        ctx->cache.read(part.id, i_stage, layout.v_offset[part.modality][il], rows.data(), rows.size());
        for (int32_t h = 0; h < hp.n_head_kv; h++) {
            for (int32_t t = 0; t < part.n; t++) {
                qcache_kv_row(ctx->params.type_v, rows.data() + ((size_t) h * ctx->params.n_block_tokens + t) * row_bytes, row_bytes, row);
                memcpy(v + ((size_t) h * n_tokens + part.first + t) * hp.head_dim, row, hp.head_dim * sizeof(float));
            }
        }
    }
    return QCACHE_STATUS_SUCCESS;
}

//
// sequences
//

int32_t qcache_seq_len(const qcache_context_t * ctx, int32_t seq_id) {
    return seq_id < 0 || seq_id >= ctx->params.n_seq_max ? -1 : ctx->cache.blocks().len(seq_id);
}

enum qcache_status qcache_seq_rm(qcache_context_t * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    auto & blocks = ctx->cache.blocks();
    if (seq_id < -1 || seq_id >= ctx->params.n_seq_max) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "sequence %d is out of range, n_seq_max is %d", seq_id, ctx->params.n_seq_max);
    }
    if (p0 < 0) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "p0 is %d, expected 0 or more", p0);
    }
    const int32_t first = seq_id < 0 ? 0 : seq_id;
    const int32_t last  = seq_id < 0 ? ctx->params.n_seq_max - 1 : seq_id;
    for (int32_t s = first; s <= last; s++) {
        if (p1 >= 0 && p1 < blocks.len(s) && p0 < p1) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "positions %d .. %d of sequence %d are not its tail, it holds %d tokens", p0,
                               p1 - 1, s, blocks.len(s));
        }
    }
    return guarded([&] {
        for (int32_t s = first; s <= last; s++) {
            if (p1 < 0 || p0 < p1) {
                blocks.truncate(s, p0);
            }
        }
        ctx->cache.sync();
        return QCACHE_STATUS_SUCCESS;
    });
}

enum qcache_status qcache_seq_cp(qcache_context_t * ctx, int32_t src, int32_t dst, int32_t p1) {
    for (const int32_t seq_id : { src, dst }) {
        if (seq_id < 0 || seq_id >= ctx->params.n_seq_max) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "sequence %d is out of range, n_seq_max is %d", seq_id, ctx->params.n_seq_max);
        }
    }
    return guarded([&] {
        auto & blocks = ctx->cache.blocks();
        blocks.share(src, dst, p1 < 0 ? blocks.len(src) : std::min(p1, blocks.len(src)));
        ctx->cache.sync();
        return QCACHE_STATUS_SUCCESS;
    });
}

void qcache_clear(qcache_context_t * ctx) {
    qcache_seq_rm(ctx, -1, 0, -1);
}

struct qcache_kv_usage qcache_get_kv_usage(const qcache_context_t * ctx) {
    struct qcache_kv_usage usage = ctx->cache.usage();
    usage.n_lazy_layers          = ctx->n_lazy_layers();
    usage.n_dropped_layers       = ctx->n_dropped_layers();
    return usage;
}

//
// state
//

size_t qcache_state_size(const qcache_context_t * ctx) {
    return ctx->cache.state_size();
}

enum qcache_status qcache_state_get(const qcache_context_t * ctx, uint8_t * data, size_t size) {
    const size_t expected = qcache_state_size(ctx);
    if (size != expected) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "size is %zu, the state takes %zu bytes", size, expected);
    }
    return guarded([&] {
        ctx->cache.write_state([&](const void * from, size_t n) {
            memcpy(data, from, n);
            data += n;
            return true;
        });
        return QCACHE_STATUS_SUCCESS;
    });
}

enum qcache_status qcache_state_set(qcache_context_t * ctx, const uint8_t * data, size_t size) {
    return guarded([&] {
        const enum qcache_status status = ctx->cache.read_state(data, size, ctx->params.n_ctx);
        if (status == QCACHE_STATUS_SUCCESS) {
            ctx->n_out = 0;
            ctx->out_of_row.clear();
        }
        return status;
    });
}

enum qcache_status qcache_state_save_file(const qcache_context_t * ctx, const char * path) {
    return guarded([&] {
        const std::string temporary = std::string(path) + ".tmp";
        FILE *            file      = fopen(temporary.c_str(), "wb");
        if (file == nullptr) {
            return qcache_fail(QCACHE_STATUS_FILE, "%s: %s", temporary.c_str(), strerror(errno));
        }
        const bool written = ctx->cache.write_state([&](const void * from, size_t n) { return fwrite(from, 1, n, file) == n; });
        if (fclose(file) != 0 || !written || rename(temporary.c_str(), path) != 0) {
            const enum qcache_status status = qcache_fail(QCACHE_STATUS_FILE, "%s: cannot write the state: %s", path, strerror(errno));
            remove(temporary.c_str());
            return status;
        }
        return QCACHE_STATUS_SUCCESS;
    });
}

enum qcache_status qcache_state_load_file(qcache_context_t * ctx, const char * path) {
    return guarded([&] {
        FILE * file = fopen(path, "rb");
        if (file == nullptr) {
            return qcache_fail(QCACHE_STATUS_FILE, "%s: %s", path, strerror(errno));
        }
        std::vector<uint8_t> data;
        uint8_t              chunk[1 << 16];
        for (size_t n; (n = fread(chunk, 1, sizeof(chunk), file)) > 0;) {
            data.insert(data.end(), chunk, chunk + n);
        }
        const bool failed = ferror(file) != 0;
        fclose(file);
        if (failed) {
            return qcache_fail(QCACHE_STATUS_FILE, "%s: cannot be read", path);
        }
        return qcache_state_set(ctx, data.data(), data.size());
    });
}
