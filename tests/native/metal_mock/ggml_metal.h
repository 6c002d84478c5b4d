// ggml_metal.h: what stands for ggml's Metal backend on the mock: devices MTL0 with shared buffers, MTL1 with private ones, and
// more with shared ones that the registry doesn't count, for tests that need a device nobody has seen. Their operations are the
// CPU's, run in command buffers of a queue when the GPU would run them.

#pragma once

#include "../ggml_mock.h"

namespace metal_mock {

inline ggml_backend_dev_t ggml_device(int i) {
    return ggml_mock::devices()[i];
}

} // namespace metal_mock
