// ggml_cuda.cpp: what stands for ggml's CUDA backend on the mock: devices CUDA0 and CUDA1, whose operations are the CPU's and run on
// streams of the mock. CUDA1 is the runtime's device 2.

#include "../ggml_mock.h"
#include "cuda_mock.h"
#include "cuda_mock_internal.h"

namespace {

// what ggml 0.25.3 keeps for a CUDA backend begins so
struct backend_context {
    int          device;
    std::string  name;
    cudaEvent_t  copied           = nullptr;
    cudaStream_t streams[16][8] = {};
};

class cuda_stream : public ggml_mock::stream {
  public:
    cuda_stream(int device, const std::string & name) : device(device), c{ device, name } {
        using p = cuda_mock::ggml_properties;
        c.device += cuda_mock::ggml().shown == p::other_device;
        if (cuda_mock::ggml().shown == p::used) {
            (void) stream();
        }
    }

    ~cuda_stream() override {
        for (auto & of_device : c.streams) {
            for (cudaStream_t s : of_device) {
                if (s != nullptr) {
                    cudaStreamDestroy(s);
                }
            }
        }
        if (hidden != nullptr) {
            cudaStreamDestroy(hidden);
        }
    }

    void compute(std::function<bool()> work) override { cuda_mock::enqueue(stream(), std::move(work)); }
    void record(void * event) override { cudaEventRecord((cudaEvent_t) event, stream()); }
    void wait(void * event) override { cudaStreamWaitEvent(stream(), (cudaEvent_t) event, 0); }
    void synchronize() override { cudaStreamSynchronize(stream()); }
    void * context() override { return &c; }

  private:
    // made when it is first used
    cudaStream_t stream() {
        using p        = cuda_mock::ggml_properties;
        const auto now = cuda_mock::ggml().shown;
        cudaStream_t & own = now == p::nothing || hidden != nullptr ? hidden : c.streams[device][0];
        if (own == nullptr) {
            own = cuda_mock::new_ggml_stream(device);
            if (now == p::several) {
                c.streams[device][1] = cuda_mock::new_ggml_stream(device);
            }
        }
        return own;
    }

    int             device;
    backend_context c;
    cudaStream_t    hidden = nullptr;
};

class cuda_device : public ggml_mock::device {
  public:
    explicit cuda_device(int index) : index(2 * index) {
        name        = "CUDA" + std::to_string(index);
        buft_name   = name;
        description = "mock of a CUDA device";
    }

    std::unique_ptr<ggml_mock::stream> new_stream() override { return std::make_unique<cuda_stream>(index, name); }

    void * new_event() override {
        cudaEvent_t event = nullptr;
        if (cuda_mock::ggml().events) {
            cudaSetDevice(index);
            cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
        }
        return event;
    }

    void free_event(void * event) override { cudaEventDestroy((cudaEvent_t) event); }
    void queried() override { cudaSetDevice(index); }
    void allocated(void * pages, size_t size) override { cuda_mock::allocated(index, pages, size); }
    void freed(void * pages, size_t) override { cuda_mock::freed(index, pages); }

  private:
    int index; // the runtime's
};

struct registration {
    registration() {
        std::vector<std::unique_ptr<ggml_mock::device>> devices;
        for (int i = 0; i < 2; i++) {
            devices.push_back(std::make_unique<cuda_device>(i));
        }
        ggml_mock::add("CUDA", std::move(devices), 2);
    }
} registered;

} // namespace
