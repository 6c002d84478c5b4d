// metal_functions.h: the functions of qcache.metal, compiled as C++ by metal_functions.cpp, for metal_emulation.cpp to run

#pragma once

#include <cstddef>
#include <cstdint>

struct metal_function {
    const char * name;
    size_t       args_bytes;

    // one thread
    void (*call)(void * args, uint8_t * threadgroup_memory, const int group[3], int lane, int simdgroup);
};

extern const metal_function metal_functions[];
extern const int            n_metal_functions;

constexpr int METAL_N_CONSTANTS = 4;
extern int    metal_function_constants[METAL_N_CONSTANTS];
