// test_backend.cpp: the backend that wraps a device, here ggml's CPU with emulated kernels (emulated_gpu.cpp): its place in
// ggml's interface, what it leaves to the wrapped backend, and that the scheduler sees one backend and copies nothing

#include "layer_graph.h"
#include "qcache-ggml-abi.h"

#include <ggml-cpu.h>

namespace {

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
    CHECK(qcache_abi_custom_of(g.attn).fun == qcache_op_attn_cpu && qcache_abi_custom_of(g.attn).userdata == &g.node[0]);
    CHECK(qcache_abi_custom_of(g.written).fun == qcache_op_append_cpu && qcache_abi_custom_of(g.written).userdata == &g.append[0]);
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
    const size_t size = ggml_backend_buffer_get_size(expected.block_buffers[0].get());
    CHECK(memcmp(expected.blocks[0].data, wrapped.blocks[0].data, size) == 0);
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
