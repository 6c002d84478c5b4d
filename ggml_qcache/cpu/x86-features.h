// x86-features.h: what this CPU has of the instruction sets that the kernels are compiled for. AVX's registers are the
// system's to save: __builtin_cpu_supports knows of that, cpuid alone tells of those it doesn't know with every compiler.

#pragma once

#include <cpuid.h>

static inline bool qcache_has_avx2() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0; // F16C
}

static inline bool qcache_has_avx512() {
    return qcache_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

static inline bool qcache_has_avx512_vnni() {
    return qcache_has_avx512() && __builtin_cpu_supports("avx512vnni");
}

static inline bool qcache_has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return qcache_has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
