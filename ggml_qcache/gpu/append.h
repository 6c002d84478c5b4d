// append.h: new K and V rows into their blocks, rounded to the cache's types. One warp writes a group of 32 elements.
//
// grid: (n_head_kv, n_rows, 1)

#pragma once

#include "kv.h"

template <class T>
QG_DEVICE void qg_append_row(QG_LOCAL T & t, int type, QG_GLOBAL const float * x, QG_GLOBAL uint8_t * row, int head_dim) {
    for (int group = t.warp(); 32 * group < head_dim; group += QG_THREADS / 32) {
        const int   n     = qg_min(32, head_dim - 32 * group);
        const float value = t.lane() < n ? x[32 * group + t.lane()] : 0.0f; // a group that is not full ends in zeros
        qg_store_group(t, type, row, group, n, value);
    }
}

template <class T> QG_DEVICE void qg_append(QG_LOCAL T & t, QG_CONSTANT const qg_append_args & p, int type_k, int type_v) {
    const qg_row   row   = ((QG_GLOBAL const qg_row *) p.rows)[t.block_y()];
    const qg_block block = ((QG_GLOBAL const qg_block *) p.blocks)[row.block];
    const int      head  = t.block_x();
    const uint64_t slot  = (uint64_t) head * p.n_block_tokens + (row.pos - block.first);

    const uint64_t v_row = (uint64_t) t.block_y() * p.n_head_kv + head;
    qg_append_row(t, type_v, (QG_GLOBAL const float *) p.v + v_row * qg_head_dim(p),
                  (QG_GLOBAL uint8_t *) block.data + p.v_offset[row.modality] + slot * p.v_row_bytes, qg_head_dim(p));
    if (p.k_offset[row.modality] != ~(uint64_t) 0) {
        const uint64_t k_row = (uint64_t) row.k_row[p.k_kind] * p.n_head_kv + head;
        qg_append_row(t, type_k, (QG_GLOBAL const float *) p.k + k_row * qg_head_dim(p),
                      (QG_GLOBAL uint8_t *) block.data + p.k_offset[row.modality] + slot * p.k_row_bytes, qg_head_dim(p));
    }
}
