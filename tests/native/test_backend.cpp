// test_backend.cpp: the backend that wraps a device, here ggml's CPU with emulated kernels (emulated_gpu.cpp): its place in
// ggml's interface, what it leaves to the wrapped backend, and that the scheduler sees one backend and copies nothing

#include "check.h"
#include "qcache-backend.h"
#include "qcache-ggml-abi.h"
#include "qcache-impl.h"
#include "qcache-op.h"

#include <ggml-alloc.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int HEAD_DIM = 32, N_HEAD = 4, N_EMBD = HEAD_DIM * N_HEAD, N_ROWS = 3, N_BLOCK_TOKENS = 16;

std::vector<float> values(size_t n, float scale) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) {
        x[i] = scale * std::sin((float) (i * 7 + 1));
    }
    return x;
}

// rms norm, three projections, append, attention, a projection: two of our nodes between stock ones
struct layer_graph {
    ggml_context_ptr           weights{ ggml_init({ ggml_tensor_overhead() * 8, nullptr, true }) };
    ggml_context_ptr           ctx{ ggml_init({ ggml_tensor_overhead() * 64 + ggml_graph_overhead_custom(64, false), nullptr, true }) };
    ggml_backend_buffer_ptr    weight_buffer, block_buffer;
    ggml_gallocr_ptr           galloc;
    qcache_attn_block          block;
    qcache_attn_seq            seq;
    std::vector<qcache_attn_row> rows;
    qcache_attn_step           step = {};
    qcache_append_params       append = {};
    qcache_attn_node           node   = {};
    std::vector<uint8_t>       scratch;
    ggml_tensor *              norm, * w[4], * x, * written, * attn, * result;
    ggml_cgraph *              graph;

    explicit layer_graph(ggml_backend_buffer_type_t buft) {
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
        const size_t k_bytes = N_BLOCK_TOKENS * N_HEAD * qcache_kv_row_bytes(GGML_TYPE_F16, HEAD_DIM);
        block_buffer.reset(ggml_backend_buft_alloc_buffer(buft, 2 * k_bytes));
        ggml_backend_buffer_clear(block_buffer.get(), 0);
        block = { (uint8_t *) ggml_backend_buffer_get_base(block_buffer.get()), 0, N_ROWS, QCACHE_MODALITY_TEXT, block_buffer.get() };
        seq   = { &block, 1 };
        for (int i = 0; i < N_ROWS; i++) {
            rows.push_back({ 0, i, i, 0, QCACHE_MODALITY_TEXT });
        }
        step.seqs   = &seq;
        step.rows   = rows.data();
        step.n_seqs = 1;
        step.n_rows = N_ROWS;

        append.head_dim       = HEAD_DIM;
        append.n_head_kv      = N_HEAD;
        append.n_block_tokens = N_BLOCK_TOKENS;
        append.type_k = append.type_v = GGML_TYPE_F16;
        append.step                   = &step;
        auto & p                      = node.params;
        p.head_dim                    = HEAD_DIM;
        p.n_head = p.n_head_kv = N_HEAD;
        p.n_block_tokens       = N_BLOCK_TOKENS;
        p.type_k = p.type_v = GGML_TYPE_F16;
        p.scale             = 1.0f / std::sqrt((float) HEAD_DIM);
        p.step              = &step;
        for (int m = 0; m < 2; m++) {
            append.v_offset[m] = p.v_offset[m] = k_bytes;
        }
        scratch.resize(qcache_attn_scratch_bytes(p) * 8);
        node.kernel = qcache_attn_kernel_scalar();
        node.wdata  = scratch.data();

        x = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, N_EMBD, N_ROWS);
        ggml_set_input(x);
        ggml_tensor * normed = ggml_mul(ctx.get(), ggml_rms_norm(ctx.get(), x, 1e-5f), norm);
        ggml_tensor * qkv[3];
        for (int i = 0; i < 3; i++) {
            qkv[i] = ggml_reshape_3d(ctx.get(), ggml_mul_mat(ctx.get(), w[i], normed), HEAD_DIM, N_HEAD, N_ROWS);
        }
        written = qcache_op_append(ctx.get(), qkv[1], qkv[2], &append);
        attn    = qcache_op_attn(ctx.get(), qkv[0], nullptr, written, &node);
        result  = ggml_add(ctx.get(), ggml_mul_mat(ctx.get(), w[3], attn), x);
        ggml_set_output(result);
        graph = ggml_new_graph_custom(ctx.get(), 64, false);
        ggml_build_forward_expand(graph, result);
    }

    std::vector<float> read() const {
        std::vector<float> out(N_EMBD * N_ROWS);
        ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
        return out;
    }

    std::vector<float> run(ggml_backend_t backend) {
        if (!galloc) {
            galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
            CHECK(ggml_gallocr_alloc_graph(galloc.get(), graph));
        }
        ggml_backend_tensor_set(x, values(N_EMBD * N_ROWS, 2.0f).data(), 0, ggml_nbytes(x));
        CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
        return read();
    }
};

bool near(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < a.size(); i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return error <= 1e-12 * norm; // NaN is not
}

void test_device(ggml_backend_dev_t cpu, ggml_backend_dev_t device) {
    CHECK(device != nullptr && device != cpu);
    CHECK(qcache_backend_device(cpu) == device);
    CHECK(qcache_backend_wrapped(device) == cpu && qcache_backend_wrapped(cpu) == cpu);
    CHECK(strcmp(ggml_backend_dev_name(device), "qcache-CPU") == 0);
    const char * why_not = nullptr;
    CHECK(strcmp(qcache_backend_kernels(device, &why_not), "emulated") == 0 && why_not == nullptr);
    CHECK(ggml_backend_dev_type(device) == ggml_backend_dev_type(cpu));
    CHECK(ggml_backend_dev_buffer_type(device) == ggml_backend_dev_buffer_type(cpu));
    CHECK(ggml_backend_dev_supports_buft(device, ggml_backend_cpu_buffer_type()));
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device, &free, &total);
    CHECK(total > 0);

    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    CHECK(strcmp(ggml_backend_reg_name(reg), "qcache") == 0);
    CHECK(ggml_backend_reg_dev_count(reg) == 1 && ggml_backend_reg_dev_get(reg, 0) == device);
    CHECK(qcache_backend_count() == 1 && qcache_backend_get(0) == cpu && qcache_backend_get(1) == nullptr);

    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(device, &props);
    CHECK(strcmp(props.name, "qcache-CPU") == 0);
}

// what our declarations say of ggml's structures is what ggml's own functions say
void test_layouts(ggml_backend_dev_t cpu) {
    const auto * device = (const qcache_abi_device *) cpu;
    CHECK(device->reg == ggml_backend_dev_backend_reg(cpu));
    CHECK(strcmp(device->get_name(cpu), ggml_backend_dev_name(cpu)) == 0);
    CHECK(((const qcache_abi_reg *) device->reg)->api_version == QCACHE_GGML_BACKEND_API);
    ggml_backend_ptr backend{ ggml_backend_dev_init(cpu, nullptr) };
    CHECK(((const qcache_abi_backend *) backend.get())->device == cpu);

    layer_graph            g(ggml_backend_cpu_buffer_type());
    const int              n    = ggml_graph_n_nodes(g.graph);
    const qcache_abi_graph view = ggml_graph_view(g.graph, 2, n - 1);
    CHECK(view.n_nodes == n - 3 && view.n_leafs == 0 && view.uid == 0);
    CHECK(view.nodes[0] == ggml_graph_node(g.graph, 2));
    // fusion is decided by these, and a part of a graph has the whole's
    const auto & whole = *(const qcache_abi_graph *) g.graph;
    CHECK(view.use_counts == whole.use_counts && view.use_counts != nullptr);
    CHECK(view.visited.keys == whole.visited.keys && view.visited.size == whole.visited.size && view.visited.size > 0);
    int uses = 0;
    for (size_t i = 0; i < whole.visited.size; i++) {
        if ((whole.visited.used[i / 32] >> i % 32 & 1) != 0 && whole.visited.keys[i] == g.x) {
            uses = whole.use_counts[i];
        }
    }
    CHECK(uses == 2); // by the norm and by the residual
    CHECK(qcache_abi_custom_of(g.attn).fun == qcache_op_attn_cpu && qcache_abi_custom_of(g.attn).userdata == &g.node);
    CHECK(qcache_abi_custom_of(g.written).fun == qcache_op_append_cpu && qcache_abi_custom_of(g.written).userdata == &g.append);
}

void test_compute(ggml_backend_dev_t cpu, ggml_backend_dev_t device) {
    layer_graph      expected(ggml_backend_dev_buffer_type(cpu)), wrapped(ggml_backend_dev_buffer_type(device));
    ggml_backend_ptr plain{ ggml_backend_dev_init(cpu, nullptr) }, backend{ ggml_backend_dev_init(device, nullptr) };
    CHECK(backend && ggml_backend_get_device(backend.get()) == device);
    CHECK(ggml_backend_dev_supports_op(device, wrapped.attn) && ggml_backend_dev_supports_op(device, wrapped.written));
    CHECK(ggml_backend_dev_supports_op(device, wrapped.result));
    const auto reference = expected.run(plain.get());
    CHECK(near(wrapped.run(backend.get()), reference));
    CHECK(near(wrapped.run(backend.get()), reference)); // and again
    // what was appended, byte by byte
    const size_t size = ggml_backend_buffer_get_size(expected.block_buffer.get());
    CHECK(memcmp(expected.block.data, wrapped.block.data, size) == 0);
}

void test_scheduler(ggml_backend_dev_t device) {
    layer_graph      g(ggml_backend_dev_buffer_type(device)), expected(ggml_backend_cpu_buffer_type());
    ggml_backend_ptr backend{ ggml_backend_dev_init(device, nullptr) }, cpu{ ggml_backend_cpu_init() };
    ggml_backend_t   both[] = { backend.get(), cpu.get() };
    ggml_backend_sched_ptr sched{ ggml_backend_sched_new(both, nullptr, 2, 64, false, true) };
    CHECK(ggml_backend_sched_alloc_graph(sched.get(), g.graph));
    CHECK(ggml_backend_sched_get_n_splits(sched.get()) == 1);
    CHECK(ggml_backend_sched_get_tensor_backend(sched.get(), g.attn) == backend.get());
    CHECK(ggml_backend_sched_get_tensor_backend(sched.get(), g.written) == backend.get());
    // no copy of the input was made for the wrapping backend: the graph's own tensor is what the nodes read
    CHECK(g.x->data != nullptr && ggml_graph_node(g.graph, 0)->src[0] == g.x);
    ggml_backend_tensor_set(g.x, values(N_EMBD * N_ROWS, 2.0f).data(), 0, ggml_nbytes(g.x));
    CHECK(ggml_backend_sched_graph_compute(sched.get(), g.graph) == GGML_STATUS_SUCCESS);
    CHECK(near(g.read(), expected.run(cpu.get())));
}

} // namespace

int main() {
    const ggml_backend_dev_t cpu    = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const ggml_backend_dev_t device = qcache_backend_device(cpu);
    test_device(cpu, device);
    test_layouts(cpu);
    test_compute(cpu, device);
    test_scheduler(device);
    return check_report("test-backend");
}
