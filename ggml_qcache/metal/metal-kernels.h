// metal-kernels.h: which Metal function a launch asks for, and with what. Plain C++ for the host side; the functions
// themselves are in qcache.metal, which CMake puts together from entry.metal, attn-prefill.metal and the bodies in gpu/.
//
// The source needs Metal 3 (MSL 3.0, Apple7 or newer: addresses of buffers, simdgroup_matrix) and has to be compiled without
// fast math (MTLCompileOptions.fastMathEnabled = NO, or mathMode = MTLMathModeSafe): it tells NaN and infinity apart, and
// the append's bytes are to be those of the CPU.

#pragma once

#include "../gpu/gpu-ops.h"
#include "prefill-shape.h"

#include <cstddef>

// The one source text, ended by a zero.
extern const char   qcache_metal_source[];
extern const size_t qcache_metal_source_size; // without the zero

// argument tables of every function
constexpr int QCACHE_METAL_ARGS_BUFFER        = 0; // [[buffer(0)]]: qg_append_args or qg_attn_args, through setBytes
constexpr int QCACHE_METAL_THREADGROUP_MEMORY = 0; // [[threadgroup(0)]]: its bytes

// setBytes takes no more
static_assert(sizeof(qg_attn_args) <= 4096 && sizeof(qg_append_args) <= 4096, "more than setBytes takes");

// function constants, all of type int; every function is specialised with all of them
enum qcache_metal_constant {
    QCACHE_METAL_TYPE_K,   // enum qg_kv_type
    QCACHE_METAL_TYPE_V,   // enum qg_kv_type
    QCACHE_METAL_HEAD_DIM,
    QCACHE_METAL_SCORE_OP, // enum qcache_score_op
    QCACHE_METAL_N_CONSTANTS,
};

constexpr int QCACHE_METAL_TILE_ROWS       = QG_METAL_TILE_ROWS; // qcache_gpu_i.tile_rows
constexpr int QCACHE_METAL_MAX_THREADGROUP = 32 * 1024;          // bytes of threadgroup memory

// qcache_gpu_i.prefill_shared
constexpr int qcache_metal_prefill_shared(int dim) { return qg_metal_prefill_shared(dim); }

static_assert(qcache_metal_prefill_shared(256) <= QCACHE_METAL_MAX_THREADGROUP, "more threadgroup memory than there is");

// qcache_gpu_i.resident: a guess that nobody has measured
constexpr int qcache_metal_resident(const qcache_gpu_launch &) { return 4; }

struct qcache_metal_kernel {
    const char * name; // of the function
    int          constants[QCACHE_METAL_N_CONSTANTS];
    int          args_bytes;
    int          threads;           // of a threadgroup
    int          threadgroup_bytes; // a multiple of 16
};

// The function for a launch with those arguments; name is NULL where there is none.
inline qcache_metal_kernel qcache_metal_kernel_for(const qcache_gpu_launch & l, const void * args) {
    qcache_metal_kernel k = { nullptr, { l.type_k, l.type_v, 0, 0 }, 0, QG_THREADS, (l.shared_bytes + 15) / 16 * 16 };
    if (l.kernel == QCACHE_GPU_APPEND) {
        k.name                             = "qcache_append";
        k.args_bytes                       = sizeof(qg_append_args);
        k.constants[QCACHE_METAL_HEAD_DIM] = ((const qg_append_args *) args)->head_dim;
        return k;
    }
    k.args_bytes                       = sizeof(qg_attn_args);
    k.constants[QCACHE_METAL_HEAD_DIM] = ((const qg_attn_args *) args)->head_dim;
    k.constants[QCACHE_METAL_SCORE_OP] = ((const qg_attn_args *) args)->score_op;
    if (l.kernel == QCACHE_GPU_MERGE || l.kernel == QCACHE_GPU_V_LIMITS) {
        // one specialisation serves all: they know neither types nor what is done with scores
        k.name                             = l.kernel == QCACHE_GPU_MERGE ? "qcache_merge" : "qcache_v_limits";
        k.constants[QCACHE_METAL_TYPE_K]   = 0;
        k.constants[QCACHE_METAL_TYPE_V]   = 0;
        k.constants[QCACHE_METAL_SCORE_OP] = 0;
        return k;
    }
    struct by_width {
        qcache_gpu_kernel kernel;
        int               width;
        const char *      name;
    };
    static const by_width names[] = {
        { QCACHE_GPU_DECODE, 1, "qcache_decode_1" },       { QCACHE_GPU_DECODE, 2, "qcache_decode_2" },
        { QCACHE_GPU_DECODE, 4, "qcache_decode_4" },       { QCACHE_GPU_DECODE, 8, "qcache_decode_8" },
        { QCACHE_GPU_PREFILL, 32, "qcache_prefill_32" },   { QCACHE_GPU_PREFILL, 64, "qcache_prefill_64" },
        { QCACHE_GPU_PREFILL, 80, "qcache_prefill_80" },   { QCACHE_GPU_PREFILL, 96, "qcache_prefill_96" },
        { QCACHE_GPU_PREFILL, 128, "qcache_prefill_128" }, { QCACHE_GPU_PREFILL, 256, "qcache_prefill_256" },
    };
    for (const by_width & n : names) {
        if (n.kernel == l.kernel && n.width == l.width) {
            k.name = n.name;
        }
    }
    return k;
}
