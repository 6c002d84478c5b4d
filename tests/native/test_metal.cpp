// test_metal.cpp: metal/runtime.mm behind the backend that wraps a device, on a mock of Metal that is as strict as it can be
// (metal_mock/metal_mock.h): order of the queues, addresses, lifetimes of objects, and what is said when something fails

#include "metal_mock/ggml_metal.h"
#include "metal_mock/metal_mock.h"
#include "mock_tests.h"

#include <fstream>
#include <string>
#include <unistd.h>

using metal_mock::call;
using metal_mock::order;

namespace {

bool clean() {
    const bool none = metal_mock::violations().empty();
    metal_mock::clear_violations();
    return none;
}

ggml_backend_dev_t wrapping() {
    return qcache_backend_device(metal_mock::ggml_device(0));
}

void test_devices() {
    const char * why_not = nullptr;
    CHECK(wrapping() != metal_mock::ggml_device(0) && says(qcache_backend_kernels(wrapping(), &why_not), "metal") && why_not == nullptr);
    CHECK(qcache_backend_count() == 2 && qcache_backend_get(0) == metal_mock::ggml_device(0));

    const ggml_backend_dev_t with_private = metal_mock::ggml_device(1);
    CHECK(qcache_backend_device(with_private) == with_private && qcache_backend_wrapped(with_private) == with_private);
    CHECK(qcache_backend_kernels(with_private, &why_not) == nullptr && says(why_not, "its buffers are private"));

    struct {
        void (*change)(metal_mock::properties &);
        const char * expected;
    } refused[] = {
        { [](auto & p) { p.unified = false; }, "or not Apple's" },
        { [](auto & p) { p.apple7 = false; }, "older than Apple's M1" },
        { [](auto & p) { p.tier2 = false; }, "no argument buffers of tier 2" },
        { [](auto & p) { p.addresses = false; }, "macOS 13" },
        { [](auto & p) { p.events = p.nothing; }, "no events" },
        { [](auto & p) { p.events = p.other_object; }, "not those of ggml 0.25.3" },
        { [](auto & p) { p.events = p.other_counter; }, "not those of ggml 0.25.3" },
    };
    int i = 2;
    for (const auto & r : refused) {
        r.change(metal_mock::device());
        CHECK(qcache_backend_kernels(metal_mock::ggml_device(i), &why_not) == nullptr && says(why_not, r.expected));
        metal_mock::device() = {};
        CHECK(qcache_backend_device(metal_mock::ggml_device(i)) == metal_mock::ggml_device(i)); // it stays refused
        i++;
    }
    CHECK(clean());
}

// the same results whatever the queues' turn, with no wait of the host inside a step and no object left
void test_compute(order o) {
    metal_mock::set_order(o);
    const int n_objects = metal_mock::n_objects();
    check_steps(wrapping(), false, [] { return metal_mock::n_calls(call::dispatch); }, metal_mock::n_host_waits);
    CHECK(metal_mock::n_objects() == n_objects && clean());
}

// few compiled functions, shared by contexts
void test_code() {
    ggml_backend_ptr a{ ggml_backend_dev_init(wrapping(), nullptr) };
    const int        n_libraries = metal_mock::n_calls(call::new_library);
    ggml_backend_ptr b{ ggml_backend_dev_init(wrapping(), nullptr) };
    CHECK(metal_mock::n_calls(call::new_library) == n_libraries);
    layer_graph g(ggml_backend_get_default_buffer_type(a.get()), N_LAYERS, N_BLOCKS);
    CHECK(close(g.run(a.get()), reference()));
    const int n_functions = metal_mock::n_calls(call::new_pipeline);
    g.release_compute_buffer(a.get());
    CHECK(close(g.run(b.get()), reference()));
    CHECK(metal_mock::n_calls(call::new_pipeline) == n_functions && clean());
    // other types, other functions
    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
    layer_graph      expected(ggml_backend_cpu_buffer_type(), 1, 1, GGML_TYPE_Q8_0);
    layer_graph      quantised(ggml_backend_get_default_buffer_type(b.get()), 1, 1, GGML_TYPE_Q8_0);
    CHECK(close(quantised.run(b.get()), expected.run(cpu.get())));
    CHECK(metal_mock::n_calls(call::new_pipeline) == n_functions + 2 && clean());
}

// a buffer's pages become another's, at the same place
void test_forgotten_buffers() {
    ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
    for (int i = 0; i < 3; i++) {
        layer_graph g(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, N_BLOCKS);
        CHECK(close(g.run(backend.get()), reference()));
        g.release_compute_buffer(backend.get());
        CHECK(close(g.run(backend.get()), reference()));
        g.release_compute_buffer(backend.get());
    }
    // mapped once, not once a step
    layer_graph g(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, N_BLOCKS);
    g.run(backend.get());
    const int n_mapped = metal_mock::n_calls(call::map_buffer);
    g.run(backend.get());
    CHECK(metal_mock::n_calls(call::map_buffer) == n_mapped);
    // a block goes, another comes
    g.blocks.pop_back();
    g.block_buffers.pop_back();
    g.blocks.reserve(N_BLOCKS);
    g.add_block(ggml_backend_get_default_buffer_type(backend.get()), N_BLOCKS - 1, N_ROWS);
    g.seq.blocks = g.blocks.data();
    CHECK(close(g.run(backend.get()), reference()));
    CHECK(clean());
}

// a step fails with what Metal says, the next one is right
void test_failed_steps(order o) {
    metal_mock::set_order(o);
    struct {
        call         what;
        int          after;
        bool         at_once; // or when the GPU comes to it
        const char * expected;
    } faults[] = {
        { call::new_function, 0, true, "Metal: function qcache_append: Function qcache_append was not found in the library" },
        { call::new_pipeline, 0, true, "Metal: compiling qcache_append: Compiler encountered an internal error" },
        { call::new_pipeline, 1, true, "Metal: compiling qcache_decode_1: Compiler encountered an internal error" },
        { call::new_buffer, 0, true, "bytes of tables" },
        { call::new_buffer, 1, true, "bytes of workspace" },
        { call::map_buffer, 0, true, "Metal: cannot map a buffer of" },
        { call::map_buffer, N_BLOCKS, true, "Metal: cannot map a buffer of" },
        { call::command_buffer, 0, true, "Metal: creating a command buffer" },
        { call::command_buffer, 1, true, "Metal: creating a command buffer" },
        { call::encoder, 1, true, "Metal: creating a command encoder" },
        { call::dispatch, 0, false, "Metal: Caused GPU Timeout Error (injected)" },
        { call::dispatch, 4, false, "Metal: Caused GPU Timeout Error (injected)" },
        { call::dispatch, 3 * N_LAYERS - 1, false, "Metal: Caused GPU Timeout Error (injected)" },
    };
    const int n_objects = metal_mock::n_objects();
    for (const auto & f : faults) {
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        layer_graph      g(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, N_BLOCKS);
        g.prepare(backend.get());
        metal_mock::fail(f.what, f.after);
        const enum ggml_status status = ggml_backend_graph_compute(backend.get(), g.graph);
        CHECK((status == GGML_STATUS_FAILED) == f.at_once || (o == order::ours_early && !f.at_once));
        CHECK(says(qcache_backend_failed(backend.get()), f.expected));
        check_right(backend.get(), g);
        CHECK(clean());
    }
    CHECK(metal_mock::n_objects() == n_objects && clean());
}

// no backend is made, and it is said why
void test_failed_starts() {
    struct {
        call         what;
        int          after;
        const char * expected;
    } faults[] = {
        { call::new_library, 0, "Metal: compiling the kernels: program_source:12:3: error: use of undeclared identifier 'x'" },
        { call::new_queue, 0, "Metal: creating a command queue" },
        { call::new_event, 0, "Metal: creating events" },
        { call::new_event, 1, "Metal: creating events" },
    };
    const int n_objects = metal_mock::n_objects();
    for (const auto & f : faults) {
        metal_mock::fail(f.what, f.after);
        CHECK(ggml_backend_dev_init(wrapping(), nullptr) == nullptr && says(qcache_last_error(), f.expected));
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        CHECK(backend != nullptr);
    }
    // a GPU with SIMD groups of another size, or too few threads
    for (const bool narrow : { true, false }) {
        (narrow ? metal_mock::device().simd_width : metal_mock::device().max_threads) = 64;
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        layer_graph      g(ggml_backend_get_default_buffer_type(backend.get()), 1, 1);
        g.prepare(backend.get());
        CHECK(ggml_backend_graph_compute(backend.get(), g.graph) == GGML_STATUS_FAILED);
        CHECK(says(qcache_backend_failed(backend.get()), "expected 128 in groups of 32"));
        metal_mock::device() = {};
    }
    CHECK(metal_mock::n_objects() == n_objects && clean());
}

// compiled ahead
void test_metallib(const std::string & executable) {
    const std::string path = executable.substr(0, executable.rfind('/') + 1) + "qcache.metallib";
    std::ofstream(path) << "qcache_append qcache_decode_1";
    {
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        layer_graph      g(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, 1);
        g.prepare(backend.get());
        CHECK(ggml_backend_graph_compute(backend.get(), g.graph) == GGML_STATUS_SUCCESS);
        layer_graph cut(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, N_BLOCKS);
        cut.prepare(backend.get());
        CHECK(ggml_backend_graph_compute(backend.get(), cut.graph) == GGML_STATUS_FAILED);
        CHECK(says(qcache_backend_failed(backend.get()), "Metal: function qcache_merge:"));
    }
    metal_mock::fail(call::new_library);
    CHECK(ggml_backend_dev_init(wrapping(), nullptr) == nullptr && says(qcache_last_error(), "Metal: loading ") && says(qcache_last_error(), path));
    unlink(path.c_str());
    CHECK(clean());
}

} // namespace

int main(int, char ** argv) {
    test_devices();
    for (const order o : { order::ours_late, order::ours_early }) {
        test_compute(o);
        test_failed_steps(o);
    }
    test_code();
    test_forgotten_buffers();
    test_failed_starts();
    test_metallib(argv[0]);
    return check_report("test-metal");
}
