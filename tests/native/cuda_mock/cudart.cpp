// cudart.cpp: the part of the CUDA runtime that the library calls; see cuda_mock.h

#include "cuda_mock.h"
#include "cuda_mock_internal.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>

namespace {

constexpr int    N_DEVICES = 3, N_PROCESSORS = 32; // enough for workspace to grow with the KV blocks
constexpr size_t SHARED_DEFAULT = 48 << 10, SHARED_MOST = 227 << 10;

} // namespace

struct CUevent_st {
    int          device;
    cudaStream_t stream = nullptr; // of the last record
    uint64_t     at     = 0;       // its work until then
};

struct work {
    std::function<bool()>     run;
    cudaStream_t              other = nullptr; // to wait for, until ...
    uint64_t                  at    = 0;
};

struct CUstream_st {
    int              device;
    bool             of_ggml;
    std::deque<work> given;
    uint64_t         n_given = 0, n_done = 0;
};

namespace {

struct kernel {
    std::string name;
    size_t      shared_most = SHARED_DEFAULT;
};

struct runtime {
    std::recursive_mutex                        mutex;
    std::map<const void *, kernel>              kernels; // by the host's function
    ptx::library                                library;
    ptx::device_memory                          memory[N_DEVICES];
    std::set<cudaStream_t>                      streams;
    std::set<cudaEvent_t>                       events;
    std::map<void *, size_t>                    device_blocks, host_blocks;
    std::vector<std::string>                    violations;
    std::map<std::string, ptx::counts>          counted;
    cuda_mock::order                            order  = cuda_mock::order::all_late;
    cudaError_t                                 broken = cudaSuccess; // a kernel failed: every call says so from now on
    int                                         n_calls[(int) cuda_mock::call::count] = {}, fails_at[(int) cuda_mock::call::count];
    int                                         n_host_waits = 0;
    cuda_mock::ggml_properties                  ggml;

    runtime() { std::fill(std::begin(fails_at), std::end(fails_at), -1); }
};

runtime & rt() {
    static auto * the = new runtime();
    return *the;
}

thread_local int         current_device = 0;
thread_local cudaError_t last_error     = cudaSuccess;

struct locked {
    std::lock_guard<std::recursive_mutex> guard{ rt().mutex };
};

cudaError_t fail(cudaError_t error) {
    return last_error = error;
}

bool fails(cuda_mock::call what) {
    const int i = (int) what;
    return rt().n_calls[i]++ == rt().fails_at[i];
}

void violation(const std::string & what) {
    rt().violations.push_back(what);
    fprintf(stderr, "CUDA mock: %s\n", what.c_str());
}

bool early(const CUstream_st & s) {
    return rt().order != cuda_mock::order::all_late && (rt().order == cuda_mock::order::ggml_early) == s.of_ggml;
}

void run_until(CUstream_st & s, uint64_t n);

void next(CUstream_st & s) {
    work w = std::move(s.given.front());
    s.given.pop_front();
    if (w.other != nullptr) {
        run_until(*w.other, w.at);
    }
    s.n_done++;
    if (w.run && rt().broken == cudaSuccess && !w.run()) {
        rt().broken = cudaErrorLaunchFailure;
    }
}

void run_until(CUstream_st & s, uint64_t n) {
    while (s.n_done < n) {
        next(s);
    }
}

// what may run as soon as it can
void pump() {
    for (bool any = true; any;) {
        any = false;
        for (cudaStream_t s : rt().streams) {
            while (early(*s) && !s->given.empty() && (s->given.front().other == nullptr || s->given.front().other->n_done >= s->given.front().at)) {
                next(*s);
                any = true;
            }
        }
    }
}

void give(cudaStream_t s, work w) {
    s->given.push_back(std::move(w));
    s->n_given++;
    pump();
}

void finish(CUstream_st & s) {
    rt().n_host_waits += s.n_done < s.n_given;
    run_until(s, s.n_given);
    pump();
}

void finish_all() {
    for (cudaStream_t s : rt().streams) {
        run_until(*s, s->n_given);
    }
}

bool known(cudaStream_t s) {
    if (rt().streams.count(s) != 0) {
        return true;
    }
    violation(s == nullptr ? "the default stream, which waits for all others" : "a stream that was destroyed");
    return false;
}

bool known(cudaEvent_t e) {
    if (rt().events.count(e) != 0) {
        return true;
    }
    violation("an event that was destroyed");
    return false;
}

bool launched(int device, const std::string & name, const ptx::geometry & g, const void * const * args) {
    try {
        const ptx::counts n   = ptx::run(rt().library.find(name), g, args, rt().memory[device]);
        ptx::counts &     sum = rt().counted[name];
        sum.instructions += n.instructions;
        sum.global_requests += n.global_requests;
        sum.global_bytes += n.global_bytes;
        sum.global_sectors += n.global_sectors;
        sum.shared_requests += n.shared_requests;
        sum.shared_turns += n.shared_turns;
        sum.shared_least += n.shared_least;
        return true;
    } catch (const std::exception & e) {
        violation(e.what());
        return false;
    }
}

template <class OBJECTS> cudaError_t release(OBJECTS & objects, void * block, const char * what) {
    locked l;
    if (block == nullptr) {
        return cudaSuccess;
    }
    finish_all(); // it waits for the device
    const auto found = objects.find(block);
    if (found == objects.end()) {
        violation(std::string(what) + " freed that was not allocated");
        return fail(cudaErrorInvalidValue);
    }
    memset(block, 0xff, found->second);
    free(block);
    objects.erase(found);
    return cudaSuccess;
}

cudaError_t allocate(std::map<void *, size_t> & blocks, cuda_mock::call what, void ** block, size_t size) {
    if (fails(what)) {
        return fail(cudaErrorMemoryAllocation);
    }
    if (rt().broken != cudaSuccess) {
        return fail(rt().broken);
    }
    *block = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(*block, 0xff, size); // NaN
    blocks[*block] = size;
    return cudaSuccess;
}

} // namespace

namespace cuda_mock {

void set_order(order o) {
    locked l;
    rt().order = o;
}

void fail(call what, int after) {
    locked l;
    rt().fails_at[(int) what] = rt().n_calls[(int) what] + after;
}

int n_calls(call what) {
    return rt().n_calls[(int) what];
}

const std::vector<std::string> & violations() {
    return rt().violations;
}

void clear_violations() {
    rt().violations.clear();
    rt().broken = last_error = cudaSuccess; // as in another process
}

int n_objects() {
    return (int) (rt().streams.size() + rt().events.size() + rt().device_blocks.size() + rt().host_blocks.size());
}

int n_host_waits() {
    return rt().n_host_waits;
}

ggml_properties & ggml() {
    return rt().ggml;
}

cudaStream_t new_ggml_stream(int device) {
    locked l;
    return *rt().streams.insert(new CUstream_st{ device, true, {} }).first;
}

void enqueue(cudaStream_t stream, std::function<bool()> work) {
    locked l;
    give(stream, { std::move(work) });
}

void allocated(int device, const void * pages, size_t size) {
    locked l;
    rt().memory[device].add(pages, size);
}

void freed(int device, const void * pages) {
    locked l;
    finish_all(); // as cudaFree
    rt().memory[device].remove(pages);
}

} // namespace cuda_mock

//
// for the Python tests
//

#define MOCK_EXPORT extern "C" __attribute__((visibility("default")))

// What the i-th kernel by name did: its name, or NULL; n: instructions, then requests, bytes and sectors of device memory, then
// requests of shared memory, turns that they took, turns that they needed.
MOCK_EXPORT const char * cuda_mock_counted(int i, uint64_t * n) {
    locked l;
    for (const auto & [name, c] : rt().counted) {
        if (i-- == 0) {
            const uint64_t all[] = { c.instructions, c.global_requests, c.global_bytes, c.global_sectors, c.shared_requests, c.shared_turns, c.shared_least };
            std::copy(std::begin(all), std::end(all), n);
            return name.c_str();
        }
    }
    return nullptr;
}

//
// what nvcc's host code calls
//

extern "C" {

#define MOCK_API __attribute__((visibility("hidden")))

// the texts of a fat binary that holds PTX alone, not compressed
MOCK_API void ** __cudaRegisterFatBinary(void * wrapper) {
    locked l;
    struct fat_wrapper {
        int            magic, version;
        const uint8_t * data;
    };
    struct fat_header {
        uint32_t magic;
        uint16_t version, header_bytes;
        uint64_t bytes; // after it
    };
    const uint8_t * data   = ((const fat_wrapper *) wrapper)->data;
    const auto &    header = *(const fat_header *) data;
    const std::string all((const char *) data, header.header_bytes + header.bytes);
    for (size_t at = all.find(".version "); at != std::string::npos; at = all.find(".version ", at + 1)) {
        rt().library.add(all.c_str() + at);
    }
    return (void **) wrapper;
}

MOCK_API void __cudaRegisterFatBinaryEnd(void **) {}
MOCK_API void __cudaUnregisterFatBinary(void **) {}

MOCK_API void __cudaRegisterFunction(void **, const char * host, char *, const char * name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
    locked l;
    rt().kernels[host].name = name;
}

struct configuration {
    dim3         grid, block;
    size_t       shared;
    cudaStream_t stream;
};
static thread_local std::vector<configuration> configurations;

MOCK_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({ grid, block, shared, stream });
    return 0;
}

MOCK_API cudaError_t __cudaPopCallConfiguration(dim3 * grid, dim3 * block, size_t * shared, void * stream) {
    const configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared;
    *(cudaStream_t *) stream = c.stream;
    return cudaSuccess;
}

MOCK_API cudaError_t __cudaGetKernel(cudaKernel_t * kernel, const void * host) {
    *kernel = (cudaKernel_t) host;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaLaunchKernel(const void * host, dim3 grid, dim3 block, void ** args, size_t shared, cudaStream_t stream) {
    locked l;
    if (fails(cuda_mock::call::launch)) {
        return fail(cudaErrorLaunchOutOfResources);
    }
    if (rt().broken != cudaSuccess) {
        return fail(rt().broken);
    }
    const auto found = rt().kernels.find(host);
    if (found == rt().kernels.end() || !known(stream)) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    if (stream->device != current_device) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    const kernel & k = found->second;
    try {
        const ptx::function & f       = rt().library.find(k.name);
        const unsigned        threads = block.x * block.y * block.z;
        if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads % 32 != 0 ||
            (int) threads > ptx::max_threads(f) || shared > k.shared_most || ptx::n_parameters(f) != 1) { // a kernel of ours has one
            return fail(cudaErrorInvalidConfiguration);
        }
        auto copy = std::make_shared<std::vector<uint8_t>>((const uint8_t *) args[0], (const uint8_t *) args[0] + ptx::parameter_bytes(f));
        const ptx::geometry g = { { (int) grid.x, (int) grid.y, (int) grid.z }, (int) threads, shared };
        give(stream, { [device = stream->device, name = k.name, g, copy] {
                          const void * given[] = { copy->data() };
                          return launched(device, name, g, given);
                      } });
    } catch (const std::exception & e) {
        violation(e.what());
        return fail(cudaErrorInvalidDeviceFunction);
    }
    return cudaSuccess;
}

// what newer compilers call in its place
MOCK_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void ** args, size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel((const void *) kernel, grid, block, args, shared, stream);
}

//
// the runtime
//

MOCK_API cudaError_t cudaGetDevice(int * device) {
    *device = current_device;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= N_DEVICES) {
        return fail(cudaErrorInvalidDevice);
    }
    current_device = device;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int device) {
    if (fails(cuda_mock::call::attribute) || attribute != cudaDevAttrMultiProcessorCount || device < 0 || device >= N_DEVICES) {
        return fail(cudaErrorInvalidValue);
    }
    *value = N_PROCESSORS;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaFuncSetAttribute(const void * host, cudaFuncAttribute attribute, int value) {
    locked     l;
    const auto found = rt().kernels.find(host);
    if (found == rt().kernels.end() || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t) value > SHARED_MOST) {
        return fail(cudaErrorInvalidValue);
    }
    found->second.shared_most = (size_t) value;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error              = cudaSuccess;
    return error;
}

MOCK_API const char * cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : error == cudaErrorLaunchFailure ? "unspecified launch failure" : "an error of the mock";
}

MOCK_API const char * cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorUnknown";
}

MOCK_API cudaError_t cudaMalloc(void ** block, size_t size) {
    locked            l;
    const cudaError_t error = allocate(rt().device_blocks, cuda_mock::call::malloc, block, size);
    if (error == cudaSuccess) {
        rt().memory[current_device].add(*block, size);
    }
    return error;
}

MOCK_API cudaError_t cudaMallocHost(void ** block, size_t size) {
    locked l;
    return allocate(rt().host_blocks, cuda_mock::call::malloc_host, block, size);
}

MOCK_API cudaError_t cudaFree(void * block) {
    const cudaError_t error = release(rt().device_blocks, block, "device memory");
    locked            l;
    for (ptx::device_memory & of_device : rt().memory) {
        of_device.remove(block);
    }
    return error;
}

MOCK_API cudaError_t cudaFreeHost(void * block) {
    return release(rt().host_blocks, block, "host memory");
}

MOCK_API cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    locked l;
    if (fails(cuda_mock::call::memcpy)) {
        return fail(cudaErrorInvalidValue);
    }
    const auto block = rt().host_blocks.upper_bound((void *) from);
    const bool pinned =
        block != rt().host_blocks.begin() && (uint8_t *) from + size <= (uint8_t *) std::prev(block)->first + std::prev(block)->second;
    if (!known(stream) || kind != cudaMemcpyHostToDevice || !rt().memory[stream->device].contains((uintptr_t) to, size)) {
        violation("a copy beyond an allocation");
        return fail(cudaErrorInvalidValue);
    }
    if (!pinned) {
        violation("an asynchronous copy of memory that is not pinned, which the host waits for");
    }
    give(stream, { [=] { // reads what lies there then
                      memcpy(to, from, size);
                      return true;
                  } });
    return cudaSuccess;
}

MOCK_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned flags) {
    locked l;
    if (fails(cuda_mock::call::event)) {
        return fail(cudaErrorMemoryAllocation);
    }
    if (flags != cudaEventDisableTiming) {
        violation("an event that takes the time, which costs some");
    }
    *event = *rt().events.insert(new CUevent_st{ current_device }).first;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    locked l;
    if (!known(event)) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    rt().events.erase(event);
    delete event;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    locked l;
    if (!known(event) || !known(stream) || event->device != stream->device) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    event->stream = stream;
    event->at     = stream->n_given;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    locked l;
    if (!known(event)) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    if (event->stream != nullptr && known(event->stream)) {
        rt().n_host_waits += event->stream->n_done < event->at;
        run_until(*event->stream, event->at);
        pump();
    }
    return rt().broken == cudaSuccess ? cudaSuccess : fail(rt().broken);
}

MOCK_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned flags) {
    locked l;
    if (fails(cuda_mock::call::stream)) {
        return fail(cudaErrorMemoryAllocation);
    }
    if (flags != cudaStreamNonBlocking) {
        violation("a stream that waits for the default one");
    }
    *stream = *rt().streams.insert(new CUstream_st{ current_device, false, {} }).first;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    locked l;
    if (!known(stream)) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    run_until(*stream, stream->n_given);
    rt().streams.erase(stream);
    for (cudaEvent_t e : rt().events) {
        e->stream = e->stream == stream ? nullptr : e->stream; // all it waited for is done
    }
    for (cudaStream_t s : rt().streams) {
        for (work & w : s->given) {
            w.other = w.other == stream ? nullptr : w.other;
        }
    }
    delete stream;
    return cudaSuccess;
}

MOCK_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    locked l;
    if (!known(stream)) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    finish(*stream);
    return rt().broken == cudaSuccess ? cudaSuccess : fail(rt().broken);
}

MOCK_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    locked l;
    if (!known(stream) || !known(event)) {
        return fail(cudaErrorInvalidResourceHandle);
    }
    if (event->stream != nullptr) { // else nothing was recorded: no wait
        give(stream, { nullptr, event->stream, event->at });
    }
    return cudaSuccess;
}

} // extern "C"
