// runtime.mm: our operations on Apple's GPUs (qcache_gpu_i)
//
// ggml's Metal backend keeps its queue to itself, so ours is a second one of the same device, and two of ggml's events
// (MTLSharedEvent with a counter beside it) order the two on the GPU. Its buffers are memory of the process, which we map
// again without a copy: pointers into them become addresses of ours. Kernels take addresses in tables, where Metal can't see
// them, so every mapping is declared to every encoder and barriers stand between dispatches.
//
// Manual reference counting, as in ggml's own Metal sources.

#include "../gpu/gpu-ops.h"
#include "../qcache-ggml-abi.h"
#include "../qcache-impl.h"
#include "metal-kernels.h"

#include <ggml-backend.h>

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unistd.h>
#include <unordered_map>
#include <utility>
#include <vector>

#if __has_feature(objc_arc)
#    error "compile with -fno-objc-arc"
#endif

namespace {

constexpr NSUInteger MAX_COMMAND_BUFFERS = 512; // not completed; one a stretch of our nodes, and the host may be a step ahead

// one reference to an object
template <class T> class owned {
  public:
    owned() = default;
    explicit owned(T given) : object(given) {} // takes over the caller's reference
    owned(owned && other) noexcept : object(std::exchange(other.object, nil)) {}
    owned & operator=(owned && other) noexcept {
        std::swap(object, other.object);
        return *this;
    }
    ~owned() { [object release]; }

    static owned sharing(T given) { return owned([given retain]); }
    T            get() const { return object; }
    void         reset() { *this = owned(); }
    explicit     operator bool() const { return object != nil; }

  private:
    T object = nil;
};

// what an event of ggml's Metal backend has in its context (0.25.3); find_refusal and metal_init check it
struct metal_event {
    id<MTLSharedEvent> event;
    std::atomic<int>   value; // last signal that was encoded
};

metal_event & event_of(ggml_backend_event_t event) {
    return *(metal_event *) ((qcache_abi_event *) event)->context;
}

struct event_deleter {
    void operator()(ggml_backend_event_t event) const { ggml_backend_event_free(event); }
};
using event_ptr = std::unique_ptr<ggml_backend_event, event_deleter>;

const char * text_of(NSError * error) {
    return error == nil ? "no reason given" : [[error localizedDescription] UTF8String];
}

//
// which devices
//

const char * find_refusal(ggml_backend_dev_t device) {
    const std::string buft     = ggml_backend_buft_name(ggml_backend_dev_buffer_type(device));
    const std::string private_ = "_Private";
    if (buft.size() >= private_.size() && buft.compare(buft.size() - private_.size(), private_.size(), private_) == 0) {
        return "its buffers are private, our kernels need those that the CPU shares";
    }
    const event_ptr event{ ggml_backend_event_new(device) };
    if (!event) {
        return "it has no events to order our kernels by";
    }
    const auto * e = (const metal_event *) ((qcache_abi_event *) event.get())->context;
    if (e == nullptr || e->event == nil || e->value != 0 || ![(id) e->event conformsToProtocol:@protocol(MTLSharedEvent)]) {
        return "its events are not those of ggml 0.25.3";
    }
    const owned<id<MTLDevice>> holder{ MTLCreateSystemDefaultDevice() };
    const id<MTLDevice>        gpu = holder.get();
    if (gpu == nil || !gpu.hasUnifiedMemory || ![gpu supportsFamily:MTLGPUFamilyApple7]) {
        return "it is older than Apple's M1 (family Apple7), or not Apple's";
    }
    if (gpu.argumentBuffersSupport != MTLArgumentBuffersTier2) {
        return "it has no argument buffers of tier 2";
    }
    const owned<id<MTLBuffer>> probe{ [gpu newBufferWithLength:16 options:MTLResourceStorageModeShared] };
    if (![(id) probe.get() respondsToSelector:@selector(gpuAddress)]) {
        return "its buffers tell no addresses before macOS 13";
    }
    return nullptr;
}

// NULL: our kernels run there
const char * refusal(ggml_backend_dev_t device) {
    static std::mutex                                 mutex;
    static std::map<ggml_backend_dev_t, const char *> known;
    std::lock_guard<std::mutex>                       lock(mutex);
    const auto                                        found = known.find(device);
    if (found != known.end()) {
        return found->second;
    }
    @autoreleasepool {
        return known[device] = find_refusal(device);
    }
}

// Metal doesn't tell; what matters is how many threadgroups a decode step is cut into, roughly
int n_cores(id<MTLDevice> device) {
    const std::string name = [[device name] UTF8String];
    const std::pair<const char *, int> of_name[] = { { "Ultra", 64 }, { "Max", 32 }, { "Pro", 16 } };
    for (const auto & [word, n] : of_name) {
        if (name.find(word) != std::string::npos) {
            return n;
        }
    }
    return 8;
}

//
// code
//

// The library of a device and its functions, each specialised and compiled when it is first launched. Contexts share it.
class device_code {
  public:
    // NULL: qcache_last_error()
    static std::shared_ptr<device_code> of(id<MTLDevice> device) {
        static std::mutex                                  mutex;
        static std::map<void *, std::weak_ptr<device_code>> all;
        std::lock_guard<std::mutex>                        lock(mutex);
        std::weak_ptr<device_code> &                       known = all[(void *) device];
        std::shared_ptr<device_code>                       code  = known.lock();
        if (!code) {
            code = std::make_shared<device_code>(device);
            if (!code->library) {
                return nullptr;
            }
            known = code;
        }
        return code;
    }

    explicit device_code(id<MTLDevice> device) : device(owned<id<MTLDevice>>::sharing(device)) {
        NSError *         error = nil;
        const std::string path  = library_path();
        if (!path.empty() && access(path.c_str(), R_OK) == 0) {
            NSURL * url = [NSURL fileURLWithPath:[NSString stringWithUTF8String:path.c_str()]];
            library     = owned<id<MTLLibrary>>([device newLibraryWithURL:url error:&error]);
            if (!library) {
                qcache_fail(QCACHE_STATUS_INTERNAL, "Metal: loading %s: %s", path.c_str(), text_of(error));
            }
            return;
        }
        const owned<MTLCompileOptions *> options{ [[MTLCompileOptions alloc] init] };
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations" // mathMode, which takes its place, came with macOS 15
        [options.get() setFastMathEnabled:NO];
#pragma clang diagnostic pop
        [options.get() setLanguageVersion:MTLLanguageVersion3_0];
        library = owned<id<MTLLibrary>>([device newLibraryWithSource:[NSString stringWithUTF8String:qcache_metal_source]
                                                             options:options.get()
                                                               error:&error]);
        if (!library) { // a library comes with warnings in error
            qcache_fail(QCACHE_STATUS_INTERNAL, "Metal: compiling the kernels: %s", text_of(error));
        }
    }

    // nil: qcache_last_error()
    id<MTLComputePipelineState> pipeline(const qcache_metal_kernel & kernel) {
        std::lock_guard<std::mutex> lock(mutex);
        key                         k{ kernel.name, {} };
        std::copy(std::begin(kernel.constants), std::end(kernel.constants), k.second.begin());
        const auto found = pipelines.find(k);
        if (found != pipelines.end()) {
            return found->second.get();
        }
        const owned<MTLFunctionConstantValues *> values{ [[MTLFunctionConstantValues alloc] init] };
        for (int i = 0; i < QCACHE_METAL_N_CONSTANTS; i++) {
            [values.get() setConstantValue:&kernel.constants[i] type:MTLDataTypeInt atIndex:(NSUInteger) i];
        }
        NSError *                     error = nil;
        const owned<id<MTLFunction>> function{ [library.get() newFunctionWithName:[NSString stringWithUTF8String:kernel.name]
                                                                   constantValues:values.get()
                                                                            error:&error] };
        if (!function) {
            qcache_fail(QCACHE_STATUS_INTERNAL, "Metal: function %s: %s", kernel.name, text_of(error));
            return nil;
        }
        owned<id<MTLComputePipelineState>> made{ [device.get() newComputePipelineStateWithFunction:function.get() error:&error] };
        if (!made) {
            qcache_fail(QCACHE_STATUS_INTERNAL, "Metal: compiling %s: %s", kernel.name, text_of(error));
            return nil;
        }
        if ([made.get() threadExecutionWidth] != 32 || (int) [made.get() maxTotalThreadsPerThreadgroup] < kernel.threads) {
            qcache_fail(QCACHE_STATUS_UNSUPPORTED, "Metal: %s runs %d threads in SIMD groups of %d, expected %d in groups of 32", kernel.name,
                        (int) [made.get() maxTotalThreadsPerThreadgroup], (int) [made.get() threadExecutionWidth], kernel.threads);
            return nil;
        }
        return pipelines.emplace(k, std::move(made)).first->second.get();
    }

  private:
    using key = std::pair<const char *, std::array<int, QCACHE_METAL_N_CONSTANTS>>; // names are literals

    // qcache.metallib beside this library, for those who compile ahead
    static std::string library_path() {
        Dl_info info;
        if (dladdr((const void *) &refusal, &info) == 0 || info.dli_fname == nullptr) {
            return "";
        }
        const std::string self = info.dli_fname;
        return self.substr(0, self.rfind('/') + 1) + "qcache.metallib";
    }

    owned<id<MTLDevice>>                              device;
    owned<id<MTLLibrary>>                             library;
    std::mutex                                        mutex;
    std::map<key, owned<id<MTLComputePipelineState>>> pipelines;
};

//
// context
//

// a buffer of ggml's as our queue sees it
struct mapping {
    owned<id<MTLBuffer>> buffer;
    const uint8_t *      base;
    size_t               size;
    uint64_t             address; // of base
};

// commands between enter and leave
struct stretch {
    owned<id<MTLCommandBuffer>> commands;
    int                         value; // of our event when they are done
};

struct metal_context {
    ggml_backend_t               wrapped = nullptr;
    event_ptr                    theirs; // signalled by ggml's queue
    event_ptr                    ours;   // signalled by ours
    owned<id<MTLDevice>>         device;
    owned<id<MTLCommandQueue>>   queue;
    std::shared_ptr<device_code> code;

    owned<id<MTLCommandBuffer>>         commands; // nil: outside of a stretch
    owned<id<MTLComputeCommandEncoder>> encoder;
    bool                                dispatched = false; // since the encoder started
    std::deque<stretch>                 committed;          // not seen completed yet
    std::string                         failure;            // of a command buffer, until synchronize tells

    owned<id<MTLBuffer>>              table;
    owned<id<MTLBuffer>>              work;
    std::vector<owned<id<MTLBuffer>>> replaced; // that committed commands may still use

    std::mutex                                         mutex; // of maps: any thread may free a buffer
    std::unordered_map<ggml_backend_buffer_t, mapping> maps;
    std::vector<id<MTLResource>>                       resources; // that an encoder is told of; scratch

    ~metal_context() {
        drain();
        ggml_backend_synchronize(wrapped); // its queue may wait for our event
    }

    // A command buffer that failed signals nothing, and ggml's queue would wait for it for ever.
    void end(const stretch & s) {
        [s.commands.get() waitUntilCompleted];
        if ([s.commands.get() status] == MTLCommandBufferStatusCompleted) {
            return;
        }
        if (failure.empty()) {
            failure = text_of([s.commands.get() error]);
        }
        const id<MTLSharedEvent> event = event_of(ours.get()).event;
        if (event.signaledValue < (uint64_t) s.value) {
            event.signaledValue = (uint64_t) s.value;
        }
    }

    void drain() {
        for (; !committed.empty(); committed.pop_front()) {
            end(committed.front());
        }
        replaced.clear();
    }

    // those that are done; the host doesn't wait
    void prune() {
        const auto is_done = [](const stretch & s) { return [s.commands.get() status] >= MTLCommandBufferStatusCompleted; };
        for (; !committed.empty() && is_done(committed.front()); committed.pop_front()) {
            end(committed.front());
        }
    }

    owned<id<MTLBuffer>> new_buffer(size_t size, const char * what) {
        owned<id<MTLBuffer>> buffer{ [device.get() newBufferWithLength:size options:MTLResourceStorageModeShared] };
        if (!buffer) {
            qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "Metal: cannot allocate %zu bytes of %s", size, what);
        }
        return buffer;
    }
};

metal_context & of(void * ctx) {
    return *(metal_context *) ctx;
}

bool failed(const char * what) {
    qcache_fail(QCACHE_STATUS_INTERNAL, "Metal: %s", what);
    return false;
}

void * metal_init(ggml_backend * wrapped, int * n_processors) {
    @autoreleasepool {
        const ggml_backend_dev_t device = ggml_backend_get_device(wrapped);
        if (const char * why_not = refusal(device); why_not != nullptr) {
            qcache_fail(QCACHE_STATUS_UNSUPPORTED, "Metal: %s: %s", ggml_backend_dev_name(device), why_not);
            return nullptr;
        }
        auto c     = std::make_unique<metal_context>();
        c->wrapped = wrapped;
        c->theirs.reset(ggml_backend_event_new(device));
        c->ours.reset(ggml_backend_event_new(device));
        if (!c->theirs || !c->ours) {
            failed("creating events");
            return nullptr;
        }
        ggml_backend_event_record(c->theirs.get(), wrapped);
        if (event_of(c->theirs.get()).value != 1) {
            failed("ggml's events don't count as those of ggml 0.25.3 do");
            return nullptr;
        }
        c->device = owned<id<MTLDevice>>(MTLCreateSystemDefaultDevice());
        c->queue  = owned<id<MTLCommandQueue>>([c->device.get() newCommandQueueWithMaxCommandBufferCount:MAX_COMMAND_BUFFERS]);
        if (!c->queue) {
            failed("creating a command queue");
            return nullptr;
        }
        c->code       = device_code::of(c->device.get());
        *n_processors = n_cores(c->device.get());
        return c->code ? c.release() : nullptr;
    }
}

void metal_free(void * ctx) {
    @autoreleasepool {
        delete (metal_context *) ctx;
    }
}

bool metal_enter(void * ctx) {
    @autoreleasepool {
        auto & c = of(ctx);
        c.prune();
        if (!c.failure.empty()) {
            return failed(c.failure.c_str()); // what would follow reads what it should have written
        }
        ggml_backend_event_record(c.theirs.get(), c.wrapped);
        const metal_event & theirs = event_of(c.theirs.get());

        c.commands = owned<id<MTLCommandBuffer>>::sharing([c.queue.get() commandBuffer]);
        if (!c.commands) {
            return failed("creating a command buffer");
        }
        [c.commands.get() encodeWaitForEvent:theirs.event value:(uint64_t) theirs.value.load()];
        c.encoder = owned<id<MTLComputeCommandEncoder>>::sharing([c.commands.get() computeCommandEncoder]);
        if (!c.encoder) {
            c.commands.reset();
            return failed("creating a command encoder");
        }
        c.dispatched = false;
        c.resources.clear();
        {
            std::lock_guard<std::mutex> lock(c.mutex);
            for (const auto & [buffer, map] : c.maps) {
                c.resources.push_back(map.buffer.get());
            }
        }
        for (const id<MTLBuffer> buffer : { c.table.get(), c.work.get() }) {
            if (buffer != nil) {
                c.resources.push_back(buffer);
            }
        }
        if (!c.resources.empty()) {
            [c.encoder.get() useResources:c.resources.data() count:c.resources.size() usage:MTLResourceUsageRead | MTLResourceUsageWrite];
        }
        return true;
    }
}

bool metal_leave(void * ctx) {
    @autoreleasepool {
        auto & c = of(ctx);
        if (!c.commands) {
            return failed("left without having entered");
        }
        [c.encoder.get() endEncoding];
        c.encoder.reset();
        metal_event & ours  = event_of(c.ours.get());
        const int     value = ++ours.value;
        [c.commands.get() encodeSignalEvent:ours.event value:(uint64_t) value];
        [c.commands.get() commit];
        c.committed.push_back({ std::move(c.commands), value });
        c.commands.reset();
        ggml_backend_event_wait(c.wrapped, c.ours.get());
        return true;
    }
}

uint64_t metal_upload(void * ctx, const void * data, size_t size) {
    @autoreleasepool {
        auto & c = of(ctx);
        c.drain(); // the last step may read the table still, though a decode waits for each step
        if (!c.table || [c.table.get() length] < size) {
            c.table = c.new_buffer(size * 2, "tables"); // blocks come one by one
            if (!c.table) {
                return 0;
            }
        }
        memcpy([c.table.get() contents], data, size);
        return c.table.get().gpuAddress;
    }
}

uint64_t metal_workspace(void * ctx, size_t size) {
    @autoreleasepool {
        auto & c = of(ctx);
        if (!c.work || [c.work.get() length] < size) {
            owned<id<MTLBuffer>> made = c.new_buffer(size, "workspace");
            if (!made) {
                return 0;
            }
            c.replaced.push_back(std::move(c.work));
            c.work = std::move(made);
            if (c.encoder) {
                [c.encoder.get() useResource:c.work.get() usage:MTLResourceUsageRead | MTLResourceUsageWrite];
            }
        }
        return c.work.get().gpuAddress;
    }
}

bool metal_launch(void * ctx, const qcache_gpu_launch & l, const void * args) {
    @autoreleasepool {
        auto & c = of(ctx);
        if (!c.encoder) {
            return failed("launched outside of a stretch");
        }
        const qcache_metal_kernel kernel = qcache_metal_kernel_for(l, args);
        if (kernel.name == nullptr) {
            qcache_fail(QCACHE_STATUS_UNSUPPORTED, "Metal: there is no kernel %d of width %d", (int) l.kernel, l.width);
            return false;
        }
        const id<MTLComputePipelineState> pipeline = c.code->pipeline(kernel);
        if (pipeline == nil) {
            return false;
        }
        const id<MTLComputeCommandEncoder> encoder = c.encoder.get();
        if (c.dispatched) {
            [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
        }
        [encoder setComputePipelineState:pipeline];
        [encoder setBytes:args length:(NSUInteger) kernel.args_bytes atIndex:QCACHE_METAL_ARGS_BUFFER];
        [encoder setThreadgroupMemoryLength:(NSUInteger) std::max(kernel.threadgroup_bytes, 16) atIndex:QCACHE_METAL_THREADGROUP_MEMORY];
        [encoder dispatchThreadgroups:MTLSizeMake((NSUInteger) l.grid[0], (NSUInteger) l.grid[1], (NSUInteger) l.grid[2])
                threadsPerThreadgroup:MTLSizeMake((NSUInteger) kernel.threads, 1, 1)];
        c.dispatched = true;
        return true;
    }
}

bool metal_synchronize(void * ctx) {
    @autoreleasepool {
        auto & c = of(ctx);
        c.drain();
        if (c.failure.empty()) {
            return true;
        }
        const std::string failure = std::exchange(c.failure, "");
        return failed(failure.c_str());
    }
}

uint64_t metal_address(void * ctx, ggml_backend_buffer * buffer, const void * pointer) {
    auto & c = of(ctx);
    if (buffer == nullptr) {
        failed("a tensor lies in no buffer");
        return 0;
    }
    std::lock_guard<std::mutex> lock(c.mutex);
    auto                        found = c.maps.find(buffer);
    if (found == c.maps.end()) {
        @autoreleasepool {
            const auto *    base  = (const uint8_t *) ggml_backend_buffer_get_base(buffer);
            const size_t    size  = ggml_backend_buffer_get_size(buffer);
            const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
            const uintptr_t first = (uintptr_t) base / page * page;
            const uintptr_t end   = ((uintptr_t) base + size + page - 1) / page * page;
            mapping         map   = { owned<id<MTLBuffer>>([c.device.get() newBufferWithBytesNoCopy:(void *) first
                                                                                   length:end - first
                                                                                  options:MTLResourceStorageModeShared
                                                                              deallocator:nil]),
                                      base, size, 0 };
            if (!map.buffer) {
                qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "Metal: cannot map a buffer of %zu bytes", size);
                return 0;
            }
            map.address = map.buffer.get().gpuAddress + ((uintptr_t) base - first);
            found       = c.maps.emplace(buffer, std::move(map)).first;
            if (c.encoder) {
                [c.encoder.get() useResource:found->second.buffer.get() usage:MTLResourceUsageRead | MTLResourceUsageWrite];
            }
        }
    }
    const mapping & map    = found->second;
    const size_t    offset = (size_t) ((const uint8_t *) pointer - map.base);
    if (offset >= map.size) {
        failed("a tensor lies outside of its buffer");
        return 0;
    }
    return map.address + offset;
}

void metal_forget(void * ctx, ggml_backend_buffer * buffer) {
    @autoreleasepool {
        auto &                      c = of(ctx);
        std::lock_guard<std::mutex> lock(c.mutex);
        if (buffer == nullptr) {
            c.drain();
            c.maps.clear();
        } else if (const auto found = c.maps.find(buffer); found != c.maps.end()) {
            c.drain();
            c.maps.erase(found);
        }
    }
}

} // namespace

extern const qcache_gpu_i qcache_gpu_metal;
const qcache_gpu_i        qcache_gpu_metal = {
    "metal",     false,       0,            QCACHE_METAL_TILE_ROWS, qcache_metal_resident, qcache_metal_prefill_shared, metal_init,    metal_free,
    metal_enter, metal_leave, metal_upload, metal_workspace,        metal_launch,          metal_synchronize,           metal_address, metal_forget,
};

const char * qcache_metal_refusal(ggml_backend_dev_t device) {
    return refusal(device);
}
