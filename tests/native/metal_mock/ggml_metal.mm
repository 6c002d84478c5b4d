// ggml_metal.mm: see ggml_metal.h

#include "ggml_metal.h"

#include "metal_mock.h"
#include "metal_mock_internal.h"
#include "qcache-ggml-abi.h"

#include <ggml-cpp.h>
#include <ggml-cpu.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

// ggml's layouts of a buffer and its type, interface version 2
struct buft_layout {
    const char * (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t);
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor *);
    bool (*is_host)(ggml_backend_buffer_type_t);
    ggml_backend_dev_t device;
    void *             context;
};

struct buffer_layout {
    void (*free_buffer)(ggml_backend_buffer_t);
    void * (*get_base)(ggml_backend_buffer_t);
    enum ggml_status (*init_tensor)(ggml_backend_buffer_t, ggml_tensor *);
    void (*memset_tensor)(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t);
    void (*set_tensor)(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t);
    void (*get_tensor)(ggml_backend_buffer_t, const ggml_tensor *, void *, size_t, size_t);
    void * set_tensor_2d, * get_tensor_2d;
    bool (*cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor *, ggml_tensor *);
    void (*clear)(ggml_backend_buffer_t, uint8_t);
    void (*reset)(ggml_backend_buffer_t);
    ggml_backend_buffer_type_t     buft;
    void *                         context; // its memory
    size_t                         size;
    enum ggml_backend_buffer_usage usage;
};

// an event as ggml's Metal backend keeps it
struct event_layout {
    id<MTLSharedEvent> event;
    std::atomic<int>   value;
};

struct mock_device : qcache_abi_device {
    std::string         name, buft_name;
    buft_layout         buft;
    id<MTLCommandQueue> queue;
};

struct mock_backend {
    ggml_backend_ptr     cpu;
    mock_device *        device;
    id<MTLCommandBuffer> last = nil; // retained
};

mock_device & of(ggml_backend_dev_t device) {
    return *(mock_device *) device;
}

mock_backend & of(ggml_backend_t backend) {
    return *(mock_backend *) ((qcache_abi_backend *) backend)->context;
}

//
// buffers: the pages of the last one that was freed are the next one's, as it may happen
//

buffer_layout & of(ggml_backend_buffer_t buffer) {
    return *(buffer_layout *) buffer;
}

size_t page_bytes(size_t size) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    return (size + page - 1) / page * page + page;
}

struct page_store {
    std::mutex                           mutex;
    std::multimap<size_t, uint8_t *>     free;
};

page_store & pages() {
    static auto * the = new page_store();
    return *the;
}

void buffer_free(ggml_backend_buffer_t buffer) {
    auto &       b    = of(buffer);
    const size_t size = page_bytes(b.size);
    metal_mock::pages_freed(b.context, size);
    std::lock_guard<std::mutex> lock(pages().mutex);
    pages().free.emplace(size, (uint8_t *) b.context);
}

void * buffer_base(ggml_backend_buffer_t buffer) {
    return of(buffer).context;
}

void buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset((uint8_t *) tensor->data + offset, value, size);
}

void buffer_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((uint8_t *) tensor->data + offset, data, size);
}

void buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const uint8_t *) tensor->data + offset, size);
}

bool buffer_copy(ggml_backend_buffer_t, const ggml_tensor *, ggml_tensor *) {
    return false;
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(of(buffer).context, value, of(buffer).size);
}

const char * buft_name(ggml_backend_buffer_type_t buft) {
    return of(((buft_layout *) buft)->device).buft_name.c_str();
}

ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    const size_t n_bytes = page_bytes(size);
    void *       memory  = nullptr;
    {
        std::lock_guard<std::mutex> lock(pages().mutex);
        const auto                  found = pages().free.find(n_bytes);
        if (found != pages().free.end()) {
            memory = found->second;
            pages().free.erase(found);
        }
    }
    if (memory == nullptr) {
        memory = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            return nullptr;
        }
    }
    memset(memory, 0xff, n_bytes); // NaN
    auto * b         = (buffer_layout *) ::operator new(sizeof(buffer_layout)); // ggml deletes it
    *b               = {};
    b->free_buffer   = buffer_free;
    b->get_base      = buffer_base;
    b->memset_tensor = buffer_memset;
    b->set_tensor    = buffer_set;
    b->get_tensor    = buffer_get;
    b->cpy_tensor    = buffer_copy;
    b->clear         = buffer_clear;
    b->buft          = buft;
    b->context       = memory;
    b->size          = size;
    b->usage         = GGML_BACKEND_BUFFER_USAGE_ANY;
    return (ggml_backend_buffer_t) b;
}

size_t buft_alignment(ggml_backend_buffer_type_t) {
    return 32;
}

bool buft_is_host(ggml_backend_buffer_type_t) {
    return false; // ggml's shared buffers say so too
}

//
// backend
//

// a command buffer of the device's queue
template <class F> void submit(mock_backend & b, const F & encode) {
    @autoreleasepool {
        const id<MTLCommandBuffer> commands = [b.device->queue commandBuffer];
        encode((id<MockCommandBuffer>) commands);
        [commands commit];
        [b.last release];
        b.last = [commands retain];
    }
}

const char * backend_name(ggml_backend_t backend) {
    return of(backend).device->name.c_str();
}

void backend_synchronize(ggml_backend_t backend) {
    @autoreleasepool {
        auto & b = of(backend);
        [b.last waitUntilCompleted];
        [b.last release];
        b.last = nil;
    }
}

void backend_free(ggml_backend_t backend) {
    backend_synchronize(backend);
    delete &of(backend);
    delete (qcache_abi_backend *) backend;
}

enum ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto &                 b     = of(backend);
    const qcache_abi_graph given = *(qcache_abi_graph *) graph; // ggml's encodes it before it returns
    submit(b, [&](id<MockCommandBuffer> commands) {
        [commands encodeHost:[cpu = b.cpu.get(), given]() mutable {
            return ggml_backend_graph_compute(cpu, (ggml_cgraph *) &given) == GGML_STATUS_SUCCESS;
        }];
    });
    return GGML_STATUS_SUCCESS;
}

void backend_record(ggml_backend_t backend, ggml_backend_event_t event) {
    auto & e = *(event_layout *) ((qcache_abi_event *) event)->context;
    submit(of(backend), [&](id<MockCommandBuffer> commands) { [commands encodeSignalEvent:e.event value:(uint64_t) ++e.value]; });
}

void backend_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    auto & e = *(event_layout *) ((qcache_abi_event *) event)->context;
    submit(of(backend), [&](id<MockCommandBuffer> commands) { [commands encodeWaitForEvent:e.event value:(uint64_t) e.value.load()]; });
}

ggml_guid_t backend_guid() {
    static ggml_guid guid = { 0x6d, 0x6f, 0x63, 0x6b };
    return &guid;
}

//
// device
//

const char * device_name(ggml_backend_dev_t device) {
    return of(device).name.c_str();
}

const char * device_description(ggml_backend_dev_t) {
    return "mock of a Metal device";
}

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = (size_t) 8 << 30;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = device_name(device);
    props->description = device_description(device);
    props->type        = device_type(device);
    device_memory(device, &props->memory_free, &props->memory_total);
    props->caps.async  = true;
    props->caps.events = true;
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char *) {
    auto * b = new mock_backend{ ggml_backend_ptr(ggml_backend_cpu_init()), &of(device) };
    ggml_backend_cpu_set_n_threads(b->cpu.get(), 1);
    auto * backend         = new qcache_abi_backend();
    backend->guid          = backend_guid();
    backend->get_name      = backend_name;
    backend->free          = backend_free;
    backend->synchronize   = backend_synchronize;
    backend->graph_compute = backend_compute;
    backend->event_record  = backend_record;
    backend->event_wait    = backend_wait;
    backend->device        = device;
    backend->context       = b;
    return (ggml_backend_t) backend;
}

ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t device) {
    return (ggml_backend_buffer_type_t) &of(device).buft;
}

std::string & refused() {
    static auto * the = new std::string();
    return *the;
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * node) {
    return node->op != GGML_OP_CUSTOM && refused() != ggml_op_name(node->op) && ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), node);
}

bool device_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft) {
    return buft == device_buft(device);
}

ggml_backend_event_t device_event_new(ggml_backend_dev_t device) {
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
        return event == nil ? nullptr : (ggml_backend_event_t) new qcache_abi_event{ device, new event_layout{ event, { p.events == p.other_counter ? 7 : 0 } } };
    }
}

void device_event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    auto * e = (event_layout *) ((qcache_abi_event *) event)->context;
    [e->event release];
    delete e;
    delete (qcache_abi_event *) event;
}

void device_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t) {
    abort(); // nobody's part here
}

//
// registry
//

mock_device * devices() {
    static mock_device * the = new mock_device[metal_mock::N_DEVICES]();
    return the;
}

const char * reg_name(ggml_backend_reg_t) {
    return "MTL";
}

size_t reg_count(ggml_backend_reg_t) {
    return 2;
}

ggml_backend_dev_t reg_get(ggml_backend_reg_t, size_t i) {
    return metal_mock::ggml_device((int) i);
}

void * reg_proc_address(ggml_backend_reg_t, const char *) {
    return nullptr;
}

struct registration {
    registration() {
        static qcache_abi_reg reg = { QCACHE_GGML_BACKEND_API, reg_name, reg_count, reg_get, reg_proc_address, nullptr };
        id<MTLCommandQueue>   queue = mock_new_stock_queue(); // one of the device's, as ggml has it
        for (int i = 0; i < metal_mock::N_DEVICES; i++) {
            mock_device & d      = devices()[i];
            d.get_name           = device_name;
            d.get_description    = device_description;
            d.get_memory         = device_memory;
            d.get_type           = device_type;
            d.get_props          = device_props;
            d.init_backend       = device_init;
            d.get_buffer_type    = device_buft;
            d.supports_op        = device_supports_op;
            d.supports_buft      = device_supports_buft;
            d.event_new          = device_event_new;
            d.event_free         = device_event_free;
            d.event_synchronize  = device_event_synchronize;
            d.reg                = (ggml_backend_reg_t) &reg;
            d.name               = "MTL" + std::to_string(i);
            d.buft_name          = d.name + (i == 1 ? "_Private" : "");
            d.buft               = { buft_name, buft_alloc, buft_alignment, nullptr, nullptr, buft_is_host, (ggml_backend_dev_t) &d, nullptr };
            d.queue              = queue;
        }
        ggml_backend_register((ggml_backend_reg_t) &reg);
    }
} registered;

} // namespace

ggml_backend_dev_t metal_mock::ggml_device(int i) {
    return (ggml_backend_dev_t) &devices()[i];
}

void metal_mock::refuse(const char * op_name) {
    refused() = op_name;
}

extern "C" __attribute__((visibility("default"))) void metal_mock_refuse(const char * op_name) { // for the Python tests
    metal_mock::refuse(op_name);
}
