// metal_emulation.cpp: threadgroups of a Metal function on the CPU; see metal_emulation.h

#include "metal_emulation.h"

#include "fibers.h"
#include "gpu/simt.h"
#include "metal_functions.h"
#include "memory_races.h"
#include "metal_shim/metal_shim.h"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace {

constexpr int MAX_THREADGROUP_MEMORY = 32 * 1024;
constexpr int MEM_THREADGROUP        = 2; // metal::mem_flags

enum simd_function { BARRIER, SHUFFLE_XOR, ANY, FILL, LOAD, STORE, MULTIPLY, MULTIPLY_ACCUMULATE };

// What a lane brings to an exchange, on its own stack: it waits while the exchange is made.
struct lane_call {
    simd_function function;
    uint32_t      argument; // the same for all lanes
    uint32_t      word;     // in and out
};

class dispatch {
  public:
    dispatch(int n_threads, int n_shared, const void * args, size_t n_args)
        : n_threads(n_threads), n_shared(n_shared), shared(n_shared + 2 * GUARD), shared_checker(n_shared),
          args((const uint8_t *) args, (const uint8_t *) args + n_args) {
        shared_begin = (uintptr_t) shared.data() + GUARD;
        shared_begin = (shared_begin + 15) / 16 * 16;
    }

    void run(const metal_function & function, const int grid[3]) {
        for (group[2] = 0; group[2] < grid[2]; group[2]++) {
            for (group[1] = 0; group[1] < grid[1]; group[1]++) {
                for (group[0] = 0; group[0] < grid[0]; group[0]++) {
                    first_thread = (((int64_t) group[2] * grid[1] + group[1]) * grid[0] + group[0]) * n_threads;
                    shared_checker.begin();
                    std::fill(shared.begin(), shared.end(), (uint8_t) 0xff);
                    std::fill(n_barriers, n_barriers + fibers::MAX_THREADS, 0);
                    std::fill(n_done, n_done + fibers::MAX_THREADS / 32, 0);
                    std::fill(history, history + fibers::MAX_THREADS, 0);
                    n_barriers_done = 0;
                    threads.run(n_threads, [&](int i) { function.call(args.data(), (uint8_t *) shared_begin, group, i % 32, i / 32); });
                    for (int warp = 0; warp < n_threads / 32; warp++) {
                        if (!same_history(warp)) {
                            throw std::runtime_error(DIFFERENT_HISTORY);
                        }
                    }
                }
            }
        }
    }

    // a load or store of the running thread; aligned: the type's alignment is its size
    void access(const void * p, unsigned size, bool write, bool aligned) {
        if (threads.on_stack(p)) {
            return;
        }
        if (aligned && (uintptr_t) p % size != 0) {
            fail("a misaligned " + std::string(write ? "store" : "load") + " of " + std::to_string(size) + " bytes");
        }
        touch(p, size, write, threads.running());
    }

    void threadgroup_barrier(int flags) {
        const int i       = threads.running();
        barrier_flags[i]  = flags;
        const int number  = ++n_barriers[i];
        threads.barrier(i);
        if (n_barriers_done == number) {
            return;
        }
        n_barriers_done = number; // the first to go on
        for (int j = 0; j < n_threads; j++) {
            if (barrier_flags[j] != flags) {
                fail("a threadgroup_barrier with different flags");
            }
        }
        for (int warp = 0; warp < n_threads / 32; warp++) {
            if (!same_history(warp)) {
                fail(DIFFERENT_HISTORY);
            }
        }
        if (flags & MEM_THREADGROUP) {
            shared_checker.threadgroup_barrier();
        }
    }

    // All lanes of a SIMD group come here with the same function; the first to go on calls job(lanes, which SIMD group) for all of them.
    template <class Job> uint32_t together(simd_function function, uint32_t argument, uint32_t word, const Job & job) {
        lane_call mine = { function, argument, word };
        const int i = threads.running(), warp = i / 32;
        lanes[i] = &mine;
        threads.meet(i);
        if (n_done[warp] != threads.n_meetings(i)) {
            n_done[warp] = threads.n_meetings(i);
            for (int j = 32 * warp; j < 32 * warp + 32; j++) {
                if (lanes[j]->function != function || lanes[j]->argument != argument) {
                    fail("lanes of a SIMD group are in different functions");
                }
            }
            if (!same_history(warp)) {
                fail(DIFFERENT_HISTORY);
            }
            job(lanes + 32 * warp, warp);
        }
        return mine.word;
    }

    // A function of simdgroup_matrix, which lanes go through without waiting: lane 0 does all of it (true), and that the others came to the same
    // functions with the same arguments is seen at the next barrier or exchange. What is in memory cannot change in between without a race.
    bool alone(simd_function function, uint64_t u0 = 0, uint64_t u1 = 0, uint64_t u2 = 0, uint64_t u3 = 0, uint64_t u4 = 0) {
        uint64_t & h = history[threads.running()];
        for (const uint64_t u : { (uint64_t) function, u0, u1, u2, u3, u4 }) {
            h = (h ^ u) * 0x9e3779b97f4a7c15;
            h ^= h >> 29;
        }
        return threads.running() % 32 == 0;
    }

    // eight elements in a row, by a function of a whole SIMD group
    void touch_row(const void * p, unsigned element_bytes, bool write) {
        if ((uintptr_t) p % element_bytes != 0) {
            fail("a matrix that is not aligned to its elements");
        }
        touch(p, 8 * element_bytes, write, shared_memory_checker::ALL_LANES);
    }

    [[noreturn]] void fail(const std::string & what) {
        threads.fail(what + ", thread " + std::to_string(threads.running()) + " of threadgroup (" + std::to_string(group[0]) + ", " +
                     std::to_string(group[1]) + ", " + std::to_string(group[2]) + ")");
    }

    shared_memory_checker & checker() { return shared_checker; }

  private:
    static constexpr int          GUARD             = 64 << 10; // bytes around threadgroup memory
    static constexpr const char * DIFFERENT_HISTORY = "lanes of a SIMD group went through different functions of simdgroup_matrix";

    bool same_history(int warp) const {
        return std::all_of(history + 32 * warp, history + 32 * warp + 32, [&](uint64_t h) { return h == history[32 * warp]; });
    }

    void touch(const void * p, unsigned size, bool write, int thread) {
        const auto a  = (uintptr_t) p;
        const auto at = (int64_t) (a - shared_begin);
        if (at >= -(GUARD - 16) && at < n_shared + GUARD - 16) {
            int other = 0;
            if (at < 0 || at + size > n_shared) {
                fail("byte " + std::to_string(at) + " is outside the " + std::to_string(n_shared) + " of threadgroup memory");
            }
            if (size == 1) {
                fail("a byte of threadgroup memory is touched: the checker knows no less than two");
            }
            const char * wrong = shared_checker.access((int) at, (int) size, write, thread, threads.running() / 32, other);
            if (wrong != nullptr) {
                fail("race: byte " + std::to_string(at) + " of threadgroup memory " + wrong + " (the other: " + std::to_string(other) + ")");
            }
            return;
        }
        if (write && a + size > (uintptr_t) args.data() && a < (uintptr_t) args.data() + args.size()) {
            fail("the arguments are written to");
        }
        int64_t      other = 0;
        const char * wrong = device_checker.access(a, size, write, first_thread + threads.running(), other);
        if (wrong != nullptr) {
            fail(std::string("race: device memory ") + wrong + " (the other: " + std::to_string(other) + " of the dispatch)");
        }
    }

    const int             n_threads, n_shared;
    fibers                threads;
    std::vector<uint8_t>  shared;
    uintptr_t             shared_begin;
    shared_memory_checker shared_checker;
    device_memory_checker device_checker;
    std::vector<uint8_t>  args;
    int                   group[3] = {};
    int64_t               first_thread = 0;
    lane_call *           lanes[fibers::MAX_THREADS];
    uint64_t              history[fibers::MAX_THREADS]; // a hash of the functions of simdgroup_matrix that it went through
    int                   n_barriers[fibers::MAX_THREADS], barrier_flags[fibers::MAX_THREADS];
    int                   n_barriers_done = 0;
    uint64_t              n_done[fibers::MAX_THREADS / 32];
};

dispatch *    active = nullptr;
int           without_barrier = 0; // its line
std::set<int> barriers;

} // namespace

void metal_emulation_without_barrier(int line) {
    without_barrier = line;
}

const std::set<int> & metal_emulation_barriers() {
    return barriers;
}

bool metal_keeps_barrier(int line) {
    static int last = 0; // a set is slow
    if (line != last) {
        barriers.insert(line);
        last = line;
    }
    return line != without_barrier;
}

bool metal_emulate(const char * entry, const std::map<int, int> & function_constants, const int grid[3], int threads, int threadgroup_bytes,
                   const void * bytes0, size_t n_bytes0, std::string & error) {
    static std::mutex           mutex;
    std::lock_guard<std::mutex> lock(mutex);
    error.clear();
    const metal_function * function = nullptr;
    for (int i = 0; i < n_metal_functions; i++) {
        function = strcmp(metal_functions[i].name, entry) == 0 ? &metal_functions[i] : function;
    }
    if (function == nullptr) {
        error = std::string("there is no function ") + entry;
    } else if (n_bytes0 != function->args_bytes) {
        error = std::string(entry) + ": " + std::to_string(n_bytes0) + " bytes of arguments, expected " + std::to_string(function->args_bytes);
    } else if (threads < 32 || threads > fibers::MAX_THREADS || threads % 32 != 0) {
        error = std::string(entry) + ": " + std::to_string(threads) + " threads in a threadgroup";
    } else if (threadgroup_bytes < 0 || threadgroup_bytes > MAX_THREADGROUP_MEMORY || threadgroup_bytes % 16 != 0) {
        error = std::string(entry) + ": " + std::to_string(threadgroup_bytes) + " bytes of threadgroup memory";
    } else if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1) {
        error = std::string(entry) + ": an empty grid";
    }
    for (int i = 0; i < METAL_N_CONSTANTS && error.empty(); i++) {
        const auto found = function_constants.find(i);
        if (found == function_constants.end()) {
            error = std::string(entry) + ": function constant " + std::to_string(i) + " has no value";
        } else {
            metal_function_constants[i] = found->second;
        }
    }
    if (!error.empty()) {
        return false;
    }
    dispatch d(threads, threadgroup_bytes, bytes0, n_bytes0);
    active = &d;
    try {
        d.run(*function, grid);
    } catch (const std::exception & e) {
        error = std::string(entry) + ": " + e.what();
    }
    active = nullptr;
    return error.empty();
}

//
// what metal_stdlib calls
//

namespace metal_shim {

void check_alignment(const void * to, const void * from, unsigned bytes) {
    for (const void * p : { to, from }) {
        if ((uintptr_t) p % bytes != 0) {
            active->fail("a misaligned load or store of " + std::to_string(bytes) + " bytes");
        }
    }
}

float half_to_float(uint16_t bits) {
    static const std::vector<float> all = [] {
        std::vector<float> values(1 << 16);
        for (size_t i = 0; i < values.size(); i++) {
            values[i] = qg_from_half((uint16_t) i);
        }
        return values;
    }();
    return all[bits];
}

uint16_t float_to_half(float x) { return qg_to_half(x); }

void threadgroup_barrier(int flags) {
    active->threadgroup_barrier(flags);
}

void simdgroup_barrier(int flags) {
    active->together(BARRIER, flags, 0, [&](lane_call * const *, int warp) {
        if (flags & MEM_THREADGROUP) {
            active->checker().simdgroup_barrier(warp);
        }
    });
}

uint32_t shuffle_xor(uint32_t word, unsigned mask) {
    return active->together(SHUFFLE_XOR, mask, word, [&](lane_call * const * lanes, int) {
        uint32_t words[32];
        for (unsigned i = 0; i < 32; i++) {
            words[i] = lanes[i ^ mask]->word;
        }
        for (int i = 0; i < 32; i++) {
            lanes[i]->word = words[i];
        }
    });
}

bool any(bool x) {
    return active->together(ANY, 0, x, [&](lane_call * const * lanes, int) {
        const bool result = std::any_of(lanes, lanes + 32, [](const lane_call * l) { return l->word != 0; });
        for (int i = 0; i < 32; i++) {
            lanes[i]->word = result;
        }
    }) != 0;
}

void fill(float * m, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if (active->alone(FILL, bits)) {
        std::fill(m, m + 64, value);
    }
}

void load(float * m, const void * from, int element_bytes, uint64_t per_row, uint64_t x, uint64_t y, bool transposed) {
    if (!active->alone(LOAD, (uintptr_t) from, per_row, x, y, transposed)) {
        return;
    }
    for (int row = 0; row < 8; row++) {
        const uint8_t * p = (const uint8_t *) from + ((y + row) * per_row + x) * element_bytes;
        active->touch_row(p, element_bytes, false);
        for (int column = 0; column < 8; column++) {
            float & value = m[transposed ? column * 8 + row : row * 8 + column];
            value         = element_bytes == 2 ? half_to_float(((const uint16_t *) p)[column]) : ((const float *) p)[column];
        }
    }
}

void store(const float * m, void * to, int element_bytes, uint64_t per_row, uint64_t x, uint64_t y, bool transposed) {
    if (!active->alone(STORE, (uintptr_t) to, per_row, x, y, transposed)) {
        return;
    }
    for (int row = 0; row < 8; row++) {
        uint8_t * p = (uint8_t *) to + ((y + row) * per_row + x) * element_bytes;
        active->touch_row(p, element_bytes, true);
        for (int column = 0; column < 8; column++) {
            const float value = m[transposed ? column * 8 + row : row * 8 + column];
            if (element_bytes == 2) {
                ((uint16_t *) p)[column] = qg_to_half(value);
            } else {
                ((float *) p)[column] = value;
            }
        }
    }
}

void multiply_add(float * d, const float * a, const float * b, const float * c) {
    if (!active->alone(c != nullptr ? MULTIPLY_ACCUMULATE : MULTIPLY)) {
        return;
    }
    float sums[64] = {};
    if (c != nullptr) {
        std::copy(c, c + 64, sums);
    }
    for (int row = 0; row < 8; row++) {
        for (int k = 0; k < 8; k++) {
            for (int column = 0; column < 8; column++) {
                sums[row * 8 + column] += a[row * 8 + k] * b[k * 8 + column];
            }
        }
    }
    std::copy(sums, sums + 64, d);
}

} // namespace metal_shim

//
// what GCC's instrumentation calls
//

static void access(const void * p, unsigned size, bool write, bool aligned) {
    if (active != nullptr) {
        active->access(p, size, write, aligned);
    }
}

#define TSAN_ACCESS(SIZE)                                                                                                        \
    void __tsan_read##SIZE(void * p) { access(p, SIZE, false, true); }                                                          \
    void __tsan_write##SIZE(void * p) { access(p, SIZE, true, true); }                                                          \
    void __tsan_unaligned_read##SIZE(void * p) { access(p, SIZE, false, false); }                                               \
    void __tsan_unaligned_write##SIZE(void * p) { access(p, SIZE, true, false); }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_read_range(void * p, unsigned long size) { access(p, (unsigned) size, false, false); }
void __tsan_write_range(void * p, unsigned long size) { access(p, (unsigned) size, true, false); }
TSAN_ACCESS(1)
TSAN_ACCESS(2)
TSAN_ACCESS(4)
TSAN_ACCESS(8)
TSAN_ACCESS(16)
}
