// layer_graph.h: decoder layers with two of our nodes each between stock ones, for the tests of backends

#pragma once

#include "check.h"
#include "qcache-backend.h"
#include "qcache-impl.h"
#include "qcache-op.h"

#include <ggml-alloc.h>
#include <ggml-cpp.h>

#include <cmath>
#include <cstring>
#include <vector>

constexpr int HEAD_DIM = 32, N_HEAD = 4, N_EMBD = HEAD_DIM * N_HEAD, N_ROWS = 3, N_BLOCK_TOKENS = 16;

inline std::vector<float> values(size_t n, float scale) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) {
        x[i] = scale * std::sin((float) (i * 7 + 1));
    }
    return x;
}

// rms norm, three projections, append, attention, a projection; rows are the last of a sequence of so many blocks
struct layer_graph {
    ggml_context_ptr                  weights{ ggml_init({ ggml_tensor_overhead() * 8, nullptr, true }) };
    ggml_context_ptr                  ctx{ ggml_init({ ggml_tensor_overhead() * 512 + ggml_graph_overhead_custom(512, false), nullptr, true }) };
    ggml_backend_buffer_ptr           weight_buffer;
    std::vector<qcache_buffer_ptr>    block_buffers;
    ggml_gallocr_ptr                  galloc;
    std::vector<qcache_attn_block>    blocks;
    qcache_attn_seq                   seq;
    std::vector<qcache_attn_row>      rows;
    qcache_attn_step                  step = {};
    std::vector<qcache_append_params> append; // by layer
    std::vector<qcache_attn_node>     node;
    std::vector<uint8_t>              scratch;
    ggml_tensor *                     norm, * w[4], * x, * written, * attn, * result; // written and attn: of the last layer
    ggml_cgraph *                     graph;
    const ggml_type                   type; // of K and V
    const size_t                      k_bytes = N_BLOCK_TOKENS * N_HEAD * qcache_kv_row_bytes(type, HEAD_DIM);

    explicit layer_graph(ggml_backend_buffer_type_t buft, int n_layers = 1, int n_blocks = 1, ggml_type type = GGML_TYPE_F16) :
        append(n_layers), node(n_layers), type(type) {
        norm = ggml_new_tensor_1d(weights.get(), GGML_TYPE_F32, N_EMBD);
        for (auto & matrix : w) {
            matrix = ggml_new_tensor_2d(weights.get(), GGML_TYPE_F32, N_EMBD, N_EMBD);
        }
        weight_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), buft));
        ggml_backend_buffer_set_usage(weight_buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_set(norm, values(N_EMBD, 1.0f).data(), 0, ggml_nbytes(norm));
        for (int i = 0; i < 4; i++) {
            ggml_backend_tensor_set(w[i], values(N_EMBD * N_EMBD, 0.1f + 0.01f * i).data(), 0, ggml_nbytes(w[i]));
        }
        for (int i = 0; i < n_blocks; i++) {
            add_block(buft, i, i == n_blocks - 1 ? N_ROWS : N_BLOCK_TOKENS);
        }
        seq = { blocks.data(), n_blocks };
        for (int i = 0; i < N_ROWS; i++) {
            rows.push_back({ 0, (n_blocks - 1) * N_BLOCK_TOKENS + i, i, n_blocks - 1, QCACHE_MODALITY_TEXT });
        }
        step.seqs   = &seq;
        step.rows   = rows.data();
        step.n_seqs = 1;
        step.n_rows = N_ROWS;

        graph = ggml_new_graph_custom(ctx.get(), 512, false);
        x     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, N_EMBD, N_ROWS);
        ggml_set_input(x);
        ggml_set_output(x); // it stays for another run
        result = x;
        for (int il = 0; il < n_layers; il++) {
            add_layer(il);
        }
        ggml_set_output(result);
        ggml_build_forward_expand(graph, result);
    }

    // a buffer of its own for each
    void add_block(ggml_backend_buffer_type_t buft, int i, int n) {
        block_buffers.emplace_back(ggml_backend_buft_alloc_buffer(buft, 2 * k_bytes * node.size()));
        ggml_backend_buffer_clear(block_buffers.back().get(), 0);
        blocks.push_back({ (uint8_t *) ggml_backend_buffer_get_base(block_buffers.back().get()), i * N_BLOCK_TOKENS, n, QCACHE_MODALITY_TEXT,
                           block_buffers.back().get() });
    }

    void add_layer(int il) {
        auto & a         = append[il];
        a.head_dim       = HEAD_DIM;
        a.n_head_kv      = N_HEAD;
        a.n_block_tokens = N_BLOCK_TOKENS;
        a.type_k = a.type_v = type;
        a.step              = &step;
        auto & p            = node[il].params;
        p.head_dim          = HEAD_DIM;
        p.n_head = p.n_head_kv = N_HEAD;
        p.n_block_tokens       = N_BLOCK_TOKENS;
        p.type_k = p.type_v = type;
        p.scale             = 1.0f / std::sqrt((float) HEAD_DIM);
        p.step              = &step;
        for (int m = 0; m < 2; m++) {
            a.k_offset[m] = p.k_offset[m][0] = p.k_offset[m][1] = 2 * il * k_bytes;
            a.v_offset[m] = p.v_offset[m] = (2 * il + 1) * k_bytes;
        }
        if (scratch.empty()) {
            scratch.resize(qcache_attn_scratch_bytes(p) * 8);
            qcache_attn_scratch_init(p, scratch.data(), 8);
        }
        node[il].kernel = qcache_attn_kernel_scalar();
        node[il].wdata  = scratch.data();

        ggml_tensor * normed = ggml_mul(ctx.get(), ggml_rms_norm(ctx.get(), result, 1e-5f), norm);
        ggml_tensor * qkv[3];
        for (int i = 0; i < 3; i++) {
            qkv[i] = ggml_reshape_3d(ctx.get(), ggml_mul_mat(ctx.get(), w[i], normed), HEAD_DIM, N_HEAD, N_ROWS);
        }
        written = qcache_op_append(ctx.get(), qkv[1], qkv[2], &a);
        attn    = qcache_op_attn(ctx.get(), qkv[0], nullptr, written, &node[il]);
        result  = ggml_add(ctx.get(), ggml_mul_mat(ctx.get(), w[3], attn), result);
    }

    std::vector<float> read() const {
        std::vector<float> out(N_EMBD * N_ROWS);
        ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
        return out;
    }

    void prepare(ggml_backend_t backend) {
        if (!galloc) {
            galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
            CHECK(ggml_gallocr_alloc_graph(galloc.get(), graph));
        }
        ggml_backend_tensor_set(x, values(N_EMBD * N_ROWS, 2.0f).data(), 0, ggml_nbytes(x));
    }

    // as gallocr does where another graph needs more
    void release_compute_buffer(ggml_backend_t backend) {
        galloc.reset();
        x->data   = nullptr;
        x->buffer = nullptr;
        for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
            ggml_graph_node(graph, i)->data   = nullptr;
            ggml_graph_node(graph, i)->buffer = nullptr;
        }
        qcache_backend_forget_all(backend);
    }

    std::vector<float> run(ggml_backend_t backend) {
        prepare(backend);
        CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
        return read();
    }
};

inline bool near(const std::vector<float> & a, const std::vector<float> & b, double nmse = 1e-12) {
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < a.size(); i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return error <= nmse * norm; // NaN is not
}
