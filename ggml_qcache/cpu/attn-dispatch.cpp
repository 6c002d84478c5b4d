// attn-dispatch.cpp: the kernels of this CPU, found at run time. Flags: none.

#include "attn-scratch.h"

#if defined(__x86_64__)
#    include "x86-features.h"
#endif

const qcache_attn_kernel * qcache_attn_kernel_by_index(int i) {
    static const qcache_attn_kernel * kernels[4];
    static const int n_kernels = [] {
        int n = 0;
#if defined(__x86_64__)
        if (qcache_has_avx512()) {
            kernels[n++] = qcache_attn_kernel_avx512();
        }
        if (qcache_has_avx2()) {
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
    return qcache_attn_bytes_of(qcache_attn_layout_of(p));
}

void qcache_attn_scratch_init(const qcache_attn_params & p, uint8_t * wdata, int nth) {
    for (int ith = 0; ith < nth; ith++) {
        *qcache_attn_thread_of(qcache_attn_layout_of(p), wdata, ith) = {};
    }
}

qcache_attn_v_rows qcache_attn_count_v_rows(const qcache_attn_params & p, const uint8_t * wdata, int nth) {
    qcache_attn_v_rows sum = {};
    for (int ith = 0; ith < nth; ith++) {
        const qcache_attn_thread * thread = qcache_attn_thread_of(qcache_attn_layout_of(p), (uint8_t *) wdata, ith);
        sum.n += thread->v_rows;
        sum.n_skipped += thread->v_rows_skipped;
    }
    return sum;
}
