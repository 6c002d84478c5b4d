// prefill-shape.h: the tiles of the Metal prefill kernels, for the kernels and for the host that launches them

#pragma once

enum { QG_METAL_TILE_ROWS = 32 }; // query rows: four SIMD groups of 8

constexpr int qg_metal_prefill_keys(int dim) { return dim > 64 ? 16 : 32; } // of a tile of K or V

// Halves from one row of a tile to the next; 8 more than there are, so that rows begin in different banks.
constexpr int qg_metal_prefill_stride(int dim) { return dim + 8; }

// Floats of threadgroup memory from one row of logits to the next: those of a tile's keys and 8 of a diagonal matrix.
constexpr int qg_metal_prefill_logits(int dim) { return qg_metal_prefill_keys(dim) + 8; }

// Bytes of threadgroup memory: Q and K or V as f16, logits as f32. Up to a head_dim of 128 two threadgroups have room on a core.
constexpr int qg_metal_prefill_shared(int dim) {
    return 2 * (QG_METAL_TILE_ROWS + qg_metal_prefill_keys(dim)) * qg_metal_prefill_stride(dim) +
           4 * QG_METAL_TILE_ROWS * qg_metal_prefill_logits(dim);
}
