// gpu-ops.h: our operations on a GPU: tables of a step, launch geometry, workspace. What differs from one runtime (CUDA,
// Metal, the emulation of the tests) to the next is qcache_gpu_i.

#pragma once

#include "../qcache-op.h"
#include "attn-args.h"

#include <memory>
#include <vector>

struct ggml_backend;
struct ggml_backend_device;

enum qcache_gpu_kernel { QCACHE_GPU_APPEND, QCACHE_GPU_DECODE, QCACHE_GPU_MERGE, QCACHE_GPU_PREFILL, QCACHE_GPU_V_LIMITS };

struct qcache_gpu_launch {
    qcache_gpu_kernel kernel;
    int               type_k, type_v; // enum qg_kv_type
    int               width;          // decode: query heads computed together; prefill: padded head_dim
    int               grid[3];
    int               shared_bytes;
};

// A device's runtime. Everything runs in order on one stream of ours; false or NULL: failed, qcache_last_error() says why.
struct qcache_gpu_i {
    const char * name; // "cuda"

    int tile_rows;                  // query rows of a prefill tile
    int (*prefill_shared)(int dim); // bytes of shared memory of a prefill kernel; dim: padded head_dim

    void * (*init)(ggml_backend * wrapped, int * n_processors); // wrapped: the stream that stock operations run on
    void (*free)(void * ctx);
    bool (*enter)(void * ctx); // what follows on our stream waits for what the wrapped one has been given
    bool (*leave)(void * ctx); // and the other way round
    void * (*upload)(void * ctx, const void * data, size_t size); // into memory that the next upload reuses
    void * (*workspace)(void * ctx, size_t size);                  // device memory that the next call may replace
    bool (*launch)(void * ctx, const qcache_gpu_launch & launch, const void * args); // qg_append_args or qg_attn_args
    bool (*synchronize)(void * ctx);
};

// The runtime that serves a device of ggml, or NULL where there is none.
const qcache_gpu_i * qcache_gpu_for(ggml_backend_device * device);

class qcache_gpu_ops {
  public:
    // NULL: qcache_last_error()
    static std::unique_ptr<qcache_gpu_ops> init(const qcache_gpu_i * api, ggml_backend * wrapped);
    ~qcache_gpu_ops();

    static bool supports(const qcache_attn_params & p);

    // Tables of one step, for all its layers. attn: the attention nodes of the graph in order.
    bool begin(const qcache_attn_step & step, const std::vector<const qcache_attn_params *> & attn);

    bool append(const qcache_append_params & p, const float * k, const float * v);
    bool attn(const qcache_attn_params & p, int index, const float * q_own, const float * q_leader, float * dst); // index: in begin's attn

    bool enter() { return api->enter(ctx); }
    bool leave() { return api->leave(ctx); }
    bool synchronize() { return api->synchronize(ctx); }

  private:
    qcache_gpu_ops() = default;

    const qcache_gpu_i * api          = nullptr;
    void *               ctx          = nullptr;
    int                  n_processors = 1;

    // of the current step: addresses on the device
    std::vector<uint8_t>  table;
    std::vector<uint64_t> bias; // by attention node; 0: none
    uint64_t              blocks = 0, rows = 0, tiles = 0, tile_rows = 0;
    int32_t               n_rows = 0, n_tiles = 0, n_blocks_max = 0;
};
