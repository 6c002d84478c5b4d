// mock_tests.h: what the tests on mocks of Metal and of CUDA share

#pragma once

#include "layer_graph.h"

#include <ggml-cpu.h>

#include <cstdio>
#include <string>

constexpr int N_LAYERS = 3, N_BLOCKS = 9; // enough for a decode step to be cut

inline bool says(const char * text, const std::string & part) {
    const bool found = text != nullptr && std::string(text).find(part) != std::string::npos;
    if (!found) {
        fprintf(stderr, "expected \"%s\" in: %s\n", part.c_str(), text == nullptr ? "nothing" : text);
    }
    return found;
}

// attention of few rows goes through f32 alone; the append rounds as the CPU's does
inline bool close(const std::vector<float> & a, const std::vector<float> & b) {
    return near(a, b, 1e-9);
}

inline const std::vector<float> & reference() {
    static const std::vector<float> result = [] {
        ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
        return layer_graph(ggml_backend_cpu_buffer_type(), N_LAYERS, N_BLOCKS).run(cpu.get());
    }();
    return result;
}

// Steps on a new backend of the device: the same results whatever the queues' turn, and no wait of the host inside a step. n_launches
// and n_host_waits: what the mock has counted.
template <class LAUNCHES, class WAITS>
void check_steps(ggml_backend_dev_t device, bool may_wait, const LAUNCHES & n_launches, const WAITS & n_host_waits) {
    ggml_backend_ptr backend{ ggml_backend_dev_init(device, nullptr) };
    CHECK(backend != nullptr);
    layer_graph g(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, N_BLOCKS);
    for (int i = 0; i < 3; i++) {
        const int launches = n_launches(), waits = n_host_waits();
        g.prepare(backend.get());
        CHECK(ggml_backend_graph_compute_async(backend.get(), g.graph) == GGML_STATUS_SUCCESS);
        CHECK(may_wait || n_host_waits() == waits);
        ggml_backend_synchronize(backend.get());
        CHECK(close(g.read(), reference()) && qcache_backend_failed(backend.get()) == nullptr);
        CHECK(n_launches() - launches == 3 * N_LAYERS); // append, decode in parts, merge
        ggml_backend_tensor_memset(g.result, 0xff, 0, ggml_nbytes(g.result));
    }
    // a step is prepared while the one before, which has other tables, has not run
    layer_graph other(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, 1);
    g.prepare(backend.get());
    other.prepare(backend.get());
    CHECK(ggml_backend_graph_compute_async(backend.get(), g.graph) == GGML_STATUS_SUCCESS);
    CHECK(ggml_backend_graph_compute_async(backend.get(), other.graph) == GGML_STATUS_SUCCESS);
    ggml_backend_synchronize(backend.get());
    CHECK(close(g.read(), reference()) && !close(other.read(), reference()));
    // tables and workspace that have to grow, while the smaller ones are in use
    layer_graph longer(ggml_backend_get_default_buffer_type(backend.get()), N_LAYERS, 4 * N_BLOCKS);
    g.prepare(backend.get());
    longer.prepare(backend.get());
    CHECK(ggml_backend_graph_compute_async(backend.get(), g.graph) == GGML_STATUS_SUCCESS);
    CHECK(ggml_backend_graph_compute_async(backend.get(), longer.graph) == GGML_STATUS_SUCCESS);
    ggml_backend_synchronize(backend.get());
    CHECK(close(g.read(), reference()) && qcache_backend_failed(backend.get()) == nullptr);
}

// The graph's step is right now, whatever became of the last one.
inline void check_right(ggml_backend_t backend, layer_graph & g) {
    for (int i = 0; i < 2; i++) {
        CHECK(close(g.run(backend), reference()) && qcache_backend_failed(backend) == nullptr);
    }
}
