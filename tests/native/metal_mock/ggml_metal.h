// ggml_metal.h: what stands for ggml's Metal backend on the mock: devices MTL0 with shared buffers, MTL1 with private ones, and
// more with shared ones that the registry doesn't count, for tests that need a device nobody has seen. Their operations are the CPU's, run in command buffers of a queue when the GPU would run them.

#pragma once

#include <ggml-backend.h>

namespace metal_mock {

constexpr int N_DEVICES = 12;

ggml_backend_dev_t ggml_device(int i);

// The devices don't support an operation, SET_ROWS; none: all that the CPU has.
void refuse(const char * op_name);

} // namespace metal_mock
