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
    template <typename V> __device__ __forceinline__ V shuffle(V value, int from_lane) const { return __shfl_sync(~0u, value, from_lane); }

    __device__ __forceinline__ uint32_t ballot(bool holds) const { return __ballot_sync(~0u, holds); } // bit i: in lane i

    // of an 8 x 8 matrix of f16; a lane has elements 2 (lane % 4) + { 0, 1 } of row lane / 4
    __device__ __forceinline__ uint32_t transpose(uint32_t word) const {
        uint32_t transposed;
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
        return transposed;
    }

    // m[4] = the 8 x 8 matrices of f16 of a tile of 16 x 16 in shared memory, in the order of qg_row_of_matrices; a lane gets
    // elements 2 (lane % 4) + { 0, 1 } of row lane / 4, of the transposed of that column
    __device__ __forceinline__ void load_matrices(uint32_t * m, const uint16_t * tile, int stride, bool down) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(row_of_matrices(tile, stride, down))
                     : "memory");
    }
    __device__ __forceinline__ void load_matrices_transposed(uint32_t * m, const uint16_t * tile, int stride, bool down) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(row_of_matrices(tile, stride, down))
                     : "memory");
    }

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

  private:
    // address in shared memory of the row that this lane names: lanes 8 i to 8 i + 7 have those of matrix i
    __device__ __forceinline__ uint32_t row_of_matrices(const uint16_t * tile, int stride, bool down) const {
        return (uint32_t) __cvta_generic_to_shared(tile + qg_row_of_matrices(lane(), stride, down));
    }
};

template <class KERNEL>
__global__ void __launch_bounds__(QG_THREADS, KERNEL::per_processor) qg_cuda_kernel(const __grid_constant__ typename KERNEL::args args) {
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

// what the dispatchers of kernels.h call with the kernel of a launch
struct qg_cuda_launcher {
    const qcache_gpu_launch & l;
    const void *              args;
    cudaStream_t              stream;
    mutable cudaError_t       error = cudaErrorInvalidDeviceFunction; // there is no such kernel

    template <class KERNEL> bool operator()(KERNEL) const {
        error = qg_cuda_launch<KERNEL>(l, args, stream);
        return true;
    }
};

// one file each, since each compiles for minutes on all architectures
cudaError_t qg_cuda_launch_decode(const qcache_gpu_launch & l, const void * args, cudaStream_t stream);
cudaError_t qg_cuda_launch_decode_group(const qcache_gpu_launch & l, const void * args, cudaStream_t stream);
cudaError_t qg_cuda_launch_prefill(const qcache_gpu_launch & l, const void * args, cudaStream_t stream);
