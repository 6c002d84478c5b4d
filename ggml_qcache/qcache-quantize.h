// qcache-quantize.h: types that are quantised here, to the bits that ggml gives. Kernels in cpu/quantize-*.cpp.

#pragma once

#include <stdint.h>

// ggml's numbers
enum qcache_quantized_type {
    QCACHE_QUANTIZED_Q8_0 = 8,
    QCACHE_QUANTIZED_Q4_K = 12,
    QCACHE_QUANTIZED_Q5_K = 13,
    QCACHE_QUANTIZED_Q6_K = 14,
};

// Quantises one superblock of 256 values as ggml does.
typedef void (*qcache_quantize_superblock)(int32_t type, const float * src, uint8_t * dst);

// Reads n_blocks blocks of 32 (Q8_0) or 256 values and writes as many blocks. K-quants of values so large, so small or so unequal
// that ggml's own special cases decide are left to `other`.
typedef void (*qcache_quantize_kernel)(int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, qcache_quantize_superblock other);

// values and bytes of a block; 0: another type
static inline int32_t qcache_quantize_block_values(int32_t type) {
    return type == QCACHE_QUANTIZED_Q8_0 ? 32 : type >= QCACHE_QUANTIZED_Q4_K && type <= QCACHE_QUANTIZED_Q6_K ? 256 : 0;
}

static inline int32_t qcache_quantize_block_bytes(int32_t type) {
    return type == QCACHE_QUANTIZED_Q8_0 ? 34 : type == QCACHE_QUANTIZED_Q4_K ? 144 : type == QCACHE_QUANTIZED_Q5_K ? 176 : 210;
}

void qcache_quantize_avx2(int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, qcache_quantize_superblock other);
void qcache_quantize_avx512(int32_t type, const float * src, uint8_t * dst, int64_t n_blocks, qcache_quantize_superblock other);

// the i-th kernel that this CPU runs, the fastest first; NULL after the last
qcache_quantize_kernel qcache_quantize_kernel_by_index(int i);

// as ggml does it, with ggml's own function
void qcache_quantize_by_ggml(int32_t type, const float * src, uint8_t * dst);

// The i-th of the values by which a ggml that rounds in another way is known, 256 of them; false after the last. Few superblocks are
// so near a tie in the search that a fused multiplication and addition changes a bit: these are some of them.
bool qcache_quantize_probe(int32_t type, int i, float * values);
