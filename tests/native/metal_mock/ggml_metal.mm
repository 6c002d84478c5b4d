// ggml_metal.mm: see ggml_metal.h

#include "ggml_metal.h"

#include "metal_mock.h"
#include "metal_mock_internal.h"

#include <atomic>
#include <memory>

namespace {

constexpr int N_DEVICES = 12, N_COUNTED = 2;

// an event as ggml's Metal backend keeps it
struct event_layout {
    id<MTLSharedEvent> event;
    std::atomic<int>   value;
};

class metal_stream : public ggml_mock::stream {
  public:
    explicit metal_stream(id<MTLCommandQueue> queue) : queue(queue) {}
    ~metal_stream() override { finish(); }

    void compute(std::function<bool()> work) override {
        submit([&](id<MockCommandBuffer> commands) { [commands encodeHost:work]; });
    }

    void record(void * event) override {
        auto & e = *(event_layout *) event;
        submit([&](id<MockCommandBuffer> commands) { [commands encodeSignalEvent:e.event value:(uint64_t) ++e.value]; });
    }

    void wait(void * event) override {
        auto & e = *(event_layout *) event;
        submit([&](id<MockCommandBuffer> commands) { [commands encodeWaitForEvent:e.event value:(uint64_t) e.value.load()]; });
    }

    void synchronize() override { finish(); }

  private:
    // a command buffer of the device's queue
    template <class F> void submit(const F & encode) {
        @autoreleasepool {
            const id<MTLCommandBuffer> commands = [queue commandBuffer];
            encode((id<MockCommandBuffer>) commands);
            [commands commit];
            [last release];
            last = [commands retain];
        }
    }

    void finish() {
        @autoreleasepool {
            [last waitUntilCompleted];
            [last release];
            last = nil;
        }
    }

    id<MTLCommandQueue>  queue;
    id<MTLCommandBuffer> last = nil; // retained
};

class metal_device : public ggml_mock::device {
  public:
    metal_device(int index, id<MTLCommandQueue> queue) : queue(queue) {
        name        = "MTL" + std::to_string(index);
        buft_name   = name + (index == 1 ? "_Private" : "");
        description = "mock of a Metal device";
    }

    std::unique_ptr<ggml_mock::stream> new_stream() override { return std::make_unique<metal_stream>(queue); }

    void * new_event() override {
        @autoreleasepool {
            const id<MTLDevice> gpu   = MTLCreateSystemDefaultDevice();
            id<MTLSharedEvent>  event = [gpu newSharedEvent];
            [gpu release];
            const auto & p = metal_mock::device();
            if (p.events == p.nothing) {
                [event release];
                return nullptr;
            }
            if (p.events == p.other_object) {
                [event release];
                event = (id<MTLSharedEvent>) [[NSObject alloc] init];
            }
            return event == nil ? nullptr : new event_layout{ event, { p.events == p.other_counter ? 7 : 0 } };
        }
    }

    void free_event(void * event) override {
        auto * e = (event_layout *) event;
        [e->event release];
        delete e;
    }

    void freed(void * pages, size_t size) override { metal_mock::pages_freed(pages, size); }

  private:
    id<MTLCommandQueue> queue;
};

struct registration {
    registration() {
        id<MTLCommandQueue>                             queue = mock_new_stock_queue(); // one of the device's, as ggml has it
        std::vector<std::unique_ptr<ggml_mock::device>> devices;
        for (int i = 0; i < N_DEVICES; i++) {
            devices.push_back(std::make_unique<metal_device>(i, queue));
        }
        ggml_mock::add("MTL", std::move(devices), N_COUNTED);
    }
} registered;

} // namespace
