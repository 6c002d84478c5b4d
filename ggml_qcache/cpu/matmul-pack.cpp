// matmul-pack.cpp: from ggml's rows of quantised blocks to the tiles of matmul-kernels.h. Flags: none.

#include "matmul-kernels.h"

#include <cstring>

namespace {

constexpr int ROWS = QCACHE_MATMUL_ROWS;
constexpr int K    = QCACHE_MATMUL_BLOCK;

struct layout {
    int32_t type;
    int     block; // of k
    int     bytes; // of a block
};

constexpr layout LAYOUTS[] = {
    { QCACHE_MATMUL_Q4_0, 32, 18 },   { QCACHE_MATMUL_Q4_1, 32, 20 },   { QCACHE_MATMUL_Q5_0, 32, 22 },   { QCACHE_MATMUL_Q5_1, 32, 24 },
    { QCACHE_MATMUL_Q8_0, 32, 34 },   { QCACHE_MATMUL_Q4_K, 256, 144 }, { QCACHE_MATMUL_Q5_K, 256, 176 }, { QCACHE_MATMUL_Q6_K, 256, 210 },
};

const layout * layout_of(int32_t type) {
    for (const layout & l : LAYOUTS) {
        if (l.type == type) {
            return &l;
        }
    }
    return nullptr;
}

typedef uint8_t codes[ROWS][K]; // of 32 neighbouring k

// four bytes of each row beside each other
void interleave(const uint8_t (*rows)[4], size_t stride, uint8_t * out) {
    for (int r = 0; r < ROWS; r++) {
        memcpy(out + 4 * r, (const uint8_t *) rows + r * stride, 4);
    }
}

uint8_t * put_nibbles(const codes & c, uint8_t * out) {
    uint8_t both[ROWS][K / 2];
    for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < K / 2; i++) {
            both[r][i] = (uint8_t) ((c[r][i] & 15) | c[r][i + K / 2] << 4);
        }
    }
    for (int g = 0; g < 4; g++, out += 64) {
        interleave((const uint8_t(*)[4]) & both[0][4 * g], sizeof(both[0]), out);
    }
    return out;
}

uint8_t * put_bits(const codes & c, uint8_t * out) {
    for (int r = 0; r < ROWS; r++, out += 4) {
        uint8_t bits[4] = {};
        for (int k = 0; k < K; k++) {
            bits[k % 4] |= (uint8_t) ((c[r][k] >> 4 & 1) << (k / 4));
        }
        memcpy(out, bits, 4);
    }
    return out;
}

uint8_t * put_pairs(const codes & c, uint8_t * out) {
    for (int v = 0; v < 2; v++) {
        for (int r = 0; r < ROWS; r++, out += 4) {
            const uint8_t * from = c[r] + 16 * v;
            for (int i = 0; i < 4; i++) {
                out[i] = (uint8_t) (from[i] >> 4 | from[4 + i] >> 4 << 2 | from[8 + i] >> 4 << 4 | from[12 + i] >> 4 << 6);
            }
        }
    }
    return out;
}

uint8_t * put_bytes(const codes & c, uint8_t * out) {
    for (int g = 0; g < 8; g++, out += 64) {
        interleave((const uint8_t(*)[4]) & c[0][4 * g], sizeof(c[0]), out);
    }
    return out;
}

// an f16 of each row's block
uint8_t * put_halves(const uint8_t * in, size_t stride, uint8_t * out) {
    for (int r = 0; r < ROWS; r++, out += 2) {
        memcpy(out, in + r * stride, 2);
    }
    return out;
}

// q4_0, q4_1, q5_0, q5_1: scales, [bit 4 of 32 codes], codes k and k + 16 in the halves of a byte
void pack_legacy(const uint8_t * in, size_t stride, uint8_t * out, bool has_min, bool has_bits) {
    out = put_halves(in, stride, out);
    if (has_min) {
        out = put_halves(in + 2, stride, out);
    }
    codes c;
    for (int r = 0; r < ROWS; r++) {
        const uint8_t * q    = in + r * stride + (has_min ? 4 : 2);
        uint32_t        bits = 0;
        if (has_bits) {
            memcpy(&bits, q, 4);
            q += 4;
        }
        for (int i = 0; i < K / 2; i++) {
            c[r][i]         = q[i] & 15;
            c[r][i + K / 2] = q[i] >> 4;
        }
        for (int k = 0; has_bits && k < K; k++) {
            c[r][k] |= (uint8_t) ((bits >> k & 1) << 4);
        }
    }
    out = put_nibbles(c, out);
    if (has_bits) {
        put_bits(c, out);
    }
}

void pack_q8_0(const uint8_t * in, size_t stride, uint8_t * out) {
    out = put_halves(in, stride, out);
    codes c;
    for (int r = 0; r < ROWS; r++) {
        for (int k = 0; k < K; k++) {
            c[r][k] = in[r * stride + 2 + k] ^ 0x80;
        }
    }
    put_bytes(c, out);
}

// scale and min of group j of q4_K and q5_K, from the 12 bytes that hold 8 of each
void six_bits(const uint8_t * s, int j, uint8_t & scale, uint8_t & min) {
    if (j < 4) {
        scale = s[j] & 63;
        min   = s[j + 4] & 63;
    } else {
        scale = (uint8_t) ((s[j + 4] & 15) | s[j - 4] >> 6 << 4);
        min   = (uint8_t) (s[j + 4] >> 4 | s[j] >> 6 << 4);
    }
}

uint8_t * put_six_bits(const uint8_t * in, size_t stride, uint8_t * out) {
    for (int r = 0; r < ROWS; r++) {
        uint8_t scale[8], min[8];
        for (int j = 0; j < 8; j++) {
            six_bits(in + r * stride, j, scale[j], min[j]);
        }
        for (int j = 0; j < 4; j++) {
            out[ROWS * j + r]       = (uint8_t) ((scale[j] & 15) | scale[j + 4] << 4);
            out[ROWS * (4 + j) + r] = (uint8_t) ((min[j] & 15) | min[j + 4] << 4);
            out[ROWS * (8 + j) + r] = (uint8_t) (scale[2 * j] >> 4 | scale[2 * j + 1] >> 4 << 2 | min[2 * j] >> 4 << 4 | min[2 * j + 1] >> 4 << 6);
        }
    }
    return out + 12 * ROWS;
}

// q4_K, q5_K: d, dmin, 12 bytes of scales, [bit 4: of group j in bit j of 32 bytes], groups 2 j and 2 j + 1 in the halves of 32 bytes
void pack_k45(const uint8_t * in, size_t stride, uint8_t * out, bool has_bits) {
    out = put_halves(in, stride, out);
    out = put_halves(in + 2, stride, out);
    out = put_six_bits(in + 4, stride, out);
    for (int j = 0; j < 8; j++) {
        codes c;
        for (int r = 0; r < ROWS; r++) {
            const uint8_t * bits = in + r * stride + 16;
            const uint8_t * q    = bits + (has_bits ? 32 : 0) + 32 * (j / 2);
            for (int k = 0; k < K; k++) {
                c[r][k] = j % 2 == 0 ? q[k] & 15 : q[k] >> 4;
            }
            for (int k = 0; has_bits && k < K; k++) {
                c[r][k] |= (uint8_t) ((bits[k] >> j & 1) << 4);
            }
        }
        out = put_nibbles(c, out);
        if (has_bits) {
            out = put_bits(c, out);
        }
    }
}

// q6_K: low halves [128], bits 4 and 5 [64], scales i8 [16], d. Of each 128 k, groups j and j + 2 of 32 share the bytes of their
// low halves, and all four those of their upper bits.
void pack_q6_k(const uint8_t * in, size_t stride, uint8_t * out) {
    out = put_halves(in + 208, stride, out);
    for (int s = 0; s < 16; s++) {
        for (int r = 0; r < ROWS; r++) {
            *out++ = in[r * stride + 192 + s];
        }
    }
    for (int j = 0; j < 8; j++) {
        codes c;
        for (int r = 0; r < ROWS; r++) {
            const uint8_t * low  = in + r * stride + 64 * (j / 4) + 32 * (j % 2);
            const uint8_t * high = in + r * stride + 128 + 32 * (j / 4);
            for (int k = 0; k < K; k++) {
                c[r][k] = (uint8_t) ((j % 4 < 2 ? low[k] & 15 : low[k] >> 4) | (high[k] >> (2 * (j % 4)) & 3) << 4);
            }
        }
        out = put_nibbles(c, out);
        out = put_pairs(c, out);
    }
}

void pack_tile(int32_t type, const uint8_t * in, size_t stride, uint8_t * out) {
    switch (type) {
        case QCACHE_MATMUL_Q4_0: return pack_legacy(in, stride, out, false, false);
        case QCACHE_MATMUL_Q4_1: return pack_legacy(in, stride, out, true, false);
        case QCACHE_MATMUL_Q5_0: return pack_legacy(in, stride, out, false, true);
        case QCACHE_MATMUL_Q5_1: return pack_legacy(in, stride, out, true, true);
        case QCACHE_MATMUL_Q8_0: return pack_q8_0(in, stride, out);
        case QCACHE_MATMUL_Q4_K: return pack_k45(in, stride, out, false);
        case QCACHE_MATMUL_Q5_K: return pack_k45(in, stride, out, true);
        case QCACHE_MATMUL_Q6_K: return pack_q6_k(in, stride, out);
    }
}

} // namespace

size_t qcache_matmul_row_bytes(int32_t type, int64_t k) {
    const layout * l = layout_of(type);
    return l == nullptr || k % l->block != 0 ? 0 : (size_t) (k / l->block) * l->bytes;
}

void qcache_matmul_pack(int32_t type, const uint8_t * rows, uint8_t * packed, int64_t k, int64_t first, int64_t end) {
    const layout & l         = *layout_of(type);
    const size_t   row_bytes = qcache_matmul_row_bytes(type, k);
    for (int64_t strip = first; strip < end; strip++) {
        const size_t at = (size_t) strip * ROWS * row_bytes;
        for (int64_t b = 0; b < k / l.block; b++) {
            pack_tile(type, rows + at + b * l.bytes, row_bytes, packed + at + b * l.bytes * ROWS);
        }
    }
}
