// qcache-backend.h: a ggml backend that runs our operations beside those of another device

#pragma once

#include <ggml-backend.h>

#include <memory>

// A device that does what `wrapped` does, in its memory and with its kernels, and our operations besides; the same for
// the same device, for as long as the process runs. `wrapped` itself where we have no kernels for it; NULL with
// qcache_last_error() set where ggml's interface is another than ours (VERSION).
ggml_backend_dev_t qcache_backend_device(ggml_backend_dev_t wrapped);

// The device inside, or the device itself where it is none of ours.
ggml_backend_dev_t qcache_backend_wrapped(ggml_backend_dev_t device);

// What our kernels for a device are called ("cuda"), or NULL where it is none of ours: `why_not` says the reason, which
// completes "MTL0: ".
const char * qcache_backend_kernels(ggml_backend_dev_t device, const char ** why_not);

// What went wrong in our part of the last graph that a backend computed, once it has been synchronised; NULL: nothing.
const char * qcache_backend_failed(ggml_backend_t backend);

// The GPUs of ggml, with kernels of ours or without.
int                qcache_backend_count();
ggml_backend_dev_t qcache_backend_get(int i); // wrapped

// A buffer is about to be freed: no backend of ours may keep an address in it.
void qcache_backend_forget(ggml_backend_buffer_t buffer);

// ggml may have freed buffers that this backend, which has nothing to do, has seen.
void qcache_backend_forget_all(ggml_backend_t backend);

struct qcache_buffer_deleter {
    void operator()(ggml_backend_buffer_t buffer) const {
        qcache_backend_forget(buffer);
        ggml_backend_buffer_free(buffer);
    }
};

// a buffer that our kernels see
using qcache_buffer_ptr = std::unique_ptr<ggml_backend_buffer, qcache_buffer_deleter>;
