// attn-kernels.h: what the kernel files share. No standard headers with inline functions may be included here: the
// kernel files are compiled for instruction sets that the rest must not use.

#pragma once

#include <stddef.h>
#include <stdint.h>

struct qcache_attn_kernel;

// one per instruction set; only where the compiler targets that architecture
const qcache_attn_kernel * qcache_attn_kernel_avx2();
const qcache_attn_kernel * qcache_attn_kernel_avx512();
const qcache_attn_kernel * qcache_attn_kernel_neon();

// kernels that this CPU runs, best first, scalar last; NULL past the end
const qcache_attn_kernel * qcache_attn_kernel_by_index(int i);

// queries (rows x heads of a GQA group) worked on at once in prefill
#define QCACHE_ATTN_TILE_QUERIES 48

// up to this many, K and V are converted in registers (decode)
#define QCACHE_ATTN_DIRECT_QUERIES 8

// ggml_type, without ggml.h
#define QCACHE_TYPE_F16  1
#define QCACHE_TYPE_Q8_0 8

// dims and keys are padded to whole groups of the quantised types, which are whole vectors of every instruction set too
#define QCACHE_ATTN_PAD 32

static inline size_t qcache_attn_pad(size_t n) {
    return (n + QCACHE_ATTN_PAD - 1) / QCACHE_ATTN_PAD * QCACHE_ATTN_PAD;
}
