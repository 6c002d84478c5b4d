// matmul-dispatch.cpp: the kernels of this CPU for packed weights, found at run time. Flags: none.

#include "matmul-kernels.h"

#if defined(__x86_64__)
#    include "x86-features.h"
#endif

const qcache_matmul_kernel * qcache_matmul_kernel_by_index(int i) {
    static const qcache_matmul_kernel * kernels[3];
    static const int n_kernels = [] {
        int n = 0;
#if defined(__x86_64__)
        if (qcache_has_avx512_vnni()) {
            kernels[n++] = qcache_matmul_kernel_avx512();
        }
#    if defined(QCACHE_HAS_AVX_VNNI)
        if (qcache_has_avx_vnni()) {
            kernels[n++] = qcache_matmul_kernel_avxvnni();
        }
#    endif
        if (qcache_has_avx2()) {
            kernels[n++] = qcache_matmul_kernel_avx2();
        }
#endif
        return n;
    }();
    return i >= 0 && i < n_kernels ? kernels[i] : nullptr;
}

const qcache_matmul_kernel * qcache_matmul_kernel_best() {
    return qcache_matmul_kernel_by_index(0);
}
