// attn-scratch.h: where things lie in a thread's scratch. Included like attn-kernels.h.

#pragma once

#include "../qcache-op.h"
#include "attn-kernels.h"

// what it starts with, on cache lines of its own
struct qcache_attn_thread {
    int      n_arrived; // threads that have done their piece of the task that begins in this thread's range
    uint64_t v_rows, v_rows_skipped;
};

#define QCACHE_ATTN_THREAD_BYTES 64

// of what follows, in floats
struct qcache_attn_layout {
    size_t queries; // [2][heads * QCACHE_ATTN_DIRECT_QUERIES][dims], direct path; by source
    size_t keys;    // [dims][keys], matrix path: K transposed
    size_t values;  // [keys][dims], matrix path
    size_t logits;  // [queries][keys]
    // of the two pieces that a thread may leave to be merged: the task at the start of its share and that at the end
    size_t acc[2];  // [queries][dims]
    size_t max[2];  // [queries]
    size_t sum[2];  // [queries]
    size_t end;
};

static inline qcache_attn_layout qcache_attn_layout_of(const qcache_attn_params & p) {
    const size_t n_group   = p.n_head / p.n_head_kv;
    const size_t n_tile    = n_group > QCACHE_ATTN_TILE_QUERIES ? n_group : QCACHE_ATTN_TILE_QUERIES;
    const size_t n_direct  = (size_t) p.n_head_kv * QCACHE_ATTN_DIRECT_QUERIES;
    const size_t n_queries = n_direct > n_tile ? n_direct : n_tile;
    const size_t dims      = qcache_attn_pad(p.head_dim);
    const size_t keys      = qcache_attn_pad(p.n_block_tokens);

    qcache_attn_layout at;
    at.queries = 0;
    at.keys    = at.queries + 2 * n_direct * dims;
    at.values  = at.keys + keys * dims;
    at.logits  = at.values + keys * dims;
    at.end     = at.logits + n_queries * keys;
    for (int i = 0; i < 2; i++) {
        at.acc[i] = at.end;
        at.max[i] = at.acc[i] + n_queries * dims;
        at.sum[i] = at.max[i] + n_queries;
        at.end    = at.sum[i] + n_queries;
    }
    return at;
}

static inline size_t qcache_attn_bytes_of(const qcache_attn_layout & layout) {
    return QCACHE_ATTN_THREAD_BYTES + layout.end * sizeof(float) + 64; // slack, to align it
}

static inline qcache_attn_thread * qcache_attn_thread_of(const qcache_attn_layout & layout, uint8_t * wdata, int ith) {
    const uintptr_t at = (uintptr_t) wdata + ith * qcache_attn_bytes_of(layout);
    return (qcache_attn_thread *) ((at + 63) / 64 * 64);
}
