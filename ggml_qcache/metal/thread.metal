// thread.metal: the thread that a body runs as in Metal; see gpu/simt.h

#include "../gpu/simt.h"

struct qg_metal_thread {
    uint3                 group; // in the grid
    int                   in_warp, warp_index;
    threadgroup uint8_t * memory;

    int                index() const { return 32 * warp_index + in_warp; }
    int                lane() const { return in_warp; }
    int                warp() const { return warp_index; }
    int                block_x() const { return (int) group.x; }
    int                block_y() const { return (int) group.y; }
    int                block_z() const { return (int) group.z; }
    threadgroup void * shared() const { return memory; }

    void sync() const { threadgroup_barrier(mem_flags::mem_threadgroup); }
    void sync_warp() const { simdgroup_barrier(mem_flags::mem_threadgroup); }

    template <class V> V shuffle_xor(V value, int mask) const { return simd_shuffle_xor(value, (ushort) mask); }
};
