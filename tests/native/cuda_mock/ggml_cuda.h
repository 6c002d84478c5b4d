// ggml_cuda.h: what stands for ggml's CUDA backend on the mock: devices CUDA0 and CUDA1, whose operations are the CPU's and run on
// streams of the mock. CUDA1 is the runtime's device 2.

#pragma once

#include "../ggml_mock.h"
