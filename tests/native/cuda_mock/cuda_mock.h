// cuda_mock.h: a CUDA runtime without a GPU, under code that nvcc compiled, host's and device's; kernels run as ptx.h says
//
// Streams run as late or as early as events permit (set_order), so that a wait that is missing shows in the results. What a
// program may not do and a real runtime would not always tell is a violation.

#pragma once

#include "ptx.h"

#include <cstdint>
#include <string>
#include <vector>

namespace cuda_mock {

enum class order {
    all_late,   // streams run when the host waits for them
    ggml_early, // ggml's streams run as soon as they can, the others late
    ours_early, // the other way round
};
void set_order(order o);

// calls that can be made to fail
enum class call { malloc, malloc_host, memcpy, launch, event, stream, attribute, count };
void fail(call what, int after = 0); // the call after so many more, once
int  n_calls(call what);

const std::vector<std::string> &      violations(); // since the last clear
void                                  clear_violations();
int                                   n_objects();    // streams, events and memory that live, ggml's buffers aside
int                                   n_host_waits(); // that had something to wait for

// How ggml's device shows its streams, as runtime.cu looks for them (stream_of).
struct ggml_properties {
    bool events = true; // built without GGML_CUDA_NO_PEER_COPY

    // what its backends have where that keeps its streams
    enum { streams, other_device, used, several, nothing } shown = streams;
};
ggml_properties & ggml();

} // namespace cuda_mock
