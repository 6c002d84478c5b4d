// cuda_mock_internal.h: what the mock of ggml's CUDA device needs besides the runtime's interface

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>

namespace cuda_mock {

cudaStream_t new_ggml_stream(int device); // the ones that set_order() tells from the others
void         enqueue(cudaStream_t stream, std::function<bool()> work); // false: the device fails
void         allocated(int device, const void * pages, size_t size);
void         freed(int device, const void * pages);

} // namespace cuda_mock
