// metal_shim.h: what the functions of metal_stdlib do when they are run (metal_emulation.cpp), one lane at a time

#pragma once

#include <cstdint>

namespace metal_shim {
float    half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
void     threadgroup_barrier(int flags);
void     simdgroup_barrier(int flags);
uint32_t shuffle_xor(uint32_t word, unsigned mask);
bool     any(bool x);

// of matrices, all 64 elements in rows
void fill(float * m, float value);
void load(float * m, const void * from, int element_bytes, uint64_t per_row, uint64_t x, uint64_t y, bool transposed);
void store(const float * m, void * to, int element_bytes, uint64_t per_row, uint64_t x, uint64_t y, bool transposed);
void multiply_add(float * d, const float * a, const float * b, const float * c); // c may be NULL
} // namespace metal_shim
