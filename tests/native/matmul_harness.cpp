// matmul_harness.cpp: products with packed weights (qcache-matmul.h) for tests/test_matmul.py

#include "cpu/matmul-kernels.h"
#include "harness_api.h"
#include "qcache-matmul.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>

#include <cstring>
#include <vector>

HARNESS_API const char * harness_matmul_kernel_name(int32_t i) {
    const qcache_matmul_kernel * kernel = qcache_matmul_kernel_by_index(i);
    return kernel != nullptr ? kernel->name : nullptr;
}

HARNESS_API int32_t harness_matmul_packs(int32_t type, int64_t k, int64_t m) {
    return qcache_matmul_kernel_for(type, k, m) != nullptr;
}

// out [n_runs][n][m] = x [n][k] times the weights [m][k], rows of blocks as in a GGUF; the rows of x are stride floats apart
HARNESS_API int32_t harness_matmul(int32_t i_kernel, int32_t type, int64_t k, int64_t m, int64_t n, const void * rows, const float * x, int64_t stride,
                                   float * out, int32_t n_threads, int32_t n_runs) {
    const qcache_matmul_kernel * kernel = qcache_matmul_kernel_by_index(i_kernel);
    if (kernel == nullptr || !kernel->multiplies(type)) {
        return 1;
    }
    ggml_backend_ptr backend{ ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
    ggml_context_ptr weights{ ggml_init({ ggml_tensor_overhead(), nullptr, true }) };
    ggml_context_ptr rest{ ggml_init({ ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true }) };

    ggml_tensor * w = ggml_new_tensor_2d(weights.get(), (ggml_type) type, k, m);
    ggml_backend_buffer_ptr of_weights{ ggml_backend_alloc_ctx_tensors(weights.get(), backend.get()) };
    qcache_matmul_make_packed(w, kernel);
    qcache_matmul_set(w, rows);

    ggml_tensor *      input = ggml_new_tensor_2d(rest.get(), GGML_TYPE_F32, stride, n);
    ggml_tensor *      cols  = ggml_view_2d(rest.get(), input, k, n, input->nb[1], 0);
    qcache_matmul_node node;
    ggml_tensor *      xq    = qcache_op_quantize(rest.get(), cols);
    ggml_tensor *      y     = qcache_op_matmul(rest.get(), w, xq, &node);
    ggml_cgraph *      graph = ggml_new_graph(rest.get());
    ggml_build_forward_expand(graph, y);
    ggml_backend_buffer_ptr of_rest{ ggml_backend_alloc_ctx_tensors(rest.get(), backend.get()) };
    ggml_backend_tensor_set(input, x, 0, ggml_nbytes(input));
    for (int32_t i = 0; i < n_runs; i++, out += m * n) {
        ggml_backend_tensor_memset(y, 0xff, 0, ggml_nbytes(y));
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            return -1;
        }
        ggml_backend_tensor_get(y, out, 0, ggml_nbytes(y));
    }
    return y->ne[0] == m && y->ne[1] == n ? 0 : -2;
}
