// matmul-dispatch.cpp: the kernel of this CPU for packed weights, found at run time. Flags: none.

#include "matmul-kernels.h"

const qcache_matmul_kernel * qcache_matmul_kernel_best() {
#if defined(__x86_64__) || defined(_M_X64)
    static const bool has_vnni = [] {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    }();
    return has_vnni ? qcache_matmul_kernel_avx512() : nullptr;
#else
    return nullptr;
#endif
}
