// attn-rows.h: one K or V row and one logit at a time, for code that is to be right rather than fast

#pragma once

#include <ggml.h>

#include <cfloat>
#include <cstddef>
#include <cstdint>

// a K or V row as floats, its padding included
inline void qcache_kv_row(int32_t type, const uint8_t * row, size_t row_bytes, float * x) {
    const ggml_type_traits * traits = ggml_get_type_traits((ggml_type) type);
    traits->to_float(row, x, row_bytes / traits->type_size * traits->blck_size);
}

// finite, so that the softmax of any finite input is one; NaN stays NaN
inline double qcache_clamp_logit(double x) {
    return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}
