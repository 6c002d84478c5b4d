// qcache-matmul.cpp: products with packed weights as ggml nodes

#include "qcache-matmul.h"

#include "cpu/matmul-kernels.h"

#include <ggml.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

const qcache_matmul_kernel * qcache_matmul_kernel_for(int32_t type, int64_t k, int64_t m) {
    const qcache_matmul_kernel * kernel = qcache_matmul_kernel_best();
    const bool fits = kernel != nullptr && kernel->multiplies(type) && qcache_matmul_row_bytes(type, k) != 0 && m % QCACHE_MATMUL_ROWS == 0;
    return fits ? kernel : nullptr;
}

void qcache_matmul_make_packed(ggml_tensor * weight, const qcache_matmul_kernel * kernel) {
    weight->extra = (void *) kernel;
}

// ggml keeps something of its own there in its own buffers
static const qcache_matmul_kernel * kernel_of(const ggml_tensor * weight) {
    for (int i = 0; weight->extra != nullptr && qcache_matmul_kernel_by_index(i) != nullptr; i++) {
        if (weight->extra == (const void *) qcache_matmul_kernel_by_index(i)) {
            return qcache_matmul_kernel_by_index(i);
        }
    }
    return nullptr;
}

bool qcache_matmul_is_packed(const ggml_tensor * weight) {
    return kernel_of(weight) != nullptr;
}

void qcache_matmul_set(ggml_tensor * weight, const void * rows) {
    constexpr int64_t    N_NOW    = 8; // strips
    const int64_t        n_strips = weight->ne[1] / QCACHE_MATMUL_ROWS;
    std::atomic<int64_t> next{ 0 };
    const auto           work = [&] {
        for (int64_t first; (first = next.fetch_add(N_NOW)) < n_strips;) {
            qcache_matmul_pack(weight->type, (const uint8_t *) rows, (uint8_t *) weight->data, weight->ne[0], first,
                               std::min(first + N_NOW, n_strips));
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(std::thread::hardware_concurrency());
    try {
        for (size_t i = 1; i < threads.capacity() && (int64_t) i * N_NOW < n_strips; i++) {
            threads.emplace_back(work);
        }
    } catch (const std::system_error &) {
        // as many as the system gives
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
}

static void quantize(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * x        = dst->src[0];
    const int64_t       n_blocks = x->ne[0] / QCACHE_MATMUL_BLOCK * x->ne[1];
    qcache_matmul_kernel_best()->quantize((const float *) x->data, x->nb[1] / sizeof(float), (int32_t) x->ne[0], (int32_t) x->ne[1],
                                          n_blocks * ith / nth, n_blocks * (ith + 1) / nth, (uint8_t *) dst->data);
}

ggml_tensor * qcache_op_quantize(ggml_context * ctx, ggml_tensor * x) {
    const int64_t n_bytes = x->ne[0] / QCACHE_MATMUL_BLOCK * x->ne[1] * QCACHE_MATMUL_X_BYTES;
    return ggml_custom_4d(ctx, GGML_TYPE_I8, n_bytes, 1, 1, 1, &x, 1, quantize, GGML_N_TASKS_MAX, nullptr);
}

// Threads take a few strips at a time: on these machines, and on those with cores of two kinds, they aren't equally fast.
static void matmul(ggml_tensor * dst, int, int nth, void * userdata) {
    auto &              node     = *(qcache_matmul_node *) userdata;
    const ggml_tensor * weight   = dst->src[0];
    const int32_t       n_strips = (int32_t) (weight->ne[1] / QCACHE_MATMUL_ROWS);
    const int32_t       n_now    = std::max(1, n_strips / (16 * nth));
    const auto *        kernel   = (const qcache_matmul_kernel *) weight->extra;
    for (int32_t first; (first = node.next.fetch_add(n_now, std::memory_order_relaxed)) < n_strips;) {
        kernel->multiply(weight->type, (const uint8_t *) weight->data, (const uint8_t *) dst->src[1]->data, (float *) dst->data,
                         (int32_t) weight->ne[0], (int32_t) weight->ne[1], (int32_t) dst->ne[1], first, std::min(first + n_now, n_strips));
    }
    // the last one out leaves the node as it was, for the graph's next run
    if (node.n_done.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
        node.next.store(0, std::memory_order_relaxed);
        node.n_done.store(0, std::memory_order_relaxed);
    }
}

ggml_tensor * qcache_op_matmul(ggml_context * ctx, ggml_tensor * weight, ggml_tensor * xq, qcache_matmul_node * node) {
    ggml_tensor * args[] = { weight, xq };
    const int64_t n      = xq->ne[0] / (weight->ne[0] / QCACHE_MATMUL_BLOCK * QCACHE_MATMUL_X_BYTES);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, weight->ne[1], n, 1, 1, args, 2, matmul, GGML_N_TASKS_MAX, node);
}
