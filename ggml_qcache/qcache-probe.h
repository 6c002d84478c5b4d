// qcache-probe.h: what ggml can multiply with here; what may end the process is tried in a child process

#pragma once

#include <ggml-backend.h>

#include <vector>

// Runs work in a child process, without core dump. False when it died or took longer than n_ms milliseconds; true where
// there is no fork().
bool qcache_survives(void (*work)(void * arg), void * arg, int n_ms = 5000);

// Whether the CPU can multiply with weights in a buffer type of its own. Some ggml builds offer AMX and stop at an illegal
// instruction in it, because GCC removes the stores of the tile configuration as dead (llama.cpp #26954): AMX is tried, once
// in a process.
bool qcache_buft_works(ggml_backend_buffer_type_t buft);

// The CPU's own buffer types for weights (CPU_REPACK, AMX), best first.
std::vector<ggml_backend_buffer_type_t> qcache_extra_bufts(ggml_backend_dev_t cpu);

// Whether a device multiplies with a weight of this type and shape in a buffer type.
bool qcache_supports_matmul(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft, const ggml_tensor * shape);
