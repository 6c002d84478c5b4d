// test_cuda.cpp: cuda/runtime.cu behind the backend that wraps a device, as nvcc compiled it, on a mock of the CUDA runtime that is as
// strict as it can be (cuda_mock/cuda_mock.h): order of the streams, memory, lifetimes of objects, and what is said when something fails

#include "cuda_mock/cuda_mock.h"
#include "ggml_mock.h"
#include "mock_tests.h"

#include <cstdlib>
#include <string>

using cuda_mock::call;
using cuda_mock::order;

namespace {

bool clean() {
    const bool none = cuda_mock::violations().empty();
    cuda_mock::clear_violations();
    return none;
}

ggml_backend_dev_t wrapping(int i = 0) {
    return qcache_backend_device(ggml_mock::devices()[i]);
}

// what runtime.cu is to use, asked for by the environment
struct stream_setting {
    explicit stream_setting(const char * value) { value == nullptr ? unsetenv("QCACHE_CUDA_STREAM") : setenv("QCACHE_CUDA_STREAM", value, 1); }
    ~stream_setting() { unsetenv("QCACHE_CUDA_STREAM"); }
};

// With an event and a stream of ggml's, or two; a stream of ours beside it has three objects more: itself and two events.
bool has_own_stream(ggml_backend_dev_t device) {
    const int        before = cuda_mock::n_objects();
    ggml_backend_ptr backend{ ggml_backend_dev_init(device, nullptr) };
    ggml_backend_synchronize(backend.get()); // ggml's is there
    const int n = cuda_mock::n_objects() - before;
    CHECK(backend != nullptr && (n == 2 || n == 5 || n == 6));
    return n > 2;
}

void test_devices() {
    const char * why_not = nullptr;
    CHECK(wrapping() != ggml_mock::devices()[0] && says(qcache_backend_kernels(wrapping(), &why_not), "cuda") && why_not == nullptr);
    CHECK(qcache_backend_count() == 2 && qcache_backend_get(1) == ggml_mock::devices()[1]);
    CHECK(clean());
}

// ggml's own stream where it shows for certain, else one of ours
void test_streams() {
    using shown = cuda_mock::ggml_properties;
    CHECK(!has_own_stream(wrapping(0)));
    {
        const stream_setting own("own");
        CHECK(has_own_stream(wrapping(0)));
    }
    for (const auto what : { shown::other_device, shown::used, shown::several, shown::nothing }) {
        cuda_mock::ggml().shown = what;
        CHECK(has_own_stream(wrapping(0)));
        const stream_setting ggmls("ggml");
        CHECK(ggml_backend_dev_init(wrapping(0), nullptr) == nullptr);
        CHECK(says(qcache_last_error(), "QCACHE_CUDA_STREAM=ggml: device 0 doesn't show which stream is ggml's"));
    }
    cuda_mock::ggml() = {};
    {
        const stream_setting ggmls("ggml");
        CHECK(!has_own_stream(wrapping(0)));
    }
    CHECK(clean());
}

// the same results whatever the streams' turn, with no wait of the host inside a step and no object left
void test_compute(order o, const char * setting, bool events, int device) {
    const stream_setting stream(setting);
    cuda_mock::set_order(o);
    cuda_mock::ggml().events = events;
    const int  n_objects = cuda_mock::n_objects();
    const bool waits     = setting != nullptr && !events; // the host does, for want of events
    check_steps(wrapping(device), waits, [] { return cuda_mock::n_calls(call::launch); }, cuda_mock::n_host_waits);
    CHECK(cuda_mock::n_objects() == n_objects && clean());
    cuda_mock::ggml() = {};
}

// two contexts on one device, and one on another, in turns
void test_contexts() {
    cuda_mock::set_order(order::all_late);
    std::vector<ggml_backend_ptr> backends;
    std::vector<std::unique_ptr<layer_graph>> graphs;
    for (const int device : { 0, 1, 0 }) {
        backends.emplace_back(ggml_backend_dev_init(wrapping(device), nullptr));
        graphs.emplace_back(new layer_graph(ggml_backend_get_default_buffer_type(backends.back().get()), N_LAYERS, N_BLOCKS));
    }
    for (int turn = 0; turn < 2; turn++) {
        for (size_t i = 0; i < backends.size(); i++) {
            graphs[i]->prepare(backends[i].get());
            CHECK(ggml_backend_graph_compute_async(backends[i].get(), graphs[i]->graph) == GGML_STATUS_SUCCESS);
        }
        for (size_t i = 0; i < backends.size(); i++) {
            ggml_backend_synchronize(backends[i].get());
            CHECK(close(graphs[i]->read(), reference()));
        }
    }
    CHECK(clean());
}

// a step fails with what CUDA says, the next one is right
void test_failed_steps(const char * setting) {
    const stream_setting stream(setting);
    struct {
        call         what;
        int          after;
        const char * expected;
    } faults[] = {
        { call::malloc, 0, "CUDA: allocating tables: out of memory (cudaErrorMemoryAllocation)" },
        { call::malloc_host, 0, "CUDA: allocating staging memory: out of memory (cudaErrorMemoryAllocation)" },
        { call::malloc, 1, "CUDA: allocating workspace: out of memory (cudaErrorMemoryAllocation)" },
        { call::memcpy, 0, "CUDA: copying tables: " },
        { call::launch, 0, "CUDA: launching a kernel: " },
        { call::launch, 4, "CUDA: launching a kernel: " },
        { call::launch, 3 * N_LAYERS - 1, "CUDA: launching a kernel: " },
    };
    const int n_objects = cuda_mock::n_objects();
    for (const auto & f : faults) {
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        layer_graph      g(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, N_BLOCKS);
        g.prepare(backend.get());
        cuda_mock::fail(f.what, f.after);
        CHECK(ggml_backend_graph_compute(backend.get(), g.graph) == GGML_STATUS_FAILED);
        CHECK(says(qcache_backend_failed(backend.get()), f.expected));
        check_right(backend.get(), g);
        CHECK(clean());
    }
    CHECK(cuda_mock::n_objects() == n_objects && clean());
}

// no backend is made, it is said why, and nothing is left
void test_failed_starts() {
    const stream_setting own("own");
    struct {
        call         what;
        const char * expected;
    } faults[] = {
        { call::attribute, "CUDA: counting multiprocessors" },
        { call::event, "CUDA: creating an event" },
        { call::stream, "CUDA: creating a stream" },
    };
    const int n_objects = cuda_mock::n_objects();
    for (const auto & f : faults) {
        cuda_mock::fail(f.what);
        CHECK(ggml_backend_dev_init(wrapping(), nullptr) == nullptr && says(qcache_last_error(), f.expected));
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        CHECK(backend != nullptr);
    }
    CHECK(cuda_mock::n_objects() == n_objects && clean());
}

// A kernel that goes where it must not: the mock is no rubber stamp, and the step says what became of it.
void test_faults_of_kernels() {
    {
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        layer_graph      g(ggml_backend_get_default_buffer_type(backend.get()), 1, 2);
        g.blocks[0].data += 4; // off the 16 bytes of a load
        g.prepare(backend.get());
        ggml_backend_graph_compute(backend.get(), g.graph);
        CHECK(says(qcache_backend_failed(backend.get()), "CUDA: waiting for the stream: unspecified launch failure (cudaErrorLaunchFailure)"));
        CHECK(cuda_mock::violations().size() == 1 && says(cuda_mock::violations()[0].c_str(), "not a multiple of 16"));
        cuda_mock::clear_violations();
    }
    {
        ggml_backend_ptr backend{ ggml_backend_dev_init(wrapping(), nullptr) };
        layer_graph      g(ggml_backend_get_default_buffer_type(backend.get()), 1, 2);
        g.blocks[0].data += g.k_bytes; // V lies beyond the block's buffer then
        g.prepare(backend.get());
        ggml_backend_graph_compute(backend.get(), g.graph);
        CHECK(cuda_mock::violations().size() == 1 && says(cuda_mock::violations()[0].c_str(), "memory that is not the device's"));
        cuda_mock::clear_violations();
    }
    CHECK(clean());
}

} // namespace

int main() {
    test_devices();
    test_streams();
    for (const order o : { order::all_late, order::ggml_early, order::ours_early }) {
        test_compute(o, nullptr, true, 0);
        test_compute(o, nullptr, true, 1);
        test_compute(o, "own", true, 0);
        test_compute(o, "own", false, 0);
    }
    test_contexts();
    test_failed_steps(nullptr);
    test_failed_steps("own");
    test_failed_starts();
    test_faults_of_kernels();
    return check_report("test-cuda");
}
