// cuda_kernels.cu: some of each kind of kernel, for test_cuda_build.py to compile for every architecture

#include "cuda/launch.cuh"

template cudaError_t qg_cuda_launch<qg_append_kernel>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_merge_kernel>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_v_limits_kernel>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_decode_kernel<QG_DECODE_DIM + 1, QG_F16, QG_F16>>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_decode_kernel<2, QG_Q8_0, QG_Q4_0>>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_decode_group_kernel<128, QG_F16, QG_F16>>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_decode_group_kernel<64, QG_Q4_0, QG_Q8_0>>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_prefill_kernel<80, QG_Q4_0, QG_Q8_0>>(const qcache_gpu_launch &, const void *, cudaStream_t);
template cudaError_t qg_cuda_launch<qg_prefill_kernel<128, QG_F16, QG_F16>>(const qcache_gpu_launch &, const void *, cudaStream_t);
