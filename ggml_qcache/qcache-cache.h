// qcache-cache.h: the memory behind the blocks: where each layer's K and V lie in a block, allocation, copies, state

#pragma once

#include "qcache-blocks.h"
#include "qcache-model.h"
#include "qcache-op.h"
#include "qcache-slabs.h"

#include <functional>
#include <memory>
#include <vector>

// where K and V of each layer lie in a block, by modality of the block
struct qcache_layout {
    static constexpr size_t none = SIZE_MAX;

    int32_t             n_block_tokens;
    int32_t             type_k;
    int32_t             type_v;
    std::vector<size_t> k_offset[2]; // [n_layer]; none where the layer keeps no K for that modality
    std::vector<size_t> v_offset[2]; // likewise; none where the layer has no attention
    size_t              block_bytes[2]; // 0 where no layer has
    size_t              full_block_bytes; // of a block in which every layer keeps K and V

    // of layers first .. end-1; the others keep nothing
    qcache_layout(const qcache_hparams & hparams, const std::vector<int32_t> & leader, enum qcache_lazy_mode mode, int32_t first,
                  int32_t end, int32_t n_block_tokens, int32_t type_k, int32_t type_v);
};

// consecutive layers whose K and V lie in memory of one device
struct qcache_cache_part {
    qcache_layout              layout;
    ggml_backend_buffer_type_t buft;
};

class qcache_cache {
  public:
    // parts: in order of their layers. fingerprint: what a saved state must match to be loaded, beyond the layout
    qcache_cache(std::vector<qcache_cache_part> parts, int32_t n_seq_max, size_t bytes_max, std::vector<int32_t> fingerprint);

    const qcache_layout & layout(size_t part) const { return parts[part].layout; }
    qcache_blocks &       blocks() { return mgr; }
    const qcache_blocks & blocks() const { return mgr; }

    // Brings memory in step with the block manager: allocates, copies, frees. False when memory ran out; the caller
    // rolls back and calls again.
    bool sync();

    qcache_attn_block view(const qcache_seq_block & block, size_t part) const;

    // Copies bytes of a block's part to the host.
    void read(int32_t id, size_t part, size_t offset, void * to, size_t size) const;

    struct qcache_kv_usage usage() const; // without the counts of layers

    // state as a stream of bytes, so that memory and file share one walk
    using sink = std::function<bool(const void * data, size_t size)>;
    size_t             state_size() const;
    bool               write_state(const sink & out) const;
    enum qcache_status read_state(const uint8_t * data, size_t size, int32_t n_ctx);

  private:
    struct block_memory {
        int8_t                           modality = 0;
        std::vector<qcache_slabs::place> places; // by part; empty where the block is free
    };

    qcache_slabs & slabs(size_t part, int8_t modality) { return pools[2 * part + modality]; }
    const qcache_slabs & slabs(size_t part, int8_t modality) const { return pools[2 * part + modality]; }
    bool allocate(block_memory & memory, int8_t modality); // zeros; false: out of memory, and memory is free
    void release(block_memory & memory);

    std::vector<qcache_cache_part> parts;
    size_t                         block_bytes[2]; // of all parts, by modality
    std::vector<qcache_slabs>      pools; // by part and modality
    qcache_blocks                  mgr;
    std::vector<block_memory>      memory; // by block id
    std::vector<int32_t>           fingerprint;
};
