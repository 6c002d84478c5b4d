// ggml_mock.h: GPUs of ggml that have its CPU's operations, for mocks of a runtime (Metal, CUDA), which say when they run

#pragma once

#include <ggml-backend.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace ggml_mock {

// behind a ggml_backend_t
class stream {
  public:
    virtual ~stream() = default; // waits

    virtual void   compute(std::function<bool()> work) = 0; // to be done when the GPU gets to it; false: it failed
    virtual void   record(void * event)                = 0;
    virtual void   wait(void * event)                  = 0;
    virtual void   synchronize()                       = 0;
    virtual void * context() { return this; } // what ggml keeps of it
};

class device {
  public:
    virtual ~device() = default;

    std::string name, buft_name, description;

    virtual std::unique_ptr<stream> new_stream()           = 0;
    virtual void *                  new_event()            = 0; // NULL: it has none
    virtual void                    free_event(void * event) = 0;
    virtual void                    queried() {}                        // its memory was asked for
    virtual void                    allocated(void * pages, size_t size) { (void) pages, (void) size; }
    virtual void                    freed(void * pages, size_t size) { (void) pages, (void) size; }
};

// Registers them under that name; the registry counts the first ones only.
void                            add(const char * registry, std::vector<std::unique_ptr<device>> devices, size_t n_counted);
const std::vector<ggml_backend_dev_t> & devices();

// They don't support an operation, SET_ROWS; none: all that the CPU has.
void refuse(const char * op_name);

} // namespace ggml_mock
