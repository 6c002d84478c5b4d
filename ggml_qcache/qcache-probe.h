// qcache-probe.h: tries in a child process what may end the process

#pragma once

#include <ggml-backend.h>

// Runs work in a child process, without core dump. False when it died or took longer than n_ms milliseconds; true where
// there is no fork().
bool qcache_survives(void (*work)(void * arg), void * arg, int n_ms = 5000);

// Whether the CPU can multiply with weights in a buffer type of its own. Some ggml builds offer AMX and stop at an illegal
// instruction in it, because GCC removes the stores of the tile configuration as dead (llama.cpp #26954): AMX is tried, once
// in a process.
bool qcache_buft_works(ggml_backend_buffer_type_t buft);
