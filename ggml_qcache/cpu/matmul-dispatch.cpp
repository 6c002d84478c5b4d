// matmul-dispatch.cpp: the kernels of this CPU for packed weights, found at run time. Flags: none.

#include "matmul-kernels.h"

#if defined(QCACHE_HAS_AVX_VNNI)
#    include <cpuid.h>

// not all compilers' __builtin_cpu_supports know it
static bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

const qcache_matmul_kernel * qcache_matmul_kernel_by_index(int i) {
    static const qcache_matmul_kernel * kernels[3];
    static const int n_kernels = [] {
        int n = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
            kernels[n++] = qcache_matmul_kernel_avx512();
        }
#    if defined(QCACHE_HAS_AVX_VNNI)
        if (has_avx2 && has_avx_vnni()) {
            kernels[n++] = qcache_matmul_kernel_avxvnni();
        }
#    endif
        if (has_avx2) {
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
