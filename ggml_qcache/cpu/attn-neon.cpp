// attn-neon.cpp: the vector kernel for aarch64. Flags: none, NEON with f16 conversion is part of the architecture.

#if defined(__aarch64__)

#include "qcache.h"
#include "attn-scratch.h"

#include <arm_neon.h>

#define QCACHE_ATTN_KERNEL qcache_attn_kernel_neon
#define QCACHE_ATTN_NAME   "neon"
#define QV_WIDTH           4
#define QV_NQ              2
#define QV_MR              6
#define QV_NR              4

namespace {

typedef float32x4_t vf;
typedef int32x4_t   vi;

inline vf   v_zero() { return vdupq_n_f32(0.0f); }
inline vf   v_set1(float x) { return vdupq_n_f32(x); }
inline vf   v_load(const float * x) { return vld1q_f32(x); }
inline void v_store(float * x, vf a) { vst1q_f32(x, a); }
inline vf   v_add(vf a, vf b) { return vaddq_f32(a, b); }
inline vf   v_sub(vf a, vf b) { return vsubq_f32(a, b); }
inline vf   v_mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf   v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf   v_max(vf a, vf b) { return vmaxq_f32(a, b); }
inline vf   v_min(vf a, vf b) { return vminq_f32(a, b); }
inline vf   v_zero_lt(vf y, vf x, vf limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, limit)));
}
inline vi   v_round_i(vf x) { return vcvtnq_s32_f32(x); }
inline vf   v_from_i(vi n) { return vcvtq_f32_s32(n); }
inline vf   v_pow2(vi n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }

inline float v_sum(vf a) { return vaddvq_f32(a); }
inline float v_hmax(vf a) { return vmaxvq_f32(a); }
inline void  v_sum4(vf a, vf b, vf c, vf d, float * out) { vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }

inline vf v_load_f16(const uint8_t * x) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(x))); }
inline vf v_load_f16_half(const uint8_t * x) { return v_load_f16(x); }
inline vf v_load_i8(const uint8_t * x) {
    uint32_t four;
    __builtin_memcpy(&four, x, sizeof(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}
inline vf v_load_i4(const uint8_t * x, bool high) {
    uint32_t four;
    __builtin_memcpy(&four, x, sizeof(four));
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    const uint8x8_t value = high ? vshr_n_u8(bytes, 4) : vand_u8(bytes, vdup_n_u8(15));
    return vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(value)))), vdupq_n_s32(8)));
}
inline float s_load_f16(const uint8_t * x) {
    __fp16 h;
    __builtin_memcpy(&h, x, sizeof(h));
    return (float) h;
}

inline void transpose_4x4(const float * src, int src_stride, float * dst, int dst_stride) {
    const vf          a = v_load(src), b = v_load(src + src_stride);
    const vf          c = v_load(src + 2 * src_stride), d = v_load(src + 3 * src_stride);
    const float64x2_t e = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), f = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t g = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), h = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    v_store(dst, vreinterpretq_f32_f64(vtrn1q_f64(e, g)));
    v_store(dst + dst_stride, vreinterpretq_f32_f64(vtrn1q_f64(f, h)));
    v_store(dst + 2 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(e, g)));
    v_store(dst + 3 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(f, h)));
}

inline void transpose_8x8(const float * src, int src_stride, float * dst, int dst_stride) {
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 8; j += 4) {
            transpose_4x4(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
        }
    }
}

} // namespace

#include "attn-simd.inl.h"

#endif
