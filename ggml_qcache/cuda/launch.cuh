// launch.cuh: a kernel body of gpu/ as a CUDA kernel

#pragma once

#include "../gpu/kernels.h"

#include <cuda_runtime.h>

// the thread that a body runs as; see gpu/simt.h
struct qg_cuda_thread {
    __device__ __forceinline__ int index() const { return threadIdx.x; }
    __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
    __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
    __device__ __forceinline__ int block_x() const { return blockIdx.x; }
    __device__ __forceinline__ int block_y() const { return blockIdx.y; }
    __device__ __forceinline__ int block_z() const { return blockIdx.z; }
    __device__ __forceinline__ void sync() const { __syncthreads(); }

    __device__ __forceinline__ void * shared() const {
        extern __shared__ uint4 memory[]; // 16 bytes: alignment
        return memory;
    }

    template <typename V> __device__ __forceinline__ V shuffle_xor(V value, int mask) const { return __shfl_xor_sync(~0u, value, mask); }

    // d += A B, m16n8k16; Turing knows half of the depth at once
    __device__ __forceinline__ void mma(float * d, const uint32_t * a, const uint32_t * b) const {
#if __CUDA_ARCH__ >= 800
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
        for (int half = 0; half < 2; half++) {
            asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
        }
#endif
    }
};

template <class KERNEL> __global__ void __launch_bounds__(QG_THREADS) qg_cuda_kernel(const __grid_constant__ typename KERNEL::args args) {
    qg_cuda_thread thread;
    KERNEL::run(thread, args);
}

template <class KERNEL> cudaError_t qg_cuda_launch(const qcache_gpu_launch & l, const void * args, cudaStream_t stream) {
    // more than 48 KB of shared memory has to be asked for, once for each device
    if (l.shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(qg_cuda_kernel<KERNEL>, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes);
        if (error != cudaSuccess) {
            return error;
        }
    }
    const dim3 grid(l.grid[0], l.grid[1], l.grid[2]);
    qg_cuda_kernel<KERNEL><<<grid, QG_THREADS, l.shared_bytes, stream>>>(*(const typename KERNEL::args *) args);
    return cudaGetLastError();
}

// one file each, since each compiles for minutes on all architectures
cudaError_t qg_cuda_launch_decode(const qcache_gpu_launch & l, const void * args, cudaStream_t stream);
cudaError_t qg_cuda_launch_prefill(const qcache_gpu_launch & l, const void * args, cudaStream_t stream);
