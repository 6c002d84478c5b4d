// kernels.h: every kernel there is, by the launch that asks for it
//
// per_processor: thread blocks that a multiprocessor is to hold at once, which is how few registers the compiler has to make
// do with: loads in flight hide the memory's latency, and spills cost more than they bring.

#pragma once

#include "append.h"
#include "attn-decode-group.h"
#include "attn-decode.h"
#include "attn-prefill.h"
#include "gpu-ops.h"
#include "v-skip.h"

struct qg_append_kernel {
    static constexpr int per_processor = 1;

    using args = qg_append_args;
    template <class T> static QG_DEVICE void run(T & t, const args & a) { qg_append(t, a, a.type_k, a.type_v); }
};

struct qg_merge_kernel {
    static constexpr int per_processor = 1;

    using args = qg_attn_args;
    template <class T> static QG_DEVICE void run(T & t, const args & a) { qg_attn_merge(t, a); }
};

struct qg_v_limits_kernel {
    static constexpr int per_processor = 1;

    using args = qg_attn_args;
    template <class T> static QG_DEVICE void run(T & t, const args & a) { qg_v_limits(t, a); }
};

// The head_dim that has kernels of its own: strides, lanes and loops known when compiled are a fifth fewer instructions.
enum { QG_DECODE_DIM = 128 };

// WIDTH: query heads computed together, plus QG_DECODE_DIM where that is head_dim
template <int WIDTH, int TYPE_K, int TYPE_V> struct qg_decode_kernel {
    static constexpr int DIM           = WIDTH > QG_DECODE_DIM ? QG_DECODE_DIM : 0;
    static constexpr int G             = WIDTH - DIM;
    static constexpr int per_processor = G == 1 ? 4 : 3;

    using args = qg_attn_args;
    template <class T> static QG_DEVICE void run(T & t, const args & a) { qg_attn_decode<G>(t, a, DIM > 0 ? DIM : a.head_dim, TYPE_K, TYPE_V); }
};

template <int DIM, int TYPE_K, int TYPE_V> struct qg_decode_group_kernel {
    static constexpr int per_processor = DIM <= 64 ? 3 : DIM <= 128 ? 2 : 1;

    using args = qg_attn_args;
    template <class T> static QG_DEVICE void run(T & t, const args & a) { qg_attn_decode_group<DIM, TYPE_K, TYPE_V>(t, a); }
};

template <int DIM, int TYPE_K, int TYPE_V> struct qg_prefill_kernel {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    static constexpr int per_processor = 1; // there is no shared memory for more
#else
    static constexpr int per_processor = DIM <= 128 ? 3 : 1;
#endif

    using args = qg_attn_args;
    template <class T> static QG_DEVICE void run(T & t, const args & a) { qg_attn_prefill<DIM, TYPE_K, TYPE_V>(t, a); }
};

template <template <int, int, int> class KERNEL, int N, class F> bool qg_dispatch_types(const qcache_gpu_launch & l, const F & f) {
    switch (l.type_k * 3 + l.type_v) {
        case 0: return f(KERNEL<N, 0, 0>());
        case 1: return f(KERNEL<N, 0, 1>());
        case 2: return f(KERNEL<N, 0, 2>());
        case 3: return f(KERNEL<N, 1, 0>());
        case 4: return f(KERNEL<N, 1, 1>());
        case 5: return f(KERNEL<N, 1, 2>());
        case 6: return f(KERNEL<N, 2, 0>());
        case 7: return f(KERNEL<N, 2, 1>());
        case 8: return f(KERNEL<N, 2, 2>());
        default: return false;
    }
}

// f(kernel) for the kernel of the launch; false: there is none
template <class F> bool qg_dispatch_decode(const qcache_gpu_launch & l, const F & f) {
    switch (l.width) {
        case 1: return qg_dispatch_types<qg_decode_kernel, 1>(l, f);
        case 2: return qg_dispatch_types<qg_decode_kernel, 2>(l, f);
        case QG_DECODE_DIM + 1: return qg_dispatch_types<qg_decode_kernel, QG_DECODE_DIM + 1>(l, f);
        case QG_DECODE_DIM + 2: return qg_dispatch_types<qg_decode_kernel, QG_DECODE_DIM + 2>(l, f);
        default: return false;
    }
}

template <class F> bool qg_dispatch_decode_group(const qcache_gpu_launch & l, const F & f) {
    switch (l.width) {
        case 64: return qg_dispatch_types<qg_decode_group_kernel, 64>(l, f);
        case 128: return qg_dispatch_types<qg_decode_group_kernel, 128>(l, f);
        case 256: return qg_dispatch_types<qg_decode_group_kernel, 256>(l, f);
        default: return false;
    }
}

template <class F> bool qg_dispatch_prefill(const qcache_gpu_launch & l, const F & f) {
    switch (l.width) {
        case 32: return qg_dispatch_types<qg_prefill_kernel, 32>(l, f);
        case 64: return qg_dispatch_types<qg_prefill_kernel, 64>(l, f);
        case 80: return qg_dispatch_types<qg_prefill_kernel, 80>(l, f);
        case 96: return qg_dispatch_types<qg_prefill_kernel, 96>(l, f);
        case 128: return qg_dispatch_types<qg_prefill_kernel, 128>(l, f);
        case 256: return qg_dispatch_types<qg_prefill_kernel, 256>(l, f);
        default: return false;
    }
}

// qcache_gpu_i.resident, of the decode kernels
inline int qg_resident(const qcache_gpu_launch & l) {
    int        n     = 1;
    const auto found = [&](auto kernel) {
        n = decltype(kernel)::per_processor;
        return true;
    };
    l.kernel == QCACHE_GPU_DECODE_GROUP ? qg_dispatch_decode_group(l, found) : qg_dispatch_decode(l, found);
    return n;
}
