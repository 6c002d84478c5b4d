// qcache-graph.cpp: the pieces of a decoder graph

#include "qcache-graph.h"

#include <ggml.h>

#include <cmath>

qcache_graph::qcache_graph(const qcache_step & step, ggml_context * ctx, ggml_cgraph * gf) :
    model(step.model), step(step), n_rows(step.attn.n_rows), ctx(ctx), gf(gf) {
    if (step.kernel == nullptr) {
        composed.reset(qcache_composed_init(ctx, &step.attn, step.layout.n_block_tokens));
    }
    attn_nodes.resize(model.hparams.n_layer);
    append_nodes.resize(model.hparams.n_layer);
    if (step.capture != nullptr) {
        scores_nodes.resize(model.hparams.n_layer);
    }
}

void qcache_graph::set_composed_inputs() const {
    if (composed) {
        qcache_composed_set_inputs(composed.get());
    }
}

size_t qcache_graph::n_nodes_max(const qcache_step & step) {
    const size_t per_layer = 56 + (step.kernel == nullptr ? qcache_composed_n_nodes(&step.attn) : 0);
    return 64 + per_layer * (step.model.hparams.n_layer + 1);
}

// Whole cache lines: ggml places a tensor at any multiple of 32 bytes, and where a few indices shift the activations by half a
// line each vector of theirs lies in two (AMX's products take 1.3 to 1.4 times as long).
static ggml_tensor * new_indices(ggml_context * ctx, int32_t n) {
    constexpr int32_t per_line = 64 / sizeof(int32_t);
    ggml_tensor *     lines    = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (n + per_line - 1) / per_line * per_line);
    ggml_set_input(lines);
    return ggml_view_1d(ctx, lines, n, 0);
}

ggml_tensor * qcache_graph::embed() {
    inp_pos = new_indices(ctx, n_rows);
    if (step.n_out > 0) {
        inp_out = new_indices(ctx, step.n_out);
    }
    inp_embd = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, model.hparams.n_embd, n_rows);
    ggml_set_input(inp_embd);
    return inp_embd;
}

ggml_tensor * qcache_graph::norm(ggml_tensor * x, ggml_tensor * weight) {
    return ggml_mul(ctx, ggml_rms_norm(ctx, x, model.hparams.rms_eps), weight);
}

ggml_tensor * qcache_graph::linear(ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * x) {
    ggml_tensor * y;
    if (qcache_matmul_is_packed(weight)) {
        if (x != quantised_from) {
            quantised_from = x;
            quantised      = qcache_op_quantize(ctx, x);
        }
        y = qcache_op_matmul(ctx, weight, quantised, &matmul_nodes.emplace_back());
    } else {
        y = ggml_mul_mat(ctx, weight, x);
    }
    return bias == nullptr ? y : ggml_add(ctx, y, bias);
}

ggml_tensor * qcache_graph::rope(ggml_tensor * x, int32_t n_head) {
    const auto &  hp  = model.hparams;
    const int64_t n   = x->ne[1];
    ggml_tensor * pos = n == n_rows ? inp_pos : ggml_view_1d(ctx, inp_pos, n, 0);
    x                 = ggml_reshape_3d(ctx, x, hp.head_dim, n_head, n);
    return ggml_rope_ext(ctx, x, pos, step.rope_freqs, hp.n_rot, hp.rope_type, hp.rope_n_ctx_orig, hp.rope_freq_base,
                         hp.rope_freq_scale, hp.rope_ext_factor, hp.rope_attn_factor, 32.0f, 1.0f);
}

ggml_tensor * qcache_graph::swiglu(ggml_tensor * gate, ggml_tensor * up) {
    return ggml_swiglu_split(ctx, gate, up);
}

ggml_tensor * qcache_graph::add(ggml_tensor * a, ggml_tensor * b) {
    return ggml_add(ctx, a, b);
}

bool qcache_graph::has_attention(int32_t il) const {
    return step.leader[il] != QCACHE_LEADER_NONE;
}

int32_t qcache_graph::last_attention() const {
    int32_t il = step.layer_end - 1;
    while (il >= step.layer_first && !has_attention(il)) {
        il--;
    }
    return il < step.layer_first ? -1 : il;
}

bool qcache_graph::leads(int32_t il) const {
    int32_t next = il + 1;
    while (next < step.layer_end && !has_attention(next)) {
        next++;
    }
    return next < step.layer_end && step.leader[next] == il;
}

int32_t qcache_graph::n_own(int32_t il) const {
    if (step.leader[il] == il) {
        return n_rows;
    }
    return step.mode == QCACHE_LAZY_MODE_VISUAL ? step.n_text : 0;
}

ggml_tensor * qcache_graph::first_rows(ggml_tensor * x, int32_t n) {
    return n == n_rows ? x : ggml_view_2d(ctx, x, x->ne[0], n, x->nb[1], 0);
}

ggml_tensor * qcache_graph::out_rows(ggml_tensor * x) {
    return step.n_out == n_rows ? x : ggml_get_rows(ctx, x, inp_out);
}

ggml_tensor * qcache_graph::lazy_attention(int32_t il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v) {
    const auto &  hp        = model.hparams;
    const auto &  layout    = step.layout;
    const int32_t j         = step.leader[il];
    const bool    lazy      = j != il;
    const bool    is_leader = !lazy && leads(il);

    auto & append          = append_nodes[il];
    append.head_dim        = hp.head_dim;
    append.n_head_kv       = hp.n_head_kv;
    append.n_block_tokens  = layout.n_block_tokens;
    append.type_k          = layout.type_k;
    append.type_v          = layout.type_v;
    append.step            = &step.attn;

    auto & node            = attn_nodes[il];
    node.kernel            = step.kernel;
    node.wdata             = step.wdata;
    auto & p               = node.params;
    p.head_dim             = hp.head_dim;
    p.n_head               = hp.n_head;
    p.n_head_kv            = hp.n_head_kv;
    p.n_block_tokens       = layout.n_block_tokens;
    p.type_k               = layout.type_k;
    p.type_v               = layout.type_v;
    p.scale                = 1.0f / sqrtf((float) hp.head_dim);
    p.score_op             = !step.use_scores ? QCACHE_SCORE_NONE : lazy ? QCACHE_SCORE_READ : is_leader ? QCACHE_SCORE_WRITE : QCACHE_SCORE_NONE;
    p.vis_bias             = nullptr;
    p.v_skip               = lazy ? step.v_skip : 0.0f;
    p.step                 = &step.attn;
    for (int m = 0; m < 2; m++) {
        append.k_offset[m] = layout.k_offset[m][il];
        append.v_offset[m] = layout.v_offset[m][il];
        p.v_offset[m]      = layout.v_offset[m][il];
    }
    // PAPER.md's table: in visual mode only (text row, text key) pairs keep their own Q and K
    for (int row = 0; row < 2; row++) {
        for (int key = 0; key < 2; key++) {
            const bool own = !lazy || (step.mode == QCACHE_LAZY_MODE_VISUAL && row == QCACHE_MODALITY_TEXT && key == QCACHE_MODALITY_TEXT);
            p.q_source[row][key] = own ? QCACHE_Q_OWN : QCACHE_Q_LEADER;
            p.k_offset[row][key] = layout.k_offset[key][own ? il : j];
        }
    }
    if (lazy && step.mode == QCACHE_LAZY_MODE_VISUAL) {
        const ggml_tensor * of_file = model.layers[il].vis_bias;
        p.vis_bias = step.vis_bias != nullptr ? step.vis_bias + (size_t) il * hp.n_head : of_file != nullptr ? (const float *) of_file->data : nullptr;
    }

    v                     = ggml_reshape_3d(ctx, v, hp.head_dim, hp.n_head_kv, n_rows);
    ggml_tensor * written = step.stock ? qcache_composed_append(composed.get(), ctx, gf, k, v, &append) : qcache_op_append(ctx, k, v, &append);
    if (written == nullptr) {
        return nullptr;
    }
    if (!has_out() && il == last_attention()) {
        return written;
    }
    if (is_leader) {
        q_cache = q;
    }
    ggml_tensor * q_leader = lazy ? q_cache : nullptr;
    ggml_tensor * attn     = composed ? qcache_composed_attn(composed.get(), ctx, gf, q, q_leader, written, &p)
                                      : qcache_op_attn(ctx, q, q_leader, written, &node);
    if (step.capture != nullptr && attn != nullptr) {
        capture_attention(il, q, q_leader, written, attn);
    }
    return attn;
}

void qcache_graph::capture(enum qcache_capture kind, int32_t il, ggml_tensor * x) {
    ggml_set_output(x);
    ggml_build_forward_expand(gf, x);
    step.capture->add(kind, il, x);
}

void qcache_graph::capture_attention(int32_t il, ggml_tensor * q, ggml_tensor * q_leader, ggml_tensor * written, ggml_tensor * attn) {
    if (!has_out()) {
        return;
    }
    if (step.capture->wants(QCACHE_CAPTURE_SCORES) || step.capture->wants(QCACHE_CAPTURE_PROBS)) {
        scores_nodes[il]     = { attn_nodes[il].params, step.out_rows, step.n_out };
        ggml_tensor * scores = qcache_capture_scores(ctx, q, q_leader, written, &scores_nodes[il]); // [n_keys, n_head, n_out]
        if (step.capture->wants(QCACHE_CAPTURE_SCORES)) {
            capture(QCACHE_CAPTURE_SCORES, il, scores);
        }
        if (step.capture->wants(QCACHE_CAPTURE_PROBS)) {
            capture(QCACHE_CAPTURE_PROBS, il, ggml_soft_max(ctx, scores));
        }
    }
    if (step.capture->wants(QCACHE_CAPTURE_ATTN)) {
        capture(QCACHE_CAPTURE_ATTN, il, out_rows(attn));
    }
}

void qcache_graph::capture_hidden(int32_t il, ggml_tensor * x) {
    if (step.capture != nullptr && has_out() && step.capture->wants(QCACHE_CAPTURE_HIDDEN)) {
        capture(QCACHE_CAPTURE_HIDDEN, il, x->ne[1] == n_rows ? out_rows(x) : x);
    }
}
