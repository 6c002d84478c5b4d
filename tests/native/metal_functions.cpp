// metal_functions.cpp: qcache.metal as C++14. Its loads and stores call metal_emulation.cpp: GCC's instrumentation for
// ThreadSanitizer with functions of our own behind it.

#include "metal_functions.h"

#include <metal_simdgroup_matrix>

int metal_function_constants[METAL_N_CONSTANTS];

// inline functions of the same names are compiled for the CUDA emulation as well
namespace metal_text {
#include "qcache-emulated.metal"
}

#define METAL_FUNCTION(NAME)                                                                                                            \
    {                                                                                                                                   \
#NAME, sizeof(metal_text::qg_attn_args), [](void * args, uint8_t * memory, const int * g, int lane, int simdgroup) {      \
            metal_text::NAME(*(metal_text::qg_attn_args *) args, memory, uint3{ (uint) g[0], (uint) g[1], (uint) g[2] },         \
                             (uint) lane, (uint) simdgroup);                                                                            \
        }                                                                                                                               \
    }

const metal_function metal_functions[] = {
    { "qcache_append", sizeof(metal_text::qg_append_args), [](void * args, uint8_t *, const int * g, int lane, int simdgroup) {
         metal_text::qcache_append(*(metal_text::qg_append_args *) args, uint3{ (uint) g[0], (uint) g[1], (uint) g[2] },
                                   (uint) lane, (uint) simdgroup);
     } },
    METAL_FUNCTION(qcache_merge),
    METAL_FUNCTION(qcache_v_limits),
    METAL_FUNCTION(qcache_decode_1),
    METAL_FUNCTION(qcache_decode_2),
    METAL_FUNCTION(qcache_decode_4),
    METAL_FUNCTION(qcache_decode_8),
    METAL_FUNCTION(qcache_prefill_32),
    METAL_FUNCTION(qcache_prefill_64),
    METAL_FUNCTION(qcache_prefill_80),
    METAL_FUNCTION(qcache_prefill_96),
    METAL_FUNCTION(qcache_prefill_128),
    METAL_FUNCTION(qcache_prefill_256),
};

const int n_metal_functions = sizeof(metal_functions) / sizeof(metal_functions[0]);
