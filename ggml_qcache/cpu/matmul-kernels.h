// matmul-kernels.h: products with packed weights, as kernels. No standard headers with inline functions may be included
// here: the kernel files are compiled for instruction sets that the rest must not use.
//
// Weights: strips of 16 rows, one after the other. A strip holds for each block of its type (32 or 256 columns, k) a tile
// with the 16 rows' blocks, in as many bytes: scales first, then the codes in planes. A vector of 64 bytes has codes of 4
// neighbouring k for each row, which is what an integer dot product of four bytes adds up:
//   nibbles  [4][64]: vector g has in its low halves k = 4 g .. 4 g + 3 of 32, in its high halves k = 16 + 4 g ..
//   bits     [64]:    bit j is bit 4 of the codes of k = 4 j .. 4 j + 3
//   pairs    [2][64]: bits 2 t and 2 t + 1 of vector v are bits 4 and 5 of the codes of k = 16 v + 4 t ..
//   bytes    [8][64]: vector g has k = 4 g ..
// with the types' tiles
//   q4_0: d [16] f16, nibbles                         q4_1: d, min, nibbles
//   q5_0: d [16] f16, nibbles, bits                   q5_1: d, min, nibbles, bits
//   q8_0: d [16] f16, bytes of code + 128
//   q4_K: d, dmin [16] f16, scales [192], 8 x nibbles
//   q5_K: d, dmin [16] f16, scales [192], 8 x (nibbles, bits)
//   q6_K: d [16] f16, scales i8 [8][2][16], 8 x (nibbles, pairs)
// The scales of q4_K and q5_K are those of 8 groups of 32 with 6 bits: low halves [4][16] of the scales (groups j and j + 4 in
// a byte's halves), the same of the mins, and [4][16] bytes with the upper two bits of scales 2 j, 2 j + 1 and mins 2 j, 2 j + 1.
//
// Activations: columns in groups of qcache_matmul_n_columns, one group after the other. A group of n holds for each 32 of k
// i8 [n][32], and f32 [4][n]: the columns' scales d, and d times the sum of all 32, of the first 16 and of the last 16.

#pragma once

#include <stddef.h>
#include <stdint.h>

#define QCACHE_MATMUL_ROWS    16 // of a strip
#define QCACHE_MATMUL_BLOCK   32 // of k, for which activations have a scale
#define QCACHE_MATMUL_X_BYTES 48 // of a column and block

// ggml_type, without ggml.h
enum qcache_matmul_type : int32_t {
    QCACHE_MATMUL_Q4_0 = 2,
    QCACHE_MATMUL_Q4_1 = 3,
    QCACHE_MATMUL_Q5_0 = 6,
    QCACHE_MATMUL_Q5_1 = 7,
    QCACHE_MATMUL_Q8_0 = 8,
    QCACHE_MATMUL_Q4_K = 12,
    QCACHE_MATMUL_Q5_K = 13,
    QCACHE_MATMUL_Q6_K = 14,
};

// columns in the group that begins where n are left
static inline int32_t qcache_matmul_n_columns(int32_t n) {
    return n >= 16 ? 16 : n > 8 ? 8 : n;
}

struct qcache_matmul_kernel {
    const char * name; // "avx512vnni", "avxvnni", "avx2"

    bool (*multiplies)(int32_t type);

    // Rounds [first, end) of the n * k / 32 blocks of x ([n] rows of k floats, stride apart), counted column by column.
    void (*quantize)(const float * x, size_t stride, int32_t k, int32_t n, int64_t first, int64_t end, uint8_t * xq);

    // Rows of strips [first, end) of dst [n][m].
    void (*multiply)(int32_t type, const uint8_t * w, const uint8_t * xq, float * dst, int32_t k, int32_t m, int32_t n, int32_t first,
                     int32_t end);
};

// one per instruction set; only where the compiler targets that architecture
const qcache_matmul_kernel * qcache_matmul_kernel_avx512(); // needs AVX512_VNNI
const qcache_matmul_kernel * qcache_matmul_kernel_avxvnni();
const qcache_matmul_kernel * qcache_matmul_kernel_avx2();

// kernels that this CPU runs, best first; NULL past the end. Where there is none ggml multiplies.
const qcache_matmul_kernel * qcache_matmul_kernel_by_index(int i);
const qcache_matmul_kernel * qcache_matmul_kernel_best();

// bytes of a row of weights; 0: the type isn't packed, or its rows aren't whole blocks
size_t qcache_matmul_row_bytes(int32_t type, int64_t k);

// packs strips [first, end) of weights in ggml's layout
void qcache_matmul_pack(int32_t type, const uint8_t * rows, uint8_t * packed, int64_t k, int64_t first, int64_t end);
