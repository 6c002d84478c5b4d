// simt_emulation.h: runs a kernel body of ggml_qcache/gpu/ on the CPU, thread block by thread block
//
// Every thread of a block is a fiber. It runs until it comes to a barrier or to an exchange inside its warp, and goes on
// when the others have come there too. What a GPU would hang on or leave undefined ends the run with an error: a
// thread that ends, or a warp that goes to a barrier, while others wait for it.

#pragma once

#include "gpu/simt.h"

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <ucontext.h>
#include <vector>

namespace simt {

constexpr int N_THREADS = QG_THREADS;
constexpr int N_WARPS   = N_THREADS / 32;

class block;

// what a body sees; see ggml_qcache/gpu/simt.h
class thread_view {
  public:
    thread_view(block & b, int id) : b(b), id(id) {}

    int    thread() const { return id; }
    int    lane() const { return id % 32; }
    int    warp() const { return id / 32; }
    int    block_x() const;
    int    block_y() const;
    int    block_z() const;
    void * shared() const;
    void   sync();

    template <typename V> V shuffle_xor(V value, int mask);

    // d += A B, m16n8k16; the places of the elements in the lanes' registers are those of the PTX manual
    void mma(float * d, const uint32_t * a, const uint32_t * b);

  private:
    block & b;
    int     id;
};

class block {
  public:
    explicit block(int shared_bytes) : shared_memory(shared_bytes), stacks(all_stacks()) {}

    int index[3] = { 0, 0, 0 };

    template <class Body> void run(const Body & body) {
        std::fill(shared_memory.begin(), shared_memory.end(), (uint8_t) 0xff); // NaN: nothing may rely on what lies there
        entry = [](void * b, thread_view & t) { (*(const Body *) b)(t); };
        entry_data = (void *) &body;
        for (int i = 0; i < N_THREADS; i++) {
            state[i]     = READY;
            exchanges[i] = 0;
            started[i]   = false;
        }
        for (int n_done = 0; n_done < N_THREADS;) {
            bool any = false;
            for (int i = 0; i < N_THREADS; i++) {
                if (state[i] == READY) {
                    any = true;
                    resume(i);
                    n_done += state[i] == DONE;
                }
            }
            if (release()) {
                any = true;
            }
            if (!any) {
                throw std::runtime_error("threads wait for others that ended or wait elsewhere");
            }
        }
    }

  private:
    friend class thread_view;

    static constexpr size_t STACK_BYTES = 128 << 10;

    // kept between launches: fresh memory costs a page fault for every 4 KB
    static char * all_stacks() {
        static thread_local const std::unique_ptr<char[]> memory(new char[N_THREADS * STACK_BYTES]);
        return memory.get();
    }

    enum thread_state { READY, AT_BARRIER, IN_EXCHANGE, DONE };

    struct exchange_slot {
        uint32_t words[6];
    };

    // lets the threads go on that have all come to the same place
    bool release() {
        bool any = false;
        int  n_at_barrier = 0;
        for (int i = 0; i < N_THREADS; i++) {
            n_at_barrier += state[i] == AT_BARRIER;
        }
        if (n_at_barrier == N_THREADS) {
            for (auto & s : state) {
                s = READY;
            }
            return true;
        }
        for (int w = 0; w < N_WARPS; w++) {
            bool all = true;
            for (int i = 32 * w; i < 32 * w + 32; i++) {
                all = all && state[i] == IN_EXCHANGE && exchanges[i] == exchanges[32 * w];
            }
            for (int i = 32 * w; all && i < 32 * w + 32; i++) {
                state[i] = READY;
                any      = true;
            }
        }
        return any;
    }

    // _setjmp and _longjmp switch in nanoseconds; a context's own switch asks the kernel for the signal mask
    void resume(int i) {
        current = i;
        if (_setjmp(scheduler) != 0) {
            return;
        }
        if (started[i]) {
            _longjmp(fibers[i], 1);
        }
        started[i] = true;
        getcontext(&context);
        context.uc_stack.ss_sp   = stacks + i * STACK_BYTES;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link          = nullptr;
        makecontext(&context, (void (*)()) start, 2, (unsigned) ((uintptr_t) this >> 32), (unsigned) (uintptr_t) this);
        setcontext(&context);
    }

    static void start(unsigned high, unsigned low) {
        block &     b = *(block *) ((uintptr_t) high << 32 | low);
        thread_view view(b, b.current);
        b.entry(b.entry_data, view);
        b.state[b.current] = DONE;
        _longjmp(b.scheduler, 1);
    }

    void wait(int i, thread_state why) {
        state[i] = why;
        if (_setjmp(fibers[i]) == 0) {
            _longjmp(scheduler, 1);
        }
    }

    // Two turns of slots: a lane can be one exchange ahead of those that have not read yet, never two.
    exchange_slot * exchange(int i, const uint32_t * words, int n) {
        exchange_slot * turn = slots[exchanges[i] % 2];
        memcpy(turn[i].words, words, n * sizeof(uint32_t));
        exchanges[i]++;
        wait(i, IN_EXCHANGE);
        return turn + i / 32 * 32;
    }

    std::vector<uint8_t>           shared_memory;
    char *                         stacks;
    thread_state                   state[N_THREADS];
    bool                           started[N_THREADS];
    uint64_t                       exchanges[N_THREADS];
    exchange_slot                  slots[2][N_THREADS];
    jmp_buf                        scheduler, fibers[N_THREADS];
    ucontext_t                     context;
    int                            current = 0;
    void (*entry)(void *, thread_view &);
    void * entry_data = nullptr;
};

inline int    thread_view::block_x() const { return b.index[0]; }
inline int    thread_view::block_y() const { return b.index[1]; }
inline int    thread_view::block_z() const { return b.index[2]; }
inline void * thread_view::shared() const { return b.shared_memory.data(); }
inline void   thread_view::sync() { b.wait(id, block::AT_BARRIER); }

template <typename V> V thread_view::shuffle_xor(V value, int mask) {
    static_assert(sizeof(V) == sizeof(uint32_t), "one register");
    uint32_t word;
    memcpy(&word, &value, sizeof(word));
    const auto * warp = b.exchange(id, &word, 1);
    memcpy(&value, &warp[lane() ^ mask].words[0], sizeof(value));
    return value;
}

inline void thread_view::mma(float * d, const uint32_t * a, const uint32_t * b_words) {
    const uint32_t words[6] = { a[0], a[1], a[2], a[3], b_words[0], b_words[1] };
    const auto *   warp     = b.exchange(id, words, 6);
    const auto     half     = [](uint32_t word, int k) { return qg_from_half((uint16_t) (word >> 16 * (k % 2))); };
    for (int k = 0; k < 16; k++) {
        const int of_k = k % 8 / 2;
        for (int r = 0; r < 2; r++) {
            const float left = half(warp[lane() / 4 * 4 + of_k].words[r + (k >= 8 ? 2 : 0)], k);
            for (int e = 0; e < 2; e++) {
                const int column = lane() % 4 * 2 + e;
                d[2 * r + e] += left * half(warp[column * 4 + of_k].words[4 + (k >= 8)], k);
            }
        }
    }
}

// Runs body(thread) for every thread of every block of the grid.
template <class Body> void launch(const int grid[3], int shared_bytes, const Body & body) {
    block b(shared_bytes);
    for (b.index[2] = 0; b.index[2] < grid[2]; b.index[2]++) {
        for (b.index[1] = 0; b.index[1] < grid[1]; b.index[1]++) {
            for (b.index[0] = 0; b.index[0] < grid[0]; b.index[0]++) {
                b.run(body);
            }
        }
    }
}

} // namespace simt
