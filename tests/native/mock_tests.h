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
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < a.size(); i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return error <= 1e-9 * norm; // NaN is not
}

inline const std::vector<float> & reference() {
    static const std::vector<float> result = [] {
        ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
        return layer_graph(ggml_backend_cpu_buffer_type(), N_LAYERS, N_BLOCKS).run(cpu.get());
    }();
    return result;
}
