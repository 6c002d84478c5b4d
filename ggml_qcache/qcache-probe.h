// qcache-probe.h: whether the CPU can multiply with weights of one of its extra buffer types

#pragma once

#include <ggml-backend.h>

// Runs work in a child process, without core dump. False when it died or took longer than n_ms milliseconds; true where
// there is no fork().
bool qcache_survives(void (*work)(void * arg), void * arg, int n_ms = 5000);

// Some ggml builds stop at an illegal instruction in the product of weights of a type that they offer: GCC removes the
// stores of AMX's tile configuration as dead (llama.cpp #26954). Such types are asked once in a process.
bool qcache_buft_works(ggml_backend_dev_t cpu, ggml_backend_buffer_type_t buft);
