// qcache-context.cpp: making a context, and all that is asked of it but computing

#include "qcache-context.h"

#include "cpu/attn-rows.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>

namespace {

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
    if (!(p.v_skip >= 0.0f && p.v_skip < 1.0f)) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "v_skip is %g, expected a share of the attention from 0 to under 1", p.v_skip);
    }
    if (p.v_skip > 0.0f && (p.attn_impl != QCACHE_ATTN_IMPL_AUTO || p.score_cache == QCACHE_SCORE_CACHE_OFF)) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "v_skip %g needs attn_impl 0 (auto) and a score cache, got attn_impl %d, score_cache %d",
                           p.v_skip, p.attn_impl, p.score_cache);
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
            const char * why_not = nullptr;
            const char * kernels = placement.is_gpu ? qcache_backend_kernels(placement.device, &why_not) : nullptr;
            const bool   stock   = placement.is_gpu && kernels == nullptr;
            if (stock && params.v_skip > 0.0f) {
                return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "v_skip %g, but layers %d .. %d compute without kernels of ours: %s: %s", params.v_skip,
                                   first, end - 1, ggml_backend_dev_name(placement.device), why_not);
            }
            stages.emplace_back(placement, first, end, stock ? nullptr : kernel, stock);
            if (!stages.back().backend || !stages.back().galloc) {
                if (kernels != nullptr) {
                    return QCACHE_STATUS_INTERNAL; // qcache_last_error() has what the runtime said
                }
                return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot create the backend of %s", ggml_backend_dev_name(placement.device));
            }
            parts.push_back({ qcache_layout(hp, leader, mode, first, end, params.n_block_tokens, params.type_k, params.type_v), stages.back().buft() });
            attn_name += attn_name.empty() ? "" : ", ";
            attn_name += stages.back().kernel == nullptr ? "composed" : placement.is_gpu ? kernels : kernel->name;
            if (stock) {
                attn_name += std::string(", as ") + ggml_backend_dev_name(placement.device) + ": " + why_not;
            }
        }
        auto made = std::make_unique<qcache_context>(*model, params, leader, mode, std::move(vis_bias), std::move(stages), std::move(parts),
                                                     std::move(fingerprint));
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
    const enum qcache_status status = guarded([&] { return qcache_context_decode(*ctx, batch); });
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
        stage.graph.reset();
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
    usage.n_v_rows               = (int64_t) ctx->count_v_rows().n;
    usage.n_v_rows_skipped       = (int64_t) ctx->count_v_rows().n_skipped;
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
