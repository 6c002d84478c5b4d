// emulated_gpu.cpp: a runtime (qcache_gpu_i) that takes ggml's CPU device for a GPU and emulates our kernels on it, those of
// CUDA or those of Metal, so that kernels, tables, launches and the wrapping backend are tested where there is no GPU

#include "emulated_gpu.h"

#include "gpu/gpu-ops.h"
#include "gpu/kernels.h"
#include "metal/metal-kernels.h"
#include "metal_emulation.h"
#include "qcache-impl.h"
#include "simt_emulation.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>

namespace {

struct emulated {
    std::vector<uint8_t> table, work;
    bool                 entered = false; // between enter and leave
};

void * init(ggml_backend * wrapped, int * n_processors) {
    ggml_backend_cpu_set_n_threads(wrapped, 1); // its threads spin, and tests run beside one another
    *n_processors = 8; // enough for spans of KV blocks to be split
    return new emulated();
}

void free_(void * ctx) {
    delete (emulated *) ctx;
}

bool enter(void * ctx) {
    auto & e = *(emulated *) ctx;
    if (e.entered) {
        qcache_fail(QCACHE_STATUS_INTERNAL, "entered twice");
        return false;
    }
    return e.entered = true;
}

bool leave(void * ctx) {
    auto & e = *(emulated *) ctx;
    if (!e.entered) {
        qcache_fail(QCACHE_STATUS_INTERNAL, "left without having entered");
        return false;
    }
    e.entered = false;
    return true;
}

uint64_t upload(void * ctx, const void * data, size_t size) {
    auto & table = ((emulated *) ctx)->table;
    table.assign((const uint8_t *) data, (const uint8_t *) data + size);
    return (uint64_t) (uintptr_t) table.data();
}

uint64_t workspace(void * ctx, size_t size) {
    auto & work = ((emulated *) ctx)->work;
    work.assign(size, 0xff); // NaN
    return (uint64_t) (uintptr_t) work.data();
}

bool was_entered(void * ctx) {
    if (!((emulated *) ctx)->entered) {
        qcache_fail(QCACHE_STATUS_INTERNAL, "launched outside enter and leave");
    }
    return ((emulated *) ctx)->entered;
}

bool launch(void * ctx, const qcache_gpu_launch & l, const void * args) {
    if (!was_entered(ctx)) {
        return false;
    }
    try {
        const auto emulate = [&](auto kernel) {
            using K          = decltype(kernel);
            const auto given = *(const typename K::args *) args;
            simt::launch(l.grid, l.shared_bytes, [&](simt::thread_view & t) { K::run(t, given); });
            return true;
        };
        switch (l.kernel) {
            case QCACHE_GPU_APPEND: return emulate(qg_append_kernel());
            case QCACHE_GPU_MERGE: return emulate(qg_merge_kernel());
            case QCACHE_GPU_V_LIMITS: return emulate(qg_v_limits_kernel());
            case QCACHE_GPU_DECODE: return qg_dispatch_decode(l, emulate);
            case QCACHE_GPU_DECODE_GROUP: return qg_dispatch_decode_group(l, emulate);
            case QCACHE_GPU_PREFILL: return qg_dispatch_prefill(l, emulate);
        }
        return false;
    } catch (const std::exception & e) {
        qcache_fail(QCACHE_STATUS_INTERNAL, "emulated kernel %d: %s", (int) l.kernel, e.what());
        return false;
    }
}

bool launch_metal(void * ctx, const qcache_gpu_launch & l, const void * args) {
    if (!was_entered(ctx)) {
        return false;
    }
    const qcache_metal_kernel kernel = qcache_metal_kernel_for(l, args);
    std::map<int, int>        constants;
    for (int i = 0; i < QCACHE_METAL_N_CONSTANTS; i++) {
        constants[i] = kernel.constants[i];
    }
    std::string error = "there is no function for the launch";
    if (kernel.name == nullptr ||
        !metal_emulate(kernel.name, constants, l.grid, kernel.threads, kernel.threadgroup_bytes, args, kernel.args_bytes, error)) {
        qcache_fail(QCACHE_STATUS_INTERNAL, "emulated Metal kernel: %s", error.c_str());
        return false;
    }
    return true;
}

bool synchronize(void *) {
    return true;
}

qcache_gpu_i runtime = {
    "emulated", true,  QG_DECODE_DIM, QG_TILE_ROWS, qg_resident, qg_prefill_shared, init,    free_,
    enter,      leave, upload,        workspace,    launch,      synchronize,       nullptr, nullptr,
};

} // namespace

void qcache_emulated_gpu_use(bool metal) {
    runtime.name           = metal ? "metal-emulated" : "emulated";
    runtime.decode_group   = !metal;
    runtime.decode_dim     = metal ? 0 : QG_DECODE_DIM;
    runtime.tile_rows      = metal ? QCACHE_METAL_TILE_ROWS : QG_TILE_ROWS;
    runtime.resident       = metal ? qcache_metal_resident : qg_resident;
    runtime.prefill_shared = metal ? qcache_metal_prefill_shared : qg_prefill_shared;
    runtime.launch         = metal ? launch_metal : launch;
}

const qcache_gpu_i * qcache_gpu_for(ggml_backend_device * device, const char ** why_not) {
    *why_not = "it is no CPU";
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU ? &runtime : nullptr;
}
