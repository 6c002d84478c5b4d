// op_harness.cpp: the lazy-attention operation for tests/op_harness.py, through a real ggml graph on the CPU backend, or on a
// GPU through the backend that wraps it: an emulated one in qcache-op-harness, the machine's first in qcache-op-device
//
// Everything the kernels touch lies between guard bytes of 0xff (NaN as f32, f16 and q8_0 scale), and so is everything
// they have to write before they write it.

#include "cpu/attn-scratch.h"
#include "harness_api.h"
#include "qcache-backend.h"
#include "qcache-composed.h"
#include "qcache-impl.h"
#include "qcache-op.h"
#include "qcache.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#if !defined(QCACHE_OP_DEVICE)
#    include "emulated_gpu.h"
#    include "metal_emulation.h"
#endif

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#define QV_NQ 4
#define QV_MR 6
#define QV_NR 2

namespace width_4 {
#define QCACHE_ATTN_KERNEL kernel
#define QCACHE_ATTN_NAME   "emulated-4"
#define QV_WIDTH           4
#include "attn-emulated.inl.h"
#undef QCACHE_ATTN_NAME
#undef QV_WIDTH
} // namespace width_4

namespace width_16 {
#define QCACHE_ATTN_NAME "emulated-16"
#define QV_WIDTH         16
#include "attn-emulated.inl.h"
} // namespace width_16

namespace {

constexpr size_t  GUARD_BYTES = 256;
constexpr uint8_t GUARD       = 0xff;

thread_local std::string error;

// memory between guards
struct guarded {
    std::vector<uint8_t> memory;
    size_t               size;

    explicit guarded(size_t size) : memory(size + 2 * GUARD_BYTES + 64, GUARD), size(size) {}

    uint8_t * data() {
        const uintptr_t start = (uintptr_t) memory.data() + GUARD_BYTES;
        return (uint8_t *) ((start + 63) / 64 * 64);
    }
    bool intact() {
        const uint8_t * begin = memory.data();
        const uint8_t * end   = begin + memory.size();
        for (const uint8_t * p = begin; p < end; p++) {
            if ((p < data() || p >= data() + size) && *p != GUARD) {
                return false;
            }
        }
        return true;
    }
};

// a block of KV, or a result, as a ggml buffer inside guarded memory
struct guarded_buffer {
    guarded                 memory;
    ggml_backend_buffer_ptr buffer;

    explicit guarded_buffer(size_t size) : memory(size), buffer(ggml_backend_cpu_buffer_from_ptr(memory.data(), size)) {}
};

// guarded memory as a GPU has it: filled from the host's before a run, read back after it
struct twin {
    guarded &         host;
    ggml_context_ptr  ctx;
    qcache_buffer_ptr buffer;
    ggml_tensor *     all; // bytes, guards included

    twin(guarded & host, ggml_backend_buffer_type_t buft) :
        host(host), ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true })),
        buffer(ggml_backend_buft_alloc_buffer(buft, host.size + 2 * GUARD_BYTES)),
        all(ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, (int64_t) (host.size + 2 * GUARD_BYTES))) {
        ggml_backend_tensor_alloc(buffer.get(), all, ggml_backend_buffer_get_base(buffer.get()));
    }

    uint8_t * data() { return (uint8_t *) all->data + GUARD_BYTES; }
    void      up() { ggml_backend_tensor_set(all, host.data() - GUARD_BYTES, 0, ggml_nbytes(all)); }
    void      down() { ggml_backend_tensor_get(all, host.data() - GUARD_BYTES, 0, ggml_nbytes(all)); }
};

// The GPU of a run, NULL with qcache_last_error(): there is none.
ggml_backend_dev_t gpu_device(bool metal) {
#if defined(QCACHE_OP_DEVICE)
    (void) metal;
    const ggml_backend_dev_t found = qcache_backend_get(0);
    if (found == nullptr) {
        qcache_fail(QCACHE_STATUS_UNSUPPORTED, "ggml has no GPU");
        return nullptr;
    }
    return qcache_backend_device(found);
#else
    qcache_emulated_gpu_use(metal);
    return qcache_backend_device(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
#endif
}

const qcache_attn_kernel * find_kernel(const std::string & name) {
    if (name == "best") {
        return qcache_attn_kernel_best();
    }
    for (int i = 0; qcache_attn_kernel_by_index(i); i++) {
        if (name == qcache_attn_kernel_by_index(i)->name) {
            return qcache_attn_kernel_by_index(i);
        }
    }
    for (const qcache_attn_kernel * kernel : { width_4::kernel(), width_16::kernel() }) {
        if (name == kernel->name) {
            return kernel;
        }
    }
    return nullptr;
}

ggml_tensor * input(ggml_context * ctx, const float * data, int64_t ne0, int64_t ne1, int64_t ne2) {
    if (data == nullptr) {
        return nullptr;
    }
    ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2);
    ggml_set_input(t);
    return t;
}

void fill(ggml_tensor * t, const float * data) {
    if (t != nullptr && t->buffer != nullptr) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    }
}

} // namespace

struct harness {
    std::vector<std::unique_ptr<guarded_buffer>> blocks;
};

// the layouts below are mirrored in op_harness.py
struct harness_seq_block {
    int32_t seq;
    int32_t id;
    int32_t first;
    int32_t n;
    int32_t modality;
};

struct harness_row {
    int32_t seq;
    int32_t pos;
    int32_t q_own;
    int32_t block;
    int32_t modality;
};

struct harness_step {
    const harness_seq_block * blocks; // by sequence, in order
    const harness_row *       rows;
    int32_t                   n_blocks;
    int32_t                   n_rows;
    int32_t                   n_seqs;
    int32_t                   n_score_keys; // 0: no score cache
    float *                   scores;       // out [n_rows * n_score_keys * n_head], or NULL
    int64_t                   v_rows[2];    // out: of decode steps with v_skip, all and skipped
};

struct harness_layer {
    int32_t       head_dim, n_head, n_head_kv, n_block_tokens, type_k, type_v;
    float         scale;
    int32_t       q_source[2][2];
    int32_t       score_op;
    int64_t       k_offset[2][2];
    int64_t       v_offset[2];
    int64_t       append_k_offset[2]; // -1: none kept
    int32_t       n_own;              // rows of q_own
    int32_t       n_k;                // rows of k
    const float * vis_bias;
    const float * q_own;
    const float * q_leader;
    const float * k;
    const float * v;                  // NULL: nothing is appended
    float *       out;                // [n_rows][n_head * head_dim]
    float         v_skip;
};

HARNESS_API const char * harness_error() {
    return error.c_str();
}

HARNESS_API harness * harness_init(const int64_t * block_bytes, int32_t n_blocks) {
    auto * h = new harness();
    for (int32_t i = 0; i < n_blocks; i++) {
        h->blocks.emplace_back(new guarded_buffer(block_bytes[i]));
    }
    return h;
}

HARNESS_API void harness_free(harness * h) {
    delete h;
}

HARNESS_API uint8_t * harness_block(harness * h, int32_t i) {
    return h->blocks[i]->memory.data();
}

// kernels of this CPU, best first, then emulations of other vector widths; NULL past the end
HARNESS_API const char * harness_kernel_name(int32_t i) {
    int n = 0;
    while (qcache_attn_kernel_by_index(n)) {
        n++;
    }
    return i < n ? qcache_attn_kernel_by_index(i)->name : i == n ? "emulated-4" : i == n + 1 ? "emulated-16" : nullptr;
}

HARNESS_API int32_t harness_row_bytes(int32_t type, int32_t head_dim) {
    return (int32_t) qcache_kv_row_bytes(type, head_dim);
}

HARNESS_API int32_t harness_type_supported(int32_t type, int32_t head_dim) {
    return qcache_kv_type_supported(type, head_dim);
}

#if !defined(QCACHE_OP_DEVICE)

// The Metal emulation alone: a function with arguments of one's own; "" or what is wrong.
HARNESS_API const char * harness_metal_emulate(const char * entry, const int32_t * constants, int32_t n_constants, const int32_t * grid,
                                               int32_t n_threads, int32_t threadgroup_bytes, const void * args, int64_t n_args) {
    std::map<int, int> by_index;
    for (int32_t i = 0; i < n_constants; i++) {
        by_index[i] = constants[i];
    }
    metal_emulate(entry, by_index, grid, n_threads, threadgroup_bytes, args, (size_t) n_args, error);
    return error.c_str();
}

HARNESS_API void harness_metal_without_barrier(int32_t line) {
    metal_emulation_without_barrier(line);
}

// lines of the barriers that were come to, n of them at most; how many there are
HARNESS_API int32_t harness_metal_barriers(int32_t * lines, int32_t n) {
    for (const int line : metal_emulation_barriers()) {
        *lines = n > 0 ? line : *lines;
        lines += n > 0;
        n--;
    }
    return (int32_t) metal_emulation_barriers().size();
}

#endif

// Appends and attends, layer after layer, in one graph, n_runs times. -1 with harness_error() when a constructor
// refuses, -2 when the graph fails, -3 when a guard was overwritten.
HARNESS_API int32_t harness_run(harness * h, harness_step * hs, const harness_layer * layers, int32_t n_layers,
                                const char * kernel_name, int32_t n_threads, int32_t n_runs) {
    const std::string name     = kernel_name;
    const bool        composed = name == "composed";
    const bool        metal    = name == "metal";
    const bool        gpu      = name == "gpu" || metal;

    const ggml_backend_dev_t device = gpu ? gpu_device(metal) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_ptr         backend{ device != nullptr ? ggml_backend_dev_init(device, nullptr) : nullptr };
    if (!backend) {
        error = std::string("no device: ") + qcache_last_error();
        return -2;
    }
    if (!gpu) {
        ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
    }
    const ggml_backend_buffer_type_t   buft = ggml_backend_dev_buffer_type(device);
    std::vector<std::unique_ptr<twin>> twins;
    const auto                         twin_of = [&](guarded & memory) {
        twins.emplace_back(new twin(memory, buft));
        return twins.back().get();
    };

    std::vector<twin *> of_block; // one for all sequences that share it
    for (size_t i = 0; gpu && i < h->blocks.size(); i++) {
        of_block.push_back(twin_of(h->blocks[i]->memory));
    }
    std::vector<std::vector<qcache_attn_block>> seq_blocks(hs->n_seqs);
    for (int32_t i = 0; i < hs->n_blocks; i++) {
        const harness_seq_block & b  = hs->blocks[i];
        guarded_buffer &          m  = *h->blocks[b.id];
        uint8_t *                 at = gpu ? of_block[b.id]->data() : m.memory.data();
        seq_blocks[b.seq].push_back({ at, b.first, b.n, (int8_t) b.modality, gpu ? of_block[b.id]->buffer.get() : m.buffer.get() });
    }
    std::vector<qcache_attn_seq> seqs;
    for (const auto & blocks : seq_blocks) {
        seqs.push_back({ blocks.data(), (int32_t) blocks.size() });
    }
    std::vector<qcache_attn_row> rows;
    for (int32_t i = 0; i < hs->n_rows; i++) {
        const harness_row & r = hs->rows[i];
        rows.push_back({ r.seq, r.pos, r.q_own, r.block, (int8_t) r.modality });
    }
    const size_t n_scores = (size_t) hs->n_rows * layers[0].n_head * hs->n_score_keys;
    guarded      scores(n_scores * sizeof(float));

    qcache_attn_step step = {};
    step.seqs             = seqs.data();
    step.rows             = rows.data();
    step.n_seqs           = hs->n_seqs;
    step.n_rows           = hs->n_rows;
    step.scores           = hs->n_score_keys > 0 ? (float *) scores.data() : nullptr;
    step.n_score_keys     = hs->n_score_keys;
    if (gpu && hs->n_score_keys > 0) {
        twin * t           = twin_of(scores);
        step.scores        = (float *) t->data();
        step.scores_buffer = t->buffer.get();
    }

    const qcache_attn_kernel * kernel = composed ? nullptr : find_kernel(gpu ? "scalar" : name);
    if (!composed && kernel == nullptr) {
        error = "no kernel " + name;
        return -1;
    }

    const size_t     n_nodes = 64 + n_layers * (64 + qcache_composed_n_nodes(&step));
    ggml_init_params init    = { ggml_tensor_overhead() * n_nodes * 2 + ggml_graph_overhead_custom(n_nodes, false), nullptr, true };
    ggml_context_ptr ctx{ ggml_init(init) };
    ggml_cgraph *    graph = ggml_new_graph_custom(ctx.get(), n_nodes, false);

    std::vector<qcache_append_params>            appends(n_layers);
    std::vector<qcache_attn_node>                nodes(n_layers);
    std::vector<std::unique_ptr<guarded>>        scratch;
    std::vector<std::unique_ptr<guarded_buffer>> results;
    std::vector<ggml_tensor *>                   q_own, q_leader, k, v, out;
    std::unique_ptr<qcache_composed, void (*)(qcache_composed *)> shared(
        composed ? qcache_composed_init(ctx.get(), &step, layers[0].n_block_tokens) : nullptr, qcache_composed_free);

    for (int32_t il = 0; il < n_layers; il++) {
        const harness_layer &  l = layers[il];
        qcache_append_params & a = appends[il];
        qcache_attn_params &   p = nodes[il].params;
        a.head_dim               = l.head_dim;
        a.n_head_kv              = l.n_head_kv;
        a.n_block_tokens         = l.n_block_tokens;
        a.type_k                 = l.type_k;
        a.type_v                 = l.type_v;
        a.step                   = &step;
        p.head_dim               = l.head_dim;
        p.n_head                 = l.n_head;
        p.n_head_kv              = l.n_head_kv;
        p.n_block_tokens         = l.n_block_tokens;
        p.type_k                 = l.type_k;
        p.type_v                 = l.type_v;
        p.scale                  = l.scale;
        p.score_op               = (qcache_score_op) l.score_op;
        p.vis_bias               = l.vis_bias;
        p.v_skip                 = l.v_skip;
        p.step                   = &step;
        for (int m = 0; m < 2; m++) {
            a.k_offset[m] = l.append_k_offset[m] < 0 ? SIZE_MAX : (size_t) l.append_k_offset[m];
            a.v_offset[m] = (size_t) l.v_offset[m];
            p.v_offset[m] = (size_t) l.v_offset[m];
            for (int n = 0; n < 2; n++) {
                p.k_offset[m][n] = (size_t) l.k_offset[m][n];
                p.q_source[m][n] = (qcache_q_source) l.q_source[m][n];
            }
        }
        nodes[il].kernel = kernel;
        // scratch of impossible shapes is not asked for: the constructor refuses them
        const bool valid = l.n_head_kv > 0 && l.n_head >= l.n_head_kv && l.head_dim > 0 && l.n_block_tokens > 0;
        scratch.emplace_back(new guarded(valid ? qcache_attn_scratch_bytes(p) * n_threads : 0));
        nodes[il].wdata = scratch.back()->data();
        if (valid) {
            qcache_attn_scratch_init(p, nodes[il].wdata, n_threads);
        }

        q_own.push_back(input(ctx.get(), l.q_own, l.head_dim, l.n_head, l.n_own));
        q_leader.push_back(input(ctx.get(), l.q_leader, l.head_dim, l.n_head, hs->n_rows));
        k.push_back(input(ctx.get(), l.k, l.head_dim, l.n_head_kv, l.n_k));
        v.push_back(input(ctx.get(), l.v, l.head_dim, l.n_head_kv, hs->n_rows));

        ggml_tensor * after = nullptr;
        if (v[il]) {
            after = qcache_op_append(ctx.get(), k[il], v[il], &a);
            if (after == nullptr) {
                error = qcache_last_error();
                return -1;
            }
        }
        ggml_tensor * result = composed ? qcache_composed_attn(shared.get(), ctx.get(), graph, q_own[il], q_leader[il], after, &p)
                                        : qcache_op_attn(ctx.get(), q_own[il], q_leader[il], after, &nodes[il]);
        if (result == nullptr) {
            error = qcache_last_error();
            return -1;
        }
        if (composed) {
            // a view: give it memory of its own
            result = ggml_cont(ctx.get(), result);
        }
        results.emplace_back(new guarded_buffer(ggml_nbytes(result)));
        if (gpu) {
            twin * t = twin_of(results.back()->memory);
            ggml_backend_tensor_alloc(t->buffer.get(), result, t->data());
        } else {
            ggml_backend_tensor_alloc(results.back()->buffer.get(), result, results.back()->memory.data());
        }
        ggml_build_forward_expand(graph, result);
        out.push_back(result);
    }

    ggml_gallocr_ptr galloc{ ggml_gallocr_new(buft) };
    if (!ggml_gallocr_alloc_graph(galloc.get(), graph)) {
        error = "the graph cannot be allocated";
        return -2;
    }
    for (auto & t : twins) {
        t->up();
    }
    for (int32_t run = 0; run < n_runs; run++) {
        for (int32_t il = 0; il < n_layers; il++) {
            fill(q_own[il], layers[il].q_own);
            fill(q_leader[il], layers[il].q_leader);
            fill(k[il], layers[il].k);
            fill(v[il], layers[il].v);
        }
        if (composed) {
            qcache_composed_set_inputs(shared.get());
        }
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            error = gpu ? std::string("the graph failed: ") + qcache_last_error() : "the graph failed";
            return -2;
        }
    }
    for (auto & t : twins) {
        t->down();
    }
    for (int32_t il = 0; il < n_layers; il++) {
        memcpy(layers[il].out, results[il]->memory.data(), ggml_nbytes(out[il]));
        const qcache_attn_v_rows v_rows = qcache_attn_count_v_rows(nodes[il].params, nodes[il].wdata, n_threads);
        hs->v_rows[0] += (int64_t) v_rows.n;
        hs->v_rows[1] += (int64_t) v_rows.n_skipped;
    }
    if (hs->scores) {
        memcpy(hs->scores, scores.data(), n_scores * sizeof(float));
    }

    const char * overwritten = scores.intact() ? nullptr : "score cache";
    for (int32_t il = 0; il < n_layers; il++) {
        overwritten = results[il]->memory.intact() ? overwritten : "result";
        overwritten = scratch[il]->intact() ? overwritten : "scratch";
    }
    for (auto & block : h->blocks) {
        overwritten = block->memory.intact() ? overwritten : "block";
    }
    if (overwritten) {
        error = std::string("guard overwritten: ") + overwritten;
        return -3;
    }
    return 0;
}
