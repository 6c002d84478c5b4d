// test_probe.cpp: what a child process does to its parent, and that the CPU's own buffer type works

#include "check.h"
#include "qcache-probe.h"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

static int n_done = 0;

int main() {
    // handlers as crash reporters install them don't keep the child alive
    signal(SIGILL, [](int) { _Exit(0); });
    CHECK(qcache_survives([](void *) { n_done++; }, nullptr));
    CHECK(n_done == 0); // in the child's memory
    CHECK(!qcache_survives([](void *) { __builtin_trap(); }, nullptr));
    CHECK(!qcache_survives([](void *) { abort(); }, nullptr));
    CHECK(!qcache_survives([](void *) { _Exit(3); }, nullptr));
    CHECK(!qcache_survives([](void *) { std::this_thread::sleep_for(std::chrono::hours(1)); }, nullptr, 50));

    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    CHECK(qcache_buft_works(ggml_backend_dev_buffer_type(cpu)));
    return check_report("probe");
}
