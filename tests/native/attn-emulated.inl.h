// attn-emulated.inl.h: the vector layer of attn-simd.inl.h over plain arrays of QV_WIDTH floats, so that the widths of
// instruction sets which this CPU lacks are tested too. Included into a namespace, once per width.

namespace {

struct vf {
    float x[QV_WIDTH];
};
struct vi {
    int32_t x[QV_WIDTH];
};

template <class F> inline vf each(const F & f) {
    vf y;
    for (int i = 0; i < QV_WIDTH; i++) {
        y.x[i] = f(i);
    }
    return y;
}
template <class F> inline vi each_i(const F & f) {
    vi y;
    for (int i = 0; i < QV_WIDTH; i++) {
        y.x[i] = f(i);
    }
    return y;
}

inline vf   v_zero() { return vf(); }
inline vf   v_set1(float x) { return each([&](int) { return x; }); }
inline vf   v_load(const float * x) { return each([&](int i) { return x[i]; }); }
inline void v_store(float * x, vf a) { __builtin_memcpy(x, a.x, sizeof(a.x)); }
inline vf   v_add(vf a, vf b) { return each([&](int i) { return a.x[i] + b.x[i]; }); }
inline vf   v_sub(vf a, vf b) { return each([&](int i) { return a.x[i] - b.x[i]; }); }
inline vf   v_mul(vf a, vf b) { return each([&](int i) { return a.x[i] * b.x[i]; }); }
inline vf   v_fma(vf a, vf b, vf c) { return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
inline vf   v_max(vf a, vf b) { return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
inline vf   v_min(vf a, vf b) { return each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; }); }
inline vf   v_zero_lt(vf y, vf x, vf limit) { return each([&](int i) { return x.x[i] < limit.x[i] ? 0.0f : y.x[i]; }); }
inline vi   v_round_i(vf a) { return each_i([&](int i) { return a.x[i] == a.x[i] ? (int32_t) __builtin_rintf(a.x[i]) : 0; }); }
inline vf   v_from_i(vi n) { return each([&](int i) { return (float) n.x[i]; }); }
inline vf   v_pow2(vi n) { return each([&](int i) { return __builtin_ldexpf(1.0f, n.x[i]); }); }

inline float v_sum(vf a) {
    float y = 0.0f;
    for (float x : a.x) {
        y += x;
    }
    return y;
}
inline float v_hmax(vf a) {
    float y = a.x[0];
    for (float x : a.x) {
        y = y > x ? y : x;
    }
    return y;
}
inline void v_sum4(vf a, vf b, vf c, vf d, float * out) {
    out[0] = v_sum(a);
    out[1] = v_sum(b);
    out[2] = v_sum(c);
    out[3] = v_sum(d);
}

inline vf v_load_i4(const uint8_t * x, bool high) {
    return each([&](int i) { return (float) ((high ? x[i] >> 4 : x[i] & 15) - 8); });
}
inline float s_load_f16(const uint8_t * x) {
    ggml_fp16_t h;
    __builtin_memcpy(&h, x, sizeof(h));
    return ggml_fp16_to_fp32(h);
}
inline vf v_load_f16(const uint8_t * x) { return each([&](int i) { return s_load_f16(x + 2 * i); }); }
inline vf v_load_f16_half(const uint8_t * x) { return each([&](int i) { return i < 8 ? s_load_f16(x + 2 * i) : 0.0f; }); }
inline vf v_load_i8(const uint8_t * x) { return each([&](int i) { return (float) (int8_t) x[i]; }); }

inline void transpose_8x8(const float * src, int src_stride, float * dst, int dst_stride) {
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 8; j++) {
            dst[j * dst_stride + i] = src[i * src_stride + j];
        }
    }
}

} // namespace

#include "cpu/attn-simd.inl.h"
