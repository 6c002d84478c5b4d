// simt.h: the few words that make a kernel body CUDA C++, Metal Shading Language or plain C++
//
// A body is a function template over `T`, the thread it runs as: T gives its place in the grid and in the thread block,
// memory shared by the block, barriers, and exchanges inside a warp of 32. In CUDA and Metal that is the hardware's; the
// emulation in tests/native/ runs every thread of a block as a fiber. Every pointer and reference names its address space.
// Metal's language is C++14 without lambdas, `if constexpr` and the standard library; so are the bodies.

#pragma once

#include "attn-args.h"

#if defined(__CUDACC__)
#    include <cuda_fp16.h>
#    define QG_DEVICE   __device__ __forceinline__
#    define QG_BOTH     __host__ __device__ // of the launch too
#    define QG_UNROLL   _Pragma("unroll")
#    define QG_NO_UNROLL _Pragma("unroll 1")
#    define QG_GLOBAL                       // address spaces: memory of the device
#    define QG_SHARED                       // of the thread block
#    define QG_CONSTANT                     // arguments
#    define QG_LOCAL                        // of the thread
#elif defined(__METAL_VERSION__)
#    include <metal_simdgroup>
using namespace metal;
#    define QG_DEVICE   inline
#    define QG_BOTH
#    define QG_UNROLL   _Pragma("clang loop unroll(full)")
#    define QG_NO_UNROLL
#    define QG_GLOBAL   device
#    define QG_SHARED   threadgroup
#    define QG_CONSTANT constant
#    define QG_LOCAL    thread
#else
#    include <cmath>
#    include <cstring>
#    define QG_DEVICE   inline
#    define QG_BOTH
#    define QG_UNROLL
#    define QG_NO_UNROLL
#    define QG_GLOBAL
#    define QG_SHARED
#    define QG_CONSTANT
#    define QG_LOCAL
#endif

#if defined(__METAL_VERSION__)
typedef uint4 qg_u4;
#else
struct alignas(16) qg_u4 {
    uint32_t x, y, z, w;
};
#endif

#if defined(__CUDACC__)

QG_DEVICE float    qg_from_half(uint16_t h) { return __half2float(__ushort_as_half(h)); }
QG_DEVICE uint16_t qg_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
QG_DEVICE float    qg_log(float x) { return __logf(x); }
QG_DEVICE float    qg_round(float x) { return roundf(x); }
QG_DEVICE float    qg_mul_add(float x, float y, float z) { return __fadd_rn(__fmul_rn(x, y), z); } // rounded twice

// results too small for a normal number become 0
QG_DEVICE float qg_exp(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.442695041f));
    return y;
}

QG_DEVICE void qg_halves(uint32_t pair, float & a, float & b) {
    const float2 f = __half22float2(*(const __half2 *) &pair);
    a = f.x;
    b = f.y;
}

// of K and V, which no kernel writes while another reads them
QG_DEVICE qg_u4 qg_read16(const qg_u4 * from) {
    const uint4 v = __ldg((const uint4 *) from);
    return { v.x, v.y, v.z, v.w };
}

QG_DEVICE uint32_t qg_read2(const uint16_t * from) { return __ldg(from); }

QG_DEVICE float qg_max(float a, float b) { return fmaxf(a, b); }

QG_DEVICE float qg_clamp(float x) {
#    if __CUDA_ARCH__ >= 800
    asm("{ min.NaN.f32 %0, %0, 0f7F7FFFFF; max.NaN.f32 %0, %0, 0fFF7FFFFF; }" : "+f"(x));
    return x;
#    else
    return x > 3.402823466e+38f ? 3.402823466e+38f : x < -3.402823466e+38f ? -3.402823466e+38f : x;
#    endif
}

QG_DEVICE uint32_t qg_pair(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *(const uint32_t *) &pair;
}

#elif defined(__METAL_VERSION__)

// what a function is specialised for; the indices are those of metal/metal-kernels.h
constant int qg_type_k [[function_constant(0)]]; // enum qg_kv_type
constant int qg_type_v [[function_constant(1)]];
constant int qg_fixed_head_dim [[function_constant(2)]];
constant int qg_fixed_score_op [[function_constant(3)]];

template <class A> QG_DEVICE int qg_head_dim(QG_CONSTANT const A &) { return qg_fixed_head_dim; }
QG_DEVICE int qg_score_op(QG_CONSTANT const qg_attn_args &) { return qg_fixed_score_op; }

// precise: the fast one may take NaN and infinity for something else
QG_DEVICE float    qg_from_half(uint16_t h) { return (float) as_type<half>(h); }
QG_DEVICE uint16_t qg_to_half(float x) { return as_type<uint16_t>((half) x); }
QG_DEVICE float    qg_exp(float x) { return precise::exp(x); }
QG_DEVICE float    qg_log(float x) { return precise::log(x); }
QG_DEVICE float    qg_round(float x) { return round(x); }

QG_DEVICE float qg_mul_add(float x, float y, float z) {
#pragma METAL fp contract(off)
    const float product = x * y; // rounded twice
    return product + z;
}

QG_DEVICE void qg_halves(uint32_t pair, QG_LOCAL float & a, QG_LOCAL float & b) {
    a = qg_from_half((uint16_t) pair);
    b = qg_from_half((uint16_t) (pair >> 16));
}

#else

QG_DEVICE float qg_from_half(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t       bits = sign;
    if (exponent == 31) {
        bits |= 0x7f800000 | fraction << 13;
    } else if (exponent > 0) {
        bits |= (exponent + 112) << 23 | fraction << 13;
    } else {
        const float small = (float) fraction * 0x1p-24f;
        return sign ? -small : small;
    }
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

QG_DEVICE uint16_t qg_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint16_t sign      = (uint16_t) (bits >> 16 & 0x8000);
    const float    magnitude = std::fabs(x);
    if (!(magnitude < 65520.0f)) {
        return (uint16_t) (sign | (std::isnan(x) ? 0x7e00 : 0x7c00));
    }
    // in units of the last place at that magnitude; nearbyint rounds halves to even, as the hardware does
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent        = magnitude == 0.0f || exponent < -13 ? -13 : exponent;
    const auto unit = (uint32_t) std::nearbyint(std::ldexp(magnitude, 11 - exponent));
    return (uint16_t) (sign | (unit + (exponent == -13 && unit < 1024 ? 0 : (uint32_t) (exponent + 13) << 10)));
}

QG_DEVICE float qg_exp(float x) { return std::exp(x); }
QG_DEVICE float qg_log(float x) { return std::log(x); }
QG_DEVICE float qg_round(float x) { return std::round(x); }

QG_DEVICE float qg_mul_add(float x, float y, float z) {
    const volatile float product = x * y; // rounded twice, also where the compiler would fuse
    return product + z;
}

QG_DEVICE void qg_halves(uint32_t pair, float & a, float & b) {
    a = qg_from_half((uint16_t) pair);
    b = qg_from_half((uint16_t) (pair >> 16));
}

#endif

#if !defined(__CUDACC__)
QG_DEVICE qg_u4    qg_read16(QG_GLOBAL const qg_u4 * from) { return *from; }
QG_DEVICE uint32_t qg_read2(QG_GLOBAL const uint16_t * from) { return *from; }
QG_DEVICE float    qg_max(float a, float b) { return a > b ? a : b; }

// Finite, so that the softmax of any finite input is one; NaN stays NaN.
QG_DEVICE float qg_clamp(float x) { return x > 3.402823466e+38f ? 3.402823466e+38f : x < -3.402823466e+38f ? -3.402823466e+38f : x; }

// two numbers as f16
QG_DEVICE uint32_t qg_pair(float a, float b) { return (uint32_t) qg_to_half(a) | (uint32_t) qg_to_half(b) << 16; }
#endif

QG_DEVICE int qg_min(int a, int b) { return a < b ? a : b; }

// what exponentials are taken relative to: -inf, of no keys, would give NaN
QG_DEVICE float qg_finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

// The same for probabilities that become f16: they are 2^15 times as large as they are, far from f16's smallest numbers. A factor
// of all terms and of their sum is none of the result.
QG_DEVICE float qg_f16_max(float max) { return qg_finite_max(max) - 10.3972077f; }

// eight numbers as f16
QG_DEVICE qg_u4 qg_eight(QG_LOCAL const float * x) {
    qg_u4 eight;
    eight.x = qg_pair(x[0], x[1]);
    eight.y = qg_pair(x[2], x[3]);
    eight.z = qg_pair(x[4], x[5]);
    eight.w = qg_pair(x[6], x[7]);
    return eight;
}

#if !defined(__METAL_VERSION__)
// of two words, as one word
QG_DEVICE uint32_t qg_low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
QG_DEVICE uint32_t qg_high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

// the largest power of two that is at most x, and that has a normal reciprocal; x >= 0
QG_DEVICE float qg_power_of_two(float x) {
    const float least = 1.17549435e-38f, most = 8.50705917e+37f;
    x = x < least ? least : x < most ? x : most; // NaN: most
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits &= 0x7f800000;
    memcpy(&x, &bits, sizeof(bits));
    return x;
}

// Where in a tile of 16 x 16 the row begins that a lane names when it loads the tile's four 8 x 8 matrices: down, those on the
// left come first, else the upper ones.
QG_DEVICE int qg_row_of_matrices(int lane, int stride, bool down) {
    const int second = lane / 8 % 2, pair = lane / 16; // in its pair; which pair
    return (lane % 8 + 8 * (down ? second : pair)) * stride + 8 * (down ? pair : second);
}

template <class A> QG_DEVICE int qg_head_dim(const A & p) { return p.head_dim; }
QG_DEVICE int qg_score_op(const qg_attn_args & p) { return p.score_op; }
#endif
