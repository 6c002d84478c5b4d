// metal_emulation.h: runs a function of qcache.metal on the CPU, threadgroup by threadgroup
//
// The source text is compiled as C++ behind the shim metal_shim.h. Every thread is a fiber; every load and store is
// checked: against the barriers between the threads that touch a byte, against alignment, against the bounds of threadgroup
// memory. A SIMD-group function that not all lanes come to is an error.

#pragma once

#include <cstddef>
#include <map>
#include <string>

// Dispatches grid threadgroups of `threads` threads (a multiple of 32).
//
// entry: name of the function. function_constants: values by index; one that the source declares and that is missing is an
// error. bytes0: what [[buffer(0)]] holds, of the very size of its struct. threadgroup_bytes: length of [[threadgroup(0)]].
// False: error says why (unknown function, wrong size, race, misaligned access, ...); the dispatch ended there.
bool metal_emulate(const char * entry, const std::map<int, int> & function_constants, const int grid[3], int threads, int threadgroup_bytes,
                   const void * bytes0, size_t n_bytes0, std::string & error);
