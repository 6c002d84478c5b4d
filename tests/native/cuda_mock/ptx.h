// ptx.h: runs PTX, as nvcc makes it of our kernels, on the CPU: what nothing but a GPU runs otherwise
//
// The 32 lanes of a warp go through an instruction together; where they part, those run first whose code stands first. What a
// GPU would stop at, leave undefined or answer by chance ends the run with an error that names the instruction: memory that
// nobody allocated, an address off its alignment, two threads at the same bytes without a barrier between them, shared memory
// that is read before it was written, a barrier or a shuffle that a part of a warp comes to.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace ptx {

struct function;

// the kernels of PTX texts by their mangled names, each decoded when it is first asked for
class library {
  public:
    library();
    ~library();

    void             add(const std::string & text);
    const function & find(const std::string & name); // throws std::runtime_error: there is none, or an instruction is not known

  private:
    std::map<std::string, std::string>               texts;
    std::map<std::string, std::unique_ptr<function>> functions;
};

// what kernels may touch
class device_memory {
  public:
    void add(const void * begin, size_t size) { sizes[(uintptr_t) begin] = size; }
    void remove(const void * begin) { sizes.erase((uintptr_t) begin); }
    bool contains(uintptr_t at, size_t size) const {
        const auto next = sizes.upper_bound(at);
        if (next == sizes.begin()) {
            return false;
        }
        const auto & found = *std::prev(next);
        return at + size <= found.first + found.second;
    }

  private:
    std::map<uintptr_t, size_t> sizes; // of allocations, by where they begin
};

struct geometry {
    int    grid[3];
    int    n_threads;    // of a block; a multiple of 32
    size_t shared_bytes; // dynamic
};

// of all warps of a launch
struct counts {
    uint64_t instructions = 0;
    uint64_t global_requests = 0, global_bytes = 0, global_sectors = 0; // instructions; bytes asked for; 32 bytes each they lie in
    uint64_t shared_requests = 0, shared_turns = 0, shared_least = 0;   // turns of the 32 banks, and how few do for the bytes
};

// args: one pointer for each parameter. Throws std::runtime_error.
counts run(const function & kernel, const geometry & g, const void * const * args, const device_memory & memory);

size_t n_parameters(const function & kernel);
size_t parameter_bytes(const function & kernel);
int    max_threads(const function & kernel);

} // namespace ptx
