// entry.metal: the functions that the host asks for by name (metal-kernels.h)

#include "../gpu/append.h"
#include "../gpu/attn-decode.h"
#include "../gpu/v-skip.h"
#include "attn-prefill.metal"
#include "thread.metal"

[[kernel, max_total_threads_per_threadgroup(QG_THREADS)]]
void qcache_append(constant qg_append_args & p [[buffer(0)]],
                   uint3 group [[threadgroup_position_in_grid]],
                   uint lane [[thread_index_in_simdgroup]],
                   uint warp [[simdgroup_index_in_threadgroup]]) {
    qg_metal_thread t = { group, (int) lane, (int) warp, nullptr };
    qg_append(t, p, qg_type_k, qg_type_v);
}

#define QG_METAL_ATTN(NAME, CALL)                                                                                                              \
    [[kernel, max_total_threads_per_threadgroup(QG_THREADS)]]                                                                                  \
    void NAME(constant qg_attn_args & p [[buffer(0)]], threadgroup uint8_t * memory [[threadgroup(0)]],                                        \
              uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],                                           \
              uint warp [[simdgroup_index_in_threadgroup]]) {                                                                                  \
        qg_metal_thread t = { group, (int) lane, (int) warp, memory };                                                                         \
        CALL;                                                                                                                                  \
    }

QG_METAL_ATTN(qcache_merge, qg_attn_merge(t, p))
QG_METAL_ATTN(qcache_v_limits, qg_v_limits(t, p))
QG_METAL_ATTN(qcache_decode_1, qg_attn_decode<1>(t, p, qg_head_dim(p), qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_decode_2, qg_attn_decode<2>(t, p, qg_head_dim(p), qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_decode_4, qg_attn_decode<4>(t, p, qg_head_dim(p), qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_decode_8, qg_attn_decode<8>(t, p, qg_head_dim(p), qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_prefill_32, qg_metal_prefill<32>(t, p, qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_prefill_64, qg_metal_prefill<64>(t, p, qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_prefill_80, qg_metal_prefill<80>(t, p, qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_prefill_96, qg_metal_prefill<96>(t, p, qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_prefill_128, qg_metal_prefill<128>(t, p, qg_type_k, qg_type_v))
QG_METAL_ATTN(qcache_prefill_256, qg_metal_prefill<256>(t, p, qg_type_k, qg_type_v))
