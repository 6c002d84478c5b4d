// gpu-ops.h: our operations on a GPU: tables of a step, launch geometry, workspace. What differs from one runtime (CUDA,
// Metal, the emulation of the tests) to the next is qcache_gpu_i.

#pragma once

#include "../qcache-op.h"
#include "attn-args.h"

#include <memory>
#include <vector>

struct ggml_backend;
struct ggml_backend_buffer;
struct ggml_backend_device;

enum qcache_gpu_kernel {
    QCACHE_GPU_APPEND,
    QCACHE_GPU_DECODE,
    QCACHE_GPU_DECODE_GROUP,
    QCACHE_GPU_MERGE,
    QCACHE_GPU_PREFILL,
    QCACHE_GPU_V_LIMITS,
};

struct qcache_gpu_launch {
    qcache_gpu_kernel kernel;
    int               type_k, type_v; // enum qg_kv_type
    int               width;          // decode: query heads computed together, plus decode_dim; decode of a group, prefill: padded head_dim
    int               grid[3];
    int               shared_bytes;
};

// A device's runtime. Everything runs in order on one stream of ours; false or NULL: failed, qcache_last_error() says why.
struct qcache_gpu_i {
    const char * name; // "cuda"

    bool decode_group;              // has QCACHE_GPU_DECODE_GROUP, for three or more query heads to a KV head
    int  decode_dim;                // head_dim that QCACHE_GPU_DECODE has kernels of its own for; 0: none
    int  tile_rows;                 // query rows of a prefill tile
    int (*resident)(const qcache_gpu_launch & launch); // thread blocks of it that a processor is to hold at once
    int (*prefill_shared)(int dim); // bytes of shared memory of a prefill kernel; dim: padded head_dim

    void * (*init)(ggml_backend * wrapped, int * n_processors); // wrapped: the stream that stock operations run on
    void (*free)(void * ctx);
    bool (*enter)(void * ctx); // what follows on our stream waits for what the wrapped one has been given
    bool (*leave)(void * ctx); // and the other way round
    uint64_t (*upload)(void * ctx, const void * data, size_t size); // into memory that the next upload reuses; 0: failed
    uint64_t (*workspace)(void * ctx, size_t size);                 // device memory that the next call may replace; 0: failed
    bool (*launch)(void * ctx, const qcache_gpu_launch & launch, const void * args); // qg_append_args or qg_attn_args
    bool (*synchronize)(void * ctx);

    // Where pointers into ggml's buffers are no addresses that kernels could use; NULL where they are.
    uint64_t (*address)(void * ctx, ggml_backend_buffer * buffer, const void * pointer); // 0: failed
    void (*forget)(void * ctx, ggml_backend_buffer * buffer); // it is about to be freed; NULL: any may have been
};

// The runtime that serves a device of ggml, or NULL where there is none: `why_not` says the reason, "its buffers are private".
const qcache_gpu_i * qcache_gpu_for(ggml_backend_device * device, const char ** why_not);

class qcache_gpu_ops {
  public:
    // NULL: qcache_last_error()
    static std::unique_ptr<qcache_gpu_ops> init(const qcache_gpu_i * api, ggml_backend * wrapped);
    ~qcache_gpu_ops();

    static bool supports(const qcache_attn_params & p);

    // Tables of one step, for all its layers. attn: the attention nodes of the graph in order.
    bool begin(const qcache_attn_step & step, const std::vector<const qcache_attn_params *> & attn);

    // the nodes; index: in begin's attn
    bool append(const qcache_append_params & p, const ggml_tensor * node);
    bool attn(const qcache_attn_params & p, int index, const ggml_tensor * node);

    bool enter() { return api->enter(ctx); }
    bool leave() { return api->leave(ctx); }
    bool synchronize() { return api->synchronize(ctx); }

    void forget(ggml_backend_buffer * buffer) {
        if (api->forget != nullptr) {
            api->forget(ctx, buffer);
        }
    }

  private:
    qcache_gpu_ops() = default;

    bool to_address(ggml_backend_buffer * buffer, const void * pointer, uint64_t & at); // of the device; NULL: 0
    bool to_address(const ggml_tensor * tensor, uint64_t & at);

    const qcache_gpu_i * api          = nullptr;
    void *               ctx          = nullptr;
    int                  n_processors = 1;

    // of the current step: addresses on the device
    std::vector<uint8_t>  table;
    std::vector<uint64_t> bias; // by attention node; 0: none
    uint64_t              blocks = 0, rows = 0, tiles = 0, tile_rows = 0, scores = 0;
    int32_t               n_rows = 0, n_tiles = 0, n_blocks_max = 0;
};
