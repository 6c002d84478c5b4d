// qcache-probe.cpp: asks ggml what it multiplies with; a product in a child process, because an illegal instruction ends the
// process that meets it

#include "qcache-probe.h"

#include <ggml-cpp.h>
#include <ggml-cpu.h>

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifndef _WIN32
#    include <sys/resource.h>
#    include <sys/wait.h>
#    include <unistd.h>

#    include <csignal>
#    include <ctime>
#endif

// arg is the buffer type; several rows at once, which take AMX's tiles: a single row doesn't
static void multiply(void * arg) {
    // the parent's log may need a lock, such as Python's
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    ggml_backend_ptr backend{ ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), 1);
    ggml_context_ptr weights{ ggml_init({ ggml_tensor_overhead() * 2, nullptr, true }) };
    ggml_context_ptr rest{ ggml_init({ ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true }) };
    ggml_tensor *    w     = ggml_new_tensor_2d(weights.get(), GGML_TYPE_Q8_0, 256, 64);
    ggml_tensor *    x     = ggml_new_tensor_2d(rest.get(), GGML_TYPE_F32, 256, 32);
    ggml_cgraph *    graph = ggml_new_graph(rest.get());
    ggml_build_forward_expand(graph, ggml_mul_mat(rest.get(), w, x));
    ggml_backend_buffer_ptr of_weights{ ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), (ggml_backend_buffer_type_t) arg) };
    ggml_backend_buffer_ptr of_rest{ ggml_backend_alloc_ctx_tensors(rest.get(), backend.get()) };
    const std::vector<char> zeros(ggml_nbytes(w) + ggml_nbytes(x));
    ggml_backend_tensor_set(w, zeros.data(), 0, ggml_nbytes(w));
    ggml_backend_tensor_set(x, zeros.data(), 0, ggml_nbytes(x));
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
        abort();
    }
}

bool qcache_survives(void (*work)(void * arg), void * arg, int n_ms) {
#ifdef _WIN32
    (void) work;
    (void) arg;
    (void) n_ms;
    return true;
#else
    const pid_t child = fork();
    if (child < 0) {
        return false;
    }
    if (child == 0) {
        const rlimit none = { 0, 0 };
        setrlimit(RLIMIT_CORE, &none);
        for (int s : { SIGILL, SIGSEGV, SIGABRT }) {
            signal(s, SIG_DFL); // not the parent's handlers
        }
        // a new thread: OpenMP would wait for the workers that this one had in the parent
        std::thread(work, arg).join();
        _exit(0);
    }
    // a lock that another thread held at the fork is never released in the child
    constexpr timespec ms    = { 0, 1000000 };
    int                state = 0;
    for (int i = 0; i < n_ms; i++) {
        const pid_t ended = waitpid(child, &state, WNOHANG);
        if (ended != 0) {
            return ended == child && WIFEXITED(state) && WEXITSTATUS(state) == 0;
        }
        nanosleep(&ms, nullptr);
    }
    kill(child, SIGKILL);
    waitpid(child, &state, 0);
    return false;
#endif
}

bool qcache_buft_works(ggml_backend_buffer_type_t buft) {
    if (strcmp(ggml_backend_buft_name(buft), "AMX") != 0) {
        return true;
    }
    static const bool works = qcache_survives(multiply, buft);
    return works;
}

std::vector<ggml_backend_buffer_type_t> qcache_extra_bufts(ggml_backend_dev_t cpu) {
    std::vector<ggml_backend_buffer_type_t> bufts;
    const auto get = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu),
                                                                                            "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = get != nullptr ? get(cpu) : nullptr; buft != nullptr && *buft != nullptr; buft++) {
        bufts.push_back(*buft);
    }
    return bufts;
}

bool qcache_supports_matmul(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft, const ggml_tensor * shape) {
    ggml_context_ptr ctx{ ggml_init({ ggml_tensor_overhead() * 4, nullptr, true }) };
    ggml_tensor *    w = ggml_dup_tensor(ctx.get(), shape);
    ggml_tensor *    x = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, w->ne[0], 512);
    ggml_backend_buffer_ptr buffer{ ggml_backend_buft_alloc_buffer(buft, 0) };
    w->buffer     = buffer.get();
    const bool ok = ggml_backend_dev_supports_op(device, ggml_mul_mat(ctx.get(), w, x));
    w->buffer     = nullptr;
    return ok;
}
