// metal_mock.h: a GPU that does what Metal's interface allows it to do at worst
//
// Command buffers run when they are committed, and then as late or as early as events permit (set_order), so that a wait
// that is missing shows in the results. Addresses are numbers of no memory. What Metal forbids, and its validation layer
// or a crash would tell of on a Mac, is a violation: a buffer off its page, an encoder that is left open, a resource that
// an encoder was not told of, a second dispatch without a barrier, an object that is released too often, and so on.

#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace metal_mock {

enum class order {
    ours_late,  // ggml's queue runs as soon as it can, every other one when the host waits for it
    ours_early, // the other way round
};
void set_order(order o);

// calls that can be made to fail
enum class call {
    new_queue, new_library, new_function, new_pipeline, new_buffer, map_buffer, new_event, command_buffer, encoder,
    dispatch, // its command buffer ends in an error
    count
};
void fail(call what, int after = 0); // the call after so many more, once
int  n_calls(call what);

struct properties {
    bool unified = true, apple7 = true, tier2 = true, addresses = true;
    int  simd_width = 32, max_threads = 1024;
    const char * name = "Apple M1 mock";

    // what an event of ggml's holds
    enum { shared_event, other_object, other_counter, nothing } events = shared_event;
};
properties & device();

const std::vector<std::string> & violations(); // since the last clear
void                             clear_violations();
int                              n_objects();    // that live, those of the device aside
int                              n_host_waits(); // that had something to wait for
void                             pages_freed(const void * pages, size_t size);

} // namespace metal_mock
