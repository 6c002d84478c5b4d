// runtimes.cpp: which of ggml's devices we have kernels for. Not among the library's shared objects: the tests link one of
// their own, which takes the CPU for a GPU.

#include "gpu-ops.h"

#include <ggml-backend.h>

#include <cstring>

#if defined(QCACHE_CUDA)
extern const qcache_gpu_i qcache_gpu_cuda;
#endif
#if defined(QCACHE_METAL)
extern const qcache_gpu_i qcache_gpu_metal;
const char *              qcache_metal_refusal(ggml_backend_device * device); // NULL: none
#endif

const qcache_gpu_i * qcache_gpu_for(ggml_backend_device * device, const char ** why_not) {
#if defined(QCACHE_CUDA)
    if (strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "CUDA") == 0) {
        return &qcache_gpu_cuda;
    }
#endif
#if defined(QCACHE_METAL)
    if (strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "MTL") == 0) {
        *why_not = qcache_metal_refusal(device);
        return *why_not == nullptr ? &qcache_gpu_metal : nullptr;
    }
#endif
    (void) device;
    *why_not = "this build has no kernels for it";
    return nullptr;
}
