// qcache-slabs.h: memory for blocks of one size on one device, taken from the device in slabs of many blocks
//
// A device hands out memory in pages (2 MB on CUDA, 2 MB where the CPU has large pages), so blocks of their own would each
// waste most of one. Slabs grow with what is in use, and a slab goes back when its last block does.

#pragma once

#include "qcache-backend.h"

#include <cstdint>
#include <list>
#include <vector>

class qcache_slabs {
    struct slab {
        qcache_buffer_ptr    buffer;
        uint8_t *            first;
        int32_t              n_blocks;
        std::vector<int32_t> free;
    };

  public:
    // one block; without memory where block_bytes is 0
    struct place {
        slab *  in    = nullptr;
        int32_t index = 0;
    };

    qcache_slabs(ggml_backend_buffer_type_t buft, size_t block_bytes);

    bool take(place & p); // uninitialised; false: the device has no more
    void give_back(const place & p);

    uint8_t *             data(const place & p) const { return p.in == nullptr ? nullptr : p.in->first + p.index * stride; }
    ggml_backend_buffer_t buffer(const place & p) const { return p.in == nullptr ? nullptr : p.in->buffer.get(); }
    size_t                bytes() const; // taken from the device

  private:
    bool grow();

    ggml_backend_buffer_type_t buft;
    size_t                     block_bytes;
    size_t                     stride;
    std::list<slab>            slabs;
};
