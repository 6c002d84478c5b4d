// gpu-ops.cpp: from nodes to launches

#include "gpu-ops.h"

#include "../qcache-impl.h"
#include "attn-decode-group.h"
#include "attn-decode.h"
#include "v-skip.h"

#include <ggml.h>

#include <algorithm>
#include <map>

static int kv_type(int32_t type) {
    return type == GGML_TYPE_F16 ? QG_F16 : type == GGML_TYPE_Q8_0 ? QG_Q8_0 : QG_Q4_0;
}

// padded head_dim of the prefill kernel; 0: there is none
static int prefill_dim(int32_t head_dim) {
    for (const int dim : { 32, 64, 80, 96, 128, 256 }) {
        if (head_dim <= dim) {
            return dim;
        }
    }
    return 0;
}

std::unique_ptr<qcache_gpu_ops> qcache_gpu_ops::init(const qcache_gpu_i * api, ggml_backend * wrapped) {
    std::unique_ptr<qcache_gpu_ops> ops(new qcache_gpu_ops());
    ops->api = api;
    ops->ctx = api->init(wrapped, &ops->n_processors);
    return ops->ctx != nullptr ? std::move(ops) : nullptr;
}

qcache_gpu_ops::~qcache_gpu_ops() {
    if (ctx != nullptr) {
        api->free(ctx);
    }
}

bool qcache_gpu_ops::supports(const qcache_attn_params & p) {
    return qcache_kv_type_supported(p.type_k, p.head_dim) && qcache_kv_type_supported(p.type_v, p.head_dim) && p.n_head % p.n_head_kv == 0;
}

bool qcache_gpu_ops::to_address(ggml_backend_buffer * buffer, const void * pointer, uint64_t & at) {
    at = pointer == nullptr || api->address == nullptr ? (uint64_t) (uintptr_t) pointer : api->address(ctx, buffer, pointer);
    return at != 0 || pointer == nullptr;
}

bool qcache_gpu_ops::to_address(const ggml_tensor * tensor, uint64_t & at) {
    at = 0;
    return tensor == nullptr || to_address(tensor->view_src != nullptr ? tensor->view_src->buffer : tensor->buffer, tensor->data, at);
}

bool qcache_gpu_ops::begin(const qcache_attn_step & step, const std::vector<const qcache_attn_params *> & attn) {
    std::vector<qg_block> block_table;
    std::vector<int32_t>  first_of_seq;
    n_rows       = step.n_rows;
    n_blocks_max = 1;
    for (int32_t is = 0; is < step.n_seqs; is++) {
        first_of_seq.push_back((int32_t) block_table.size());
        for (int32_t ib = 0; ib < step.seqs[is].n_blocks; ib++) {
            const qcache_attn_block & b = step.seqs[is].blocks[ib];
            block_table.push_back({ 0, b.first, b.n, b.modality, 0 });
            if (!to_address(b.buffer, b.data, block_table.back().data)) {
                return false;
            }
        }
    }
    std::vector<qg_row>                                 row_table;
    std::map<std::pair<int32_t, int8_t>, std::vector<int32_t>> groups; // rows by sequence and modality
    int32_t                                             n_text = 0;
    for (int32_t ir = 0; ir < n_rows; ir++) {
        const qcache_attn_row & r     = step.rows[ir];
        const int32_t           first = first_of_seq[r.seq];
        row_table.push_back({ first, r.block + 1, r.pos, r.q_own, r.modality, first + r.block, { ir, n_text } });
        groups[{ r.seq, r.modality }].push_back(ir);
        n_text += r.modality == QCACHE_MODALITY_TEXT;
        n_blocks_max = std::max(n_blocks_max, r.block + 1);
    }
    std::vector<qg_tile> tile_table;
    std::vector<int32_t> ordered;
    for (auto & [key, of_group] : groups) {
        std::sort(of_group.begin(), of_group.end(), [&](int32_t a, int32_t b) { return step.rows[a].pos < step.rows[b].pos; });
        for (size_t i = 0; i < of_group.size(); i += api->tile_rows) {
            const auto n = (int32_t) std::min<size_t>(api->tile_rows, of_group.size() - i);
            tile_table.push_back({ (int32_t) ordered.size(), n, first_of_seq[key.first], step.rows[of_group[i + n - 1]].block + 1, key.second });
            ordered.insert(ordered.end(), of_group.begin() + i, of_group.begin() + i + n);
        }
    }
    // the longest first: what starts last ends last
    std::stable_sort(tile_table.begin(), tile_table.end(), [](const qg_tile & a, const qg_tile & b) { return a.n_blocks > b.n_blocks; });
    n_tiles = (int32_t) tile_table.size();

    table.clear();
    const auto put = [&](const void * data, size_t size) {
        const size_t at = table.size();
        table.resize(at + (size + 15) / 16 * 16);
        std::copy((const uint8_t *) data, (const uint8_t *) data + size, table.begin() + at);
        return at;
    };
    blocks    = put(block_table.data(), block_table.size() * sizeof(qg_block));
    rows      = put(row_table.data(), row_table.size() * sizeof(qg_row));
    tiles     = put(tile_table.data(), tile_table.size() * sizeof(qg_tile));
    tile_rows = put(ordered.data(), ordered.size() * sizeof(int32_t));
    bias.clear();
    for (const qcache_attn_params * p : attn) {
        bias.push_back(p->vis_bias == nullptr ? 0 : put(p->vis_bias, p->n_head * sizeof(float)));
    }
    const uint64_t base = api->upload(ctx, table.data(), table.size());
    if (base == 0 || !to_address(step.scores_buffer, step.scores, scores)) {
        return false;
    }
    for (uint64_t * at : { &blocks, &rows, &tiles, &tile_rows }) {
        *at += base;
    }
    for (uint64_t & at : bias) {
        at += at == 0 ? 0 : base; // the table of blocks is at 0, never a bias
    }
    return true;
}

bool qcache_gpu_ops::append(const qcache_append_params & p, const ggml_tensor * node) {
    qg_append_args a = {};
    a.blocks         = blocks;
    a.rows           = rows;
    if (!to_address(node->src[1], a.k) || !to_address(node->src[0], a.v)) {
        return false;
    }
    a.head_dim       = p.head_dim;
    a.n_head_kv      = p.n_head_kv;
    a.n_block_tokens = p.n_block_tokens;
    a.n_rows         = n_rows;
    a.k_row_bytes    = (int32_t) qcache_kv_row_bytes(p.type_k, p.head_dim);
    a.v_row_bytes    = (int32_t) qcache_kv_row_bytes(p.type_v, p.head_dim);
    a.type_k         = kv_type(p.type_k);
    a.type_v         = kv_type(p.type_v);
    for (int m = 0; m < 2; m++) {
        a.k_offset[m] = p.k_offset[m] == SIZE_MAX ? ~(uint64_t) 0 : p.k_offset[m];
        a.v_offset[m] = p.v_offset[m];
    }
    // modes know two kinds of layers with K: all rows keep it, or text rows alone
    a.k_kind = p.k_offset[QCACHE_MODALITY_VISUAL] == SIZE_MAX ? 1 : 0;
    return api->launch(ctx, { QCACHE_GPU_APPEND, a.type_k, a.type_v, 0, { p.n_head_kv, n_rows, 1 }, 0 }, &a);
}

bool qcache_gpu_ops::attn(const qcache_attn_params & p, int index, const ggml_tensor * node) {
    qg_attn_args a   = {};
    a.blocks         = blocks;
    a.rows           = rows;
    a.tiles          = tiles;
    a.tile_rows      = tile_rows;
    if (!to_address(node->src[0], a.q_own) || !to_address(node->src[1], a.q_leader) || !to_address(node, a.dst)) {
        return false;
    }
    a.scores         = scores;
    a.vis_bias       = bias[index];
    a.head_dim       = p.head_dim;
    a.n_head         = p.n_head;
    a.n_head_kv      = p.n_head_kv;
    a.n_block_tokens = p.n_block_tokens;
    a.n_rows         = n_rows;
    a.n_tiles        = n_tiles;
    a.n_splits       = 1;
    a.n_score_keys   = p.step->n_score_keys;
    a.k_row_bytes    = (int32_t) qcache_kv_row_bytes(p.type_k, p.head_dim);
    a.v_row_bytes    = (int32_t) qcache_kv_row_bytes(p.type_v, p.head_dim);
    a.score_op       = p.score_op;
    a.scale          = p.scale;
    for (int row = 0; row < 2; row++) {
        for (int key = 0; key < 2; key++) {
            a.k_offset[row][key] = p.k_offset[row][key];
            a.q_leads[row][key]  = p.q_source[row][key] == QCACHE_Q_LEADER;
        }
        a.v_offset[row] = p.v_offset[row];
    }
    const int type_k = kv_type(p.type_k), type_v = kv_type(p.type_v);

    // a tile of few rows wastes most of its products
    if (p.score_op == QCACHE_SCORE_NONE && n_rows >= 8 * n_tiles) {
        const int dim = prefill_dim(p.head_dim);
        return api->launch(ctx, { QCACHE_GPU_PREFILL, type_k, type_v, dim, { n_tiles, p.n_head, 1 }, api->prefill_shared(dim) }, &a);
    }
    const int  n_group = p.n_head / p.n_head_kv;
    const bool group   = api->decode_group && n_group > 2;
    const int  n_heads = n_group <= 2 ? n_group : n_group <= 4 && !group ? 4 : 8; // of a thread block
    const int  n_cells = p.n_head_kv * ((n_group + n_heads - 1) / n_heads) * n_rows;

    qcache_gpu_launch decode = { QCACHE_GPU_DECODE, type_k, type_v, n_heads, { n_cells / n_rows, n_rows, 1 }, QG_DECODE_SHARED };
    if (group) {
        decode.kernel       = QCACHE_GPU_DECODE_GROUP;
        decode.width        = p.head_dim <= 64 ? 64 : p.head_dim <= 128 ? 128 : 256;
        decode.shared_bytes = qg_decode_group_shared(decode.width);
    } else if (p.head_dim == api->decode_dim) {
        decode.width += api->decode_dim;
    }
    // As many thread blocks as the GPU holds at once; where rows and heads are more than that, enough for the last ones to be a small
    // part. Each has two KV blocks, or one for each warp, or its start and end cost more than what is between them; none has none.
    const int n_at_once = api->resident(decode) * n_processors;
    const int n_least   = group ? QG_GROUP_WARPS : 2;
    const int n_fill    = n_cells <= n_at_once ? n_at_once / n_cells : (2 * n_at_once + n_cells - 1) / n_cells;
    const int n_wanted  = std::max(1, std::min(n_fill, n_blocks_max / n_least));
    int       n_each    = (n_blocks_max + n_wanted - 1) / n_wanted;
    n_each              = group ? (n_each + n_least - 1) / n_least * n_least : n_each; // as many for each warp
    a.n_splits = decode.grid[2] = (n_blocks_max + n_each - 1) / n_each;

    const bool   skips     = p.v_skip > 0.0f && p.score_op == QCACHE_SCORE_READ;
    const size_t n_limits  = skips ? (size_t) n_rows * p.n_head : 0;
    const size_t n_partial = a.n_splits > 1 ? (size_t) n_rows * p.n_head * a.n_splits * (p.head_dim + 2) : 0;
    if (n_limits + n_partial > 0) {
        const uint64_t work = api->workspace(ctx, (n_limits + n_partial) * sizeof(float));
        if (work == 0) {
            return false;
        }
        a.partial  = n_partial > 0 ? work : 0;
        a.v_limits = skips ? work + n_partial * sizeof(float) : 0;
        a.v_skip   = p.v_skip;
    }
    if (skips && !api->launch(ctx, { QCACHE_GPU_V_LIMITS, type_k, type_v, 0, { p.n_head, n_rows, 1 }, QG_V_SKIP_SHARED }, &a)) {
        return false;
    }
    return api->launch(ctx, decode, &a) &&
           (a.n_splits == 1 || api->launch(ctx, { QCACHE_GPU_MERGE, type_k, type_v, 0, { p.n_head, n_rows, 1 }, qg_merge_shared(a.n_splits) }, &a));
}
