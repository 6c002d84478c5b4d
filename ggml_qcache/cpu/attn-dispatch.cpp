// attn-dispatch.cpp: the kernels of this CPU, found at run time. Flags: none.

#include "attn-kernels.h"

#include "../qcache-op.h"

const qcache_attn_kernel * qcache_attn_kernel_by_index(int i) {
    static const qcache_attn_kernel * kernels[4];
    static const int n_kernels = [] {
        int n = 0;
#if defined(__x86_64__) || defined(_M_X64)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
            kernels[n++] = qcache_attn_kernel_avx512();
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
            kernels[n++] = qcache_attn_kernel_avx2();
        }
#elif defined(__aarch64__)
        kernels[n++] = qcache_attn_kernel_neon();
#endif
        kernels[n++] = qcache_attn_kernel_scalar();
        return n;
    }();
    return i >= 0 && i < n_kernels ? kernels[i] : nullptr;
}

const qcache_attn_kernel * qcache_attn_kernel_best() {
    return qcache_attn_kernel_by_index(0);
}

size_t qcache_attn_scratch_bytes(const qcache_attn_params & p) {
    const size_t n_group   = p.n_head / p.n_head_kv;
    const size_t n_tile    = n_group > QCACHE_ATTN_TILE_QUERIES ? n_group : QCACHE_ATTN_TILE_QUERIES;
    const size_t n_direct  = (size_t) p.n_head_kv * QCACHE_ATTN_DIRECT_QUERIES;
    const size_t n_queries = n_direct > n_tile ? n_direct : n_tile;
    const size_t dims      = qcache_attn_pad(p.head_dim);
    const size_t keys      = qcache_attn_pad(p.n_block_tokens);

    // as attn-simd.inl.h lays it out
    size_t n_floats = 0;
    n_floats += 2 * n_direct * dims;        // queries by source
    n_floats += 2 * keys * dims;            // K and V of a block
    n_floats += n_queries * keys;           // logits
    n_floats += 2 * n_queries * (dims + 2); // accumulated output, running max and sum
    return QCACHE_ATTN_THREAD_BYTES + n_floats * sizeof(float) + 64; // slack, to align it
}

static qcache_attn_thread * thread_of(const qcache_attn_params & p, const uint8_t * wdata, int ith) {
    return (qcache_attn_thread *) qcache_attn_scratch_of((uint8_t *) wdata, qcache_attn_scratch_bytes(p), ith);
}

void qcache_attn_scratch_init(const qcache_attn_params & p, uint8_t * wdata, int nth) {
    for (int ith = 0; ith < nth; ith++) {
        *thread_of(p, wdata, ith) = {};
    }
}

qcache_attn_v_rows qcache_attn_count_v_rows(const qcache_attn_params & p, const uint8_t * wdata, int nth) {
    qcache_attn_v_rows sum = {};
    for (int ith = 0; ith < nth; ith++) {
        sum.n += thread_of(p, wdata, ith)->v_rows;
        sum.n_skipped += thread_of(p, wdata, ith)->v_rows_skipped;
    }
    return sum;
}
