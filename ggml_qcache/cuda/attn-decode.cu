// attn-decode.cu: the decode kernels for every pair of K and V types

#include "launch.cuh"

cudaError_t qg_cuda_launch_decode(const qcache_gpu_launch & l, const void * args, cudaStream_t stream) {
    const qg_cuda_launcher launcher = { l, args, stream };
    qg_dispatch_decode(l, launcher);
    return launcher.error;
}
