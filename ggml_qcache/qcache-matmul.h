// qcache-matmul.h: products with quantised weights, packed for this CPU's integer dot products
//
// ggml multiplies weights that it repacked (CPU_REPACK) as fast as memory gives them for none but a single row, and has no
// such kernels for most types. Ours take 16 rows of weights at once, unpack them once for up to 16 rows of activations and
// prefetch what comes. On two Zen 5 cores, q4_0 of 4096 x 11008, GFLOP/s with 1, 2, 8 and 512 rows (bench/bench_matmul.cpp):
// ggml 162, 172, 404, 577; ours 221, 424, 1097, 1245.
//
// Two nodes make a product: one rounds the activations to 8 bits, a scale for each 32 as in q8_0, and serves all products
// with the same input; the other multiplies. ggml runs all threads through one node before the next.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

struct ggml_context;
struct ggml_tensor;

struct qcache_matmul_kernel;

// The kernel of this CPU that multiplies weights of this type [k, m] once they are packed; NULL: there is none.
const qcache_matmul_kernel * qcache_matmul_kernel_for(int32_t type, int64_t k, int64_t m);

// Makes a tensor in plain host memory one whose data is packed; it is written by qcache_matmul_set from then on, and read by
// qcache_op_matmul alone.
void qcache_matmul_make_packed(ggml_tensor * weight, const qcache_matmul_kernel * kernel);
bool qcache_matmul_is_packed(const ggml_tensor * weight);

// Packs rows as ggml lays them out, ggml_nbytes of them, on all cores.
void qcache_matmul_set(ggml_tensor * weight, const void * rows);

// what a product's threads share; lives as long as the graph
struct qcache_matmul_node {
    std::atomic<int32_t> next{ 0 }; // strip of rows that nobody has taken
    std::atomic<int32_t> n_done{ 0 }; // threads
};

// x: [k, n] f32, its rows contiguous -> the rows in 8 bits, as all kernels want them
ggml_tensor * qcache_op_quantize(ggml_context * ctx, ggml_tensor * x);

// weight: [k, m] packed; xq: what qcache_op_quantize made of [k, n] -> [m, n] f32
ggml_tensor * qcache_op_matmul(ggml_context * ctx, ggml_tensor * weight, ggml_tensor * xq, qcache_matmul_node * node);
