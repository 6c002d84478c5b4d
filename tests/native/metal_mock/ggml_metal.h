// ggml_metal.h: what stands for ggml's Metal backend on the mock: two devices, MTL0 with shared buffers and MTL1 with private
// ones. Their operations are the CPU's, run in command buffers of a queue when the GPU would run them.

#pragma once

#include <ggml-backend.h>

namespace metal_mock {

ggml_backend_dev_t ggml_device(int i);

} // namespace metal_mock
