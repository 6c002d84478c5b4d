// qcache-backend.h: a ggml backend that runs our operations beside those of another device

#pragma once

#include <ggml-backend.h>

// A device that does what `wrapped` does, in its memory and with its kernels, and our operations besides; the same for
// the same device, for as long as the process runs. NULL with qcache_last_error() set where we have no kernels for it
// (UNSUPPORTED) or ggml's interface is another than ours (VERSION).
ggml_backend_dev_t qcache_backend_device(ggml_backend_dev_t wrapped);

// The device inside, or the device itself where it is none of ours.
ggml_backend_dev_t qcache_backend_wrapped(ggml_backend_dev_t device);

// What our kernels for one of our devices are called: "cuda".
const char * qcache_backend_kernels(ggml_backend_dev_t device);

// The devices that qcache_backend_device takes, of those that ggml has.
int                qcache_backend_count();
ggml_backend_dev_t qcache_backend_get(int i); // wrapped
