// metal_emulation.h: runs a function of qcache.metal on the CPU, threadgroup by threadgroup
//
// The source text is compiled as C++ with metal_shim/ in place of Metal's headers. Every thread is a fiber; every load and store is
// checked: against the barriers between the threads that touch a byte, against alignment, against the bounds of threadgroup
// memory. A SIMD-group function that not all lanes come to is an error.

#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <string>

// Dispatches grid threadgroups of `threads` threads (a multiple of 32).
//
// entry: name of the function. function_constants: values by index; one that the source declares and that is missing is an
// error. bytes0: what [[buffer(0)]] holds, of the very size of its struct. threadgroup_bytes: length of [[threadgroup(0)]].
// False: error says why (unknown function, wrong size, race, misaligned access, ...); the dispatch ended there.
bool metal_emulate(const char * entry, const std::map<int, int> & function_constants, const int grid[3], int threads, int threadgroup_bytes,
                   const void * bytes0, size_t n_bytes0, std::string & error);

// From now on the barrier in that line of qcache.metal is left out; 0: none is. Races it prevented are to be found then.
void metal_emulation_without_barrier(int line);

// Lines of the barriers that any thread has come to.
const std::set<int> & metal_emulation_barriers();
