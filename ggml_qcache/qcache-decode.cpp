// qcache-decode.cpp: batch -> rows and blocks -> graph -> logits

#include "qcache-context.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>

// AUTO keeps the leader's logits while they fit the last-level cache of a small machine: then reading them beats
// recomputing from K, whatever the number of rows; beyond it both are bound by memory
static const size_t SCORE_CACHE_AUTO_BYTES = 32u << 20;

namespace {

bool is_token(const struct qcache_batch & batch, int32_t i) {
    return batch.token != nullptr && batch.token[i] >= 0;
}

enum qcache_status check_batch(qcache_context & ctx, const struct qcache_batch & batch) {
    if (batch.n_tokens < 1) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "a batch has at least one row, got n_tokens %d", batch.n_tokens);
    }
    if (batch.token == nullptr && batch.embd == nullptr) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "a batch needs tokens or embeddings, both are NULL");
    }
    auto & added = ctx.n_added;
    added.assign(ctx.params.n_seq_max, 0);
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
enum qcache_status place(qcache_context & ctx, const struct qcache_batch & batch) {
    auto & blocks = ctx.cache.blocks();
    auto & rows   = ctx.rows;
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

// rows i0 .. i1-1 of the batch, text before visual: see qcache-graph.h
void fill_chunk(qcache_context & ctx, int32_t i0, int32_t i1) {
    qcache_chunk & c = ctx.chunk;
    c.rows.clear();
    c.attn_rows.clear();
    c.seq_ids.clear();
    c.out.clear();
    c.rope_pos.clear();
    c.index_of_seq.assign(ctx.params.n_seq_max, -1);
    for (const int8_t modality : { QCACHE_MODALITY_TEXT, QCACHE_MODALITY_VISUAL }) {
        std::copy_if(ctx.rows.begin() + i0, ctx.rows.begin() + i1, std::back_inserter(c.rows),
                     [&](const auto & row) { return row.modality == modality; });
        c.n_text = modality == QCACHE_MODALITY_TEXT ? (int32_t) c.rows.size() : c.n_text;
    }
    for (const auto & row : c.rows) {
        if (c.index_of_seq[row.seq_id] < 0) {
            c.index_of_seq[row.seq_id] = (int32_t) c.seq_ids.size();
            c.seq_ids.push_back(row.seq_id);
        }
        const auto ir = (int32_t) c.attn_rows.size();
        if (row.wants_logits) {
            c.out.push_back(ir);
        }
        c.attn_rows.push_back({ c.index_of_seq[row.seq_id], row.pos, ir, row.block, row.modality });
        c.rope_pos.push_back(row.rope_pos);
    }
}

// the residual stream before the first layer: token embeddings, or what the caller gave
void embed(qcache_context & ctx, const struct qcache_batch & batch) {
    const auto &        c      = ctx.chunk;
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
enum qcache_status prepare_scores(const qcache_context & ctx, qcache_stage & stage, qcache_attn_step & attn, bool & use_scores) {
    const size_t n_bytes = sizeof(float) * attn.n_rows * ctx.model.hparams.n_head * attn.n_score_keys;
    // a GPU computes many rows on matrix units, which leave no logits behind
    const bool pays = stage.placement.is_gpu ? ctx.chunk.decoding() : n_bytes <= SCORE_CACHE_AUTO_BYTES;
    use_scores      = stage.kernel != nullptr && ctx.n_lazy_layers() > 0 &&
                 (ctx.params.score_cache == QCACHE_SCORE_CACHE_ON || (ctx.params.v_skip > 0.0f && ctx.chunk.decoding()) || (ctx.params.score_cache == QCACHE_SCORE_CACHE_AUTO && pays));
    if (!use_scores) {
        return QCACHE_STATUS_SUCCESS;
    }
    if (!stage.scores || ggml_backend_buffer_get_size(stage.scores.get()) < n_bytes) {
        stage.scores.reset();
        stage.scores.reset(ggml_backend_buft_alloc_buffer(stage.buft(), n_bytes + n_bytes / 2)); // contexts grow token by token
        if (!stage.scores) {
            return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot allocate %zu bytes for the logits of leaders", n_bytes);
        }
    }
    attn.scores        = (float *) ggml_backend_buffer_get_base(stage.scores.get());
    attn.scores_buffer = stage.scores.get();
    return QCACHE_STATUS_SUCCESS;
}

// scratch of the CPU's attention kernel for all threads; NULL: the composed path needs none
uint8_t * prepare_scratch(qcache_context & ctx, const qcache_stage & stage, int32_t n_threads) {
    if (stage.kernel == nullptr) {
        return nullptr;
    }
    if (ctx.n_scratch < n_threads) {
        const qcache_attn_params p = ctx.attn_shape();
        ctx.v_rows                 = ctx.count_v_rows();
        ctx.scratch.resize(qcache_attn_scratch_bytes(p) * n_threads);
        ctx.n_scratch = n_threads;
        qcache_attn_scratch_init(p, ctx.scratch.data(), n_threads);
    }
    return ctx.scratch.data();
}

// ggml's backends end the process on an operation that they do not have
enum qcache_status check_stock(const qcache_stage & stage) {
    for (int i = 0; i < ggml_graph_n_nodes(stage.gf); i++) {
        const ggml_tensor * node = ggml_graph_node(stage.gf, i);
        if (!ggml_backend_dev_supports_op(stage.placement.device, node)) {
            return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s cannot compute node %s (%s of type %s, from type %s) of layers %d .. %d",
                               ggml_backend_dev_name(stage.placement.device), node->name, ggml_op_desc(node), ggml_type_name(node->type),
                               node->src[0] == nullptr ? "none" : ggml_type_name(node->src[0]->type), stage.first, stage.end - 1);
        }
    }
    return QCACHE_STATUS_SUCCESS;
}

// The graph of a stage's step, unless the last one does: layers from the residual stream to the residual stream, or to the
// logits.
enum qcache_status prepare_graph(qcache_context & ctx, qcache_stage & stage, const qcache_graph_shape & shape) {
    // composed nodes depend on the blocks, and what is captured on the batch
    if (stage.graph && stage.kernel != nullptr && !ctx.capture && stage.shape == shape) {
        return QCACHE_STATUS_SUCCESS;
    }
    stage.graph.reset();
    stage.shape            = shape;
    stage.step->use_scores = shape.use_scores;
    stage.step->wdata      = shape.wdata;
    stage.step->n_text     = shape.n_text;
    stage.step->n_out      = shape.n_out;
    stage.step->capture    = ctx.capture.get();

    const size_t n_nodes = qcache_graph::n_nodes_max(*stage.step);
    stage.graph_memory.resize(std::max(stage.graph_memory.size(), ggml_tensor_overhead() * n_nodes * 2 + ggml_graph_overhead_custom(n_nodes, false)));
    stage.ggml.reset(ggml_init({ stage.graph_memory.size(), stage.graph_memory.data(), true }));
    if (!stage.ggml) {
        return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot create a graph of %zu nodes", n_nodes);
    }
    stage.gf   = ggml_new_graph_custom(stage.ggml.get(), n_nodes, false);
    auto graph = std::make_unique<qcache_graph>(*stage.step, stage.ggml.get(), stage.gf);
    if (ctx.capture) {
        ctx.capture->begin_step();
    }
    stage.result = qcache_build_llama(*graph);
    if (stage.result == nullptr) {
        return QCACHE_STATUS_INTERNAL; // qcache_last_error() has the shapes
    }
    ggml_set_output(stage.result);
    ggml_build_forward_expand(stage.gf, stage.result);
    if (stage.stock) {
        if (const enum qcache_status status = check_stock(stage); status != QCACHE_STATUS_SUCCESS) {
            return status;
        }
    }
    const bool allocated = ggml_gallocr_alloc_graph(stage.galloc.get(), stage.gf);
    if (const size_t n_bytes = ggml_gallocr_get_buffer_size(stage.galloc.get(), 0); n_bytes != stage.compute_bytes) {
        stage.compute_bytes = n_bytes;
        qcache_backend_forget_all(stage.backend.get()); // another buffer took the last one's place
    }
    if (!allocated) {
        return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot allocate the compute buffer for %d rows on %s", shape.n_rows,
                           ggml_backend_name(stage.backend.get()));
    }
    stage.graph = std::move(graph);
    return QCACHE_STATUS_SUCCESS;
}

// the layers of a stage for the current chunk
enum qcache_status compute_stage(qcache_context & ctx, size_t i_stage) {
    const auto &         hp      = ctx.model.hparams;
    const qcache_chunk & c       = ctx.chunk;
    qcache_stage &       stage   = ctx.stages[i_stage];
    const bool           is_last = i_stage + 1 == ctx.stages.size();

    stage.blocks.clear();
    stage.seqs.clear();
    for (const int32_t seq_id : c.seq_ids) {
        for (const auto & block : ctx.cache.blocks().seq(seq_id)) {
            stage.blocks.push_back(ctx.cache.view(block, i_stage));
        }
    }
    const qcache_attn_block * blocks = stage.blocks.data();
    for (const int32_t seq_id : c.seq_ids) {
        const auto n_blocks = (int32_t) ctx.cache.blocks().seq(seq_id).size();
        stage.seqs.push_back({ blocks, n_blocks });
        blocks += n_blocks;
    }
    stage.out.assign(c.out.begin(), c.out.end());
    if (!is_last) {
        stage.out.resize(c.rows.size()); // the next stage needs every row
        std::iota(stage.out.begin(), stage.out.end(), 0);
    }
    if (!stage.step) {
        stage.step.reset(new qcache_step{ ctx.model, ctx.leader, ctx.mode, ctx.vis_bias.empty() ? nullptr : ctx.vis_bias.data(),
                                          ctx.params.v_skip, stage.first, stage.end, stage.placement.rope_freqs, ctx.cache.layout(i_stage), {}, false, stage.kernel, stage.stock, nullptr,
                                          0, 0, nullptr, nullptr });
    }
    qcache_attn_step & attn = stage.step->attn;
    attn.seqs               = stage.seqs.data();
    attn.rows               = c.attn_rows.data();
    attn.n_seqs             = (int32_t) stage.seqs.size();
    attn.n_rows             = (int32_t) c.attn_rows.size();
    attn.scores             = nullptr;
    attn.scores_buffer      = nullptr;
    attn.n_score_keys       = qcache_n_score_keys(attn);
    stage.step->out_rows    = stage.out.data();

    bool use_scores = false;
    if (const enum qcache_status status = prepare_scores(ctx, stage, attn, use_scores); status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    const int32_t n_threads = c.decoding() ? ctx.params.n_threads : ctx.params.n_threads_batch;
    const enum qcache_status prepared = prepare_graph(
        ctx, stage, { attn.n_rows, c.n_text, (int32_t) stage.out.size(), use_scores, prepare_scratch(ctx, stage, n_threads) });
    if (prepared != QCACHE_STATUS_SUCCESS) {
        return prepared;
    }
    const auto set = [](ggml_tensor * tensor, const void * data) {
        if (tensor != nullptr && tensor->buffer != nullptr) {
            ggml_backend_tensor_set(tensor, data, 0, ggml_nbytes(tensor));
        }
    };
    set(stage.graph->inp_embd, ctx.residual.data());
    set(stage.graph->inp_pos, c.rope_pos.data());
    set(stage.graph->inp_out, stage.out.data());
    stage.graph->set_composed_inputs();

    if (ggml_backend_is_cpu(stage.backend.get())) {
        ggml_backend_cpu_set_n_threads(stage.backend.get(), n_threads);
    }
    const enum ggml_status status = ggml_backend_graph_compute(stage.backend.get(), stage.gf);
    // kernels of ours may have failed after the last of the graph was given to the device
    const char * error = qcache_backend_failed(stage.backend.get());
    if (status != GGML_STATUS_SUCCESS || error != nullptr) {
        return qcache_fail(status == GGML_STATUS_ALLOC_FAILED ? QCACHE_STATUS_OUT_OF_MEMORY : QCACHE_STATUS_INTERNAL,
                           "computing %d rows on %s failed: %s", attn.n_rows, ggml_backend_name(stage.backend.get()),
                           error != nullptr ? error : ggml_status_to_string(status));
    }
    if (!is_last) {
        ggml_backend_tensor_get(stage.result, ctx.residual.data(), 0, ggml_nbytes(stage.result));
        return QCACHE_STATUS_SUCCESS;
    }
    // rows were reordered: each output goes to its row's place in the batch
    auto & to     = ctx.out_to;
    auto & n_keys = ctx.out_n_keys;
    to.clear();
    n_keys.clear();
    for (const int32_t ir : stage.out) {
        to.push_back(ctx.out_of_row[c.rows[ir].index]);
        n_keys.push_back(c.rows[ir].pos + 1);
    }
    // as few copies as there are runs: each waits for the device
    for (size_t k = 0, n = 1; stage.step->has_logits() && k < to.size(); k += n, n = 1) {
        while (k + n < to.size() && to[k + n] == to[k] + (int32_t) n) {
            n++;
        }
        const size_t row_bytes = (size_t) hp.n_vocab * sizeof(float);
        ggml_backend_tensor_get(stage.result, ctx.logits.data() + (size_t) to[k] * hp.n_vocab, k * row_bytes, n * row_bytes);
    }
    if (ctx.capture) {
        ctx.capture->store(to, n_keys);
    }
    return QCACHE_STATUS_SUCCESS;
}

// rows i0 .. i1-1 of the batch, through all stages
enum qcache_status compute(qcache_context & ctx, const struct qcache_batch & batch, int32_t i0, int32_t i1, int32_t & n_out_done) {
    fill_chunk(ctx, i0, i1);
    embed(ctx, batch);
    enum qcache_status status = QCACHE_STATUS_SUCCESS;
    for (size_t i = 0; i < ctx.stages.size() && status == QCACHE_STATUS_SUCCESS; i++) {
        status = compute_stage(ctx, i);
    }
    n_out_done += status == QCACHE_STATUS_SUCCESS ? (int32_t) ctx.chunk.out.size() : 0;
    return status;
}

} // namespace

enum qcache_status qcache_context_decode(qcache_context & ctx, const struct qcache_batch & batch) {
    enum qcache_status status = check_batch(ctx, batch);
    if (status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    auto & blocks = ctx.cache.blocks();
    blocks.begin();

    status = place(ctx, batch);
    if (status == QCACHE_STATUS_SUCCESS && !ctx.cache.sync()) {
        status = qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot allocate KV blocks: %zu bytes are in use or wanted", blocks.bytes());
    }
    if (status == QCACHE_STATUS_SUCCESS) {
        int32_t n_out = 0;
        ctx.out_of_row.assign(batch.n_tokens, -1);
        for (const auto & row : ctx.rows) {
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
            status = compute(ctx, batch, i, std::min(i + ctx.params.n_ubatch, batch.n_tokens), n_done);
        }
        ctx.n_out = n_done;
    }
    return status;
}
