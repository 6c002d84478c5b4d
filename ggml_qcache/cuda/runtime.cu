// runtime.cu: our operations on a CUDA device (qcache_gpu_i)
//
// They run on ggml's own stream where it can be told for certain which one that is, so that nothing stands between our kernels
// and ggml's; going from one stream to another takes some microseconds, twice a layer. ggml keeps its stream to itself; see
// stream_of. Otherwise they have a second stream; QCACHE_CUDA_STREAM in the environment asks for it (own) or refuses it (ggml).
// Two events order the two: one of ggml's, recorded on its stream, that ours waits for, and one of ggml's that we record on
// ours and its stream waits for. Where ggml was built without events (GGML_CUDA_NO_PEER_COPY) the host waits instead.

#include "../qcache-ggml-abi.h"
#include "../qcache-impl.h"
#include "launch.cuh"

#include <ggml-backend.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

namespace {

struct cuda_context {
    ggml_backend_t       wrapped;
    int                  device   = 0;
    cudaStream_t         stream   = nullptr;
    bool                 is_ours  = false;   // the stream; the events are used then
    ggml_backend_event_t theirs   = nullptr; // recorded on ggml's stream
    ggml_backend_event_t ours     = nullptr; // recorded on ours
    cudaEvent_t          uploaded = nullptr; // the last upload has left the staging memory
    void *               staging = nullptr, * table = nullptr, * work = nullptr;
    size_t               n_table = 0, n_work = 0;
};

bool check(cudaError_t error, const char * what) {
    if (error == cudaSuccess) {
        return true;
    }
    (void) cudaGetLastError(); // ggml looks for errors after its launches, and would take this one for its own
    qcache_fail(error == cudaErrorMemoryAllocation ? QCACHE_STATUS_OUT_OF_MEMORY : QCACHE_STATUS_INTERNAL, "CUDA: %s: %s (%s)", what,
                cudaGetErrorString(error), cudaGetErrorName(error));
    return false;
}

cudaEvent_t event_of(ggml_backend_event_t event) {
    return (cudaEvent_t) ((qcache_abi_event *) event)->context;
}

void cuda_free(void * ctx) {
    auto * c = (cuda_context *) ctx;
    cudaSetDevice(c->device);
    if (c->stream != nullptr) {
        cudaStreamSynchronize(c->stream);
    }
    if (c->is_ours) {
        cudaStreamDestroy(c->stream);
    }
    ggml_backend_event_free(c->theirs);
    ggml_backend_event_free(c->ours);
    if (c->uploaded != nullptr) {
        cudaEventDestroy(c->uploaded);
    }
    cudaFreeHost(c->staging);
    cudaFree(c->table);
    cudaFree(c->work);
    delete c;
}

// ggml may number devices otherwise than the runtime; asked for a device's memory, it makes that one the current
bool find_device(ggml_backend_t wrapped, int * device) {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(ggml_backend_get_device(wrapped), &free, &total);
    return check(cudaGetDevice(device), "asking for the device");
}

// The start of what ggml 0.25.3 keeps for a CUDA backend.
struct abi_cuda_context {
    int          device;
    alignas(8) char name[sizeof(std::string)];
    cudaEvent_t  copied;
    cudaStream_t streams[16][8]; // by device; made when they are first used
};
static_assert(offsetof(abi_cuda_context, streams) == 48, "padding");

// The stream of a backend that has not been used yet; NULL: its memory doesn't show one. The table of streams has to be empty, and
// once the backend had to make its stream there has to be one, in the device's place.
cudaStream_t stream_of(ggml_backend_t backend, int device) {
    const auto & context  = *(const abi_cuda_context *) ((const qcache_abi_backend *) backend)->context;
    const auto   n_streams = [&]() {
        const cudaStream_t * first = context.streams[0];
        return std::count_if(first, first + 16 * 8, [](cudaStream_t stream) { return stream != nullptr; });
    };
    if (context.device != device || context.copied != nullptr || device < 0 || device >= 16 || n_streams() != 0) {
        return nullptr;
    }
    ggml_backend_synchronize(backend);
    return n_streams() == 1 ? context.streams[device][0] : nullptr;
}

void * cuda_init(ggml_backend * wrapped, int * n_processors) {
    std::unique_ptr<cuda_context, void (*)(void *)> c{ new cuda_context(), cuda_free };
    c->wrapped = wrapped;
    if (!find_device(wrapped, &c->device) ||
        !check(cudaDeviceGetAttribute(n_processors, cudaDevAttrMultiProcessorCount, c->device), "counting multiprocessors") ||
        !check(cudaEventCreateWithFlags(&c->uploaded, cudaEventDisableTiming), "creating an event")) {
        return nullptr;
    }
    const char *      setting = getenv("QCACHE_CUDA_STREAM");
    const std::string wanted  = setting == nullptr ? "" : setting;
    if (wanted != "own") {
        c->stream = stream_of(wrapped, c->device);
    }
    if (c->stream == nullptr && wanted == "ggml") {
        qcache_fail(QCACHE_STATUS_INTERNAL, "QCACHE_CUDA_STREAM=ggml: device %d doesn't show which stream is ggml's", c->device);
        return nullptr;
    }
    if (c->stream == nullptr) {
        c->theirs = ggml_backend_event_new(ggml_backend_get_device(wrapped));
        c->ours   = ggml_backend_event_new(ggml_backend_get_device(wrapped));
        if (!check(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "creating a stream")) {
            return nullptr;
        }
        c->is_ours = true;
    }
    return c.release();
}

bool cuda_enter(void * ctx) {
    auto & c = *(cuda_context *) ctx;
    if (!check(cudaSetDevice(c.device), "choosing the device")) {
        return false;
    }
    if (!c.is_ours) {
        return true;
    }
    if (c.theirs == nullptr) {
        ggml_backend_synchronize(c.wrapped);
        return true;
    }
    ggml_backend_event_record(c.theirs, c.wrapped);
    return check(cudaStreamWaitEvent(c.stream, event_of(c.theirs), 0), "waiting for ggml's stream");
}

bool cuda_leave(void * ctx) {
    auto & c = *(cuda_context *) ctx;
    if (!c.is_ours) {
        return true;
    }
    if (c.ours == nullptr) {
        return check(cudaStreamSynchronize(c.stream), "waiting for the stream");
    }
    if (!check(cudaEventRecord(event_of(c.ours), c.stream), "recording an event")) {
        return false;
    }
    ggml_backend_event_wait(c.wrapped, c.ours);
    return true;
}

// Through pinned memory, or the copy would make the host wait.
uint64_t cuda_upload(void * ctx, const void * data, size_t size) {
    auto & c = *(cuda_context *) ctx;
    if (!check(cudaSetDevice(c.device), "choosing the device") || !check(cudaEventSynchronize(c.uploaded), "waiting for an upload")) {
        return 0;
    }
    if (size > c.n_table) {
        cudaFree(c.table); // waits for the kernels that read it
        cudaFreeHost(c.staging);
        c.table = c.staging = nullptr;
        c.n_table           = 0;
        const size_t n      = size * 2; // blocks come one by one
        if (!check(cudaMalloc(&c.table, n), "allocating tables") || !check(cudaMallocHost(&c.staging, n), "allocating staging memory")) {
            return 0;
        }
        c.n_table = n;
    }
    memcpy(c.staging, data, size);
    const bool ok = check(cudaMemcpyAsync(c.table, c.staging, size, cudaMemcpyHostToDevice, c.stream), "copying tables") &&
                    check(cudaEventRecord(c.uploaded, c.stream), "recording an event");
    return ok ? (uint64_t) (uintptr_t) c.table : 0;
}

uint64_t cuda_workspace(void * ctx, size_t size) {
    auto & c = *(cuda_context *) ctx;
    if (!check(cudaSetDevice(c.device), "choosing the device")) {
        return 0;
    }
    if (size > c.n_work) {
        cudaFree(c.work);
        c.work   = nullptr;
        c.n_work = 0;
        const size_t n = size * 2; // spans of KV blocks become more one by one
        if (!check(cudaMalloc(&c.work, n), "allocating workspace")) {
            return 0;
        }
        c.n_work = n;
    }
    return (uint64_t) (uintptr_t) c.work;
}

bool cuda_launch(void * ctx, const qcache_gpu_launch & l, const void * args) {
    auto &      c     = *(cuda_context *) ctx;
    cudaError_t error = cudaErrorInvalidDeviceFunction;
    switch (l.kernel) {
        case QCACHE_GPU_APPEND: error = qg_cuda_launch<qg_append_kernel>(l, args, c.stream); break;
        case QCACHE_GPU_MERGE: error = qg_cuda_launch<qg_merge_kernel>(l, args, c.stream); break;
        case QCACHE_GPU_V_LIMITS: error = qg_cuda_launch<qg_v_limits_kernel>(l, args, c.stream); break;
        case QCACHE_GPU_DECODE: error = qg_cuda_launch_decode(l, args, c.stream); break;
        case QCACHE_GPU_DECODE_GROUP: error = qg_cuda_launch_decode_group(l, args, c.stream); break;
        case QCACHE_GPU_PREFILL: error = qg_cuda_launch_prefill(l, args, c.stream); break;
    }
    return check(error, "launching a kernel");
}

bool cuda_synchronize(void * ctx) {
    if (check(cudaStreamSynchronize(((cuda_context *) ctx)->stream), "waiting for the stream")) {
        return true;
    }
    fprintf(stderr, "qcache: %s\n", qcache_last_error()); // ggml's own check is about to end the process
    return false;
}

} // namespace

extern const qcache_gpu_i qcache_gpu_cuda;
const qcache_gpu_i        qcache_gpu_cuda = {
    "cuda",     true,       QG_DECODE_DIM, QG_TILE_ROWS,   qg_resident, qg_prefill_shared, cuda_init, cuda_free,
    cuda_enter, cuda_leave, cuda_upload,   cuda_workspace, cuda_launch, cuda_synchronize,  nullptr,   nullptr,
};
