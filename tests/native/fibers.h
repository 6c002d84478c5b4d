// fibers.h: the threads of one thread block, each a fiber on the CPU
//
// A thread runs until it comes to a barrier or to a meeting of its warp, and goes on when the others have come there too.
// What a GPU would hang on or leave undefined ends the run with an error: a thread that ends, or a warp that goes to a
// barrier, while others wait for it.

#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <ucontext.h>

class fibers {
  public:
    static constexpr int    MAX_THREADS = 128;
    static constexpr size_t STACK_BYTES = 128 << 10;

    fibers() : stacks(all_stacks()) {}

    // body(i) for the threads 0 .. n - 1; n: a multiple of 32
    template <class Body> void run(int n, const Body & body) {
        n_threads  = n;
        entry      = [](const void * b, int i) { (*(const Body *) b)(i); };
        entry_data = &body;
        failure.clear();
        for (int i = 0; i < n; i++) {
            state[i]    = READY;
            meetings[i] = 0;
            started[i]  = false;
        }
        for (int n_done = 0; n_done < n;) {
            bool any = false;
            for (int i = 0; i < n; i++) {
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

    // what follows is called by thread i
    void barrier(int i) { wait(i, AT_BARRIER); }
    void meet(int i) { // the other lanes of its warp
        meetings[i]++;
        wait(i, AT_MEETING);
    }
    uint64_t n_meetings(int i) const { return meetings[i]; } // that it has gone to

    // run() throws this
    [[noreturn]] void fail(const std::string & why) {
        failure = why;
        _longjmp(scheduler, 1);
    }

    int  running() const { return current; }
    bool on_stack(const void * p) const { // of the thread that runs
        const char * first = stacks + current * STACK_BYTES;
        return p >= first && p < first + STACK_BYTES;
    }

  private:
    enum thread_state { READY, AT_BARRIER, AT_MEETING, DONE };

    // kept between launches: fresh memory costs a page fault for every 4 KB
    static char * all_stacks() {
        static thread_local const std::unique_ptr<char[]> memory(new char[MAX_THREADS * STACK_BYTES]);
        return memory.get();
    }

    // lets the threads go on that have all come to the same place
    bool release() {
        int n_at_barrier = 0;
        for (int i = 0; i < n_threads; i++) {
            n_at_barrier += state[i] == AT_BARRIER;
        }
        if (n_at_barrier == n_threads) {
            for (int i = 0; i < n_threads; i++) {
                state[i] = READY;
            }
            return true;
        }
        bool any = false;
        for (int first = 0; first < n_threads; first += 32) {
            bool all = true;
            for (int i = first; i < first + 32; i++) {
                all = all && state[i] == AT_MEETING && meetings[i] == meetings[first];
            }
            for (int i = first; all && i < first + 32; i++) {
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
            if (!failure.empty()) {
                throw std::runtime_error(failure);
            }
            return;
        }
        if (started[i]) {
            _longjmp(places[i], 1);
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
        fibers & f = *(fibers *) ((uintptr_t) high << 32 | low);
        f.entry(f.entry_data, f.current);
        f.state[f.current] = DONE;
        _longjmp(f.scheduler, 1);
    }

    void wait(int i, thread_state why) {
        state[i] = why;
        if (_setjmp(places[i]) == 0) {
            _longjmp(scheduler, 1);
        }
    }

    char *       stacks;
    int          n_threads = 0, current = 0;
    thread_state state[MAX_THREADS];
    bool         started[MAX_THREADS];
    uint64_t     meetings[MAX_THREADS];
    jmp_buf      scheduler, places[MAX_THREADS];
    ucontext_t   context;
    std::string  failure;
    void (*entry)(const void *, int) = nullptr;
    const void * entry_data          = nullptr;
};
