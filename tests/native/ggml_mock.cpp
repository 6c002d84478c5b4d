// ggml_mock.cpp: see ggml_mock.h

#include "ggml_mock.h"

#include "qcache-ggml-abi.h"

#include <ggml-cpp.h>
#include <ggml-cpu.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <sys/mman.h>
#include <unistd.h>

namespace ggml_mock {

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

struct layout_of_device : qcache_abi_device {
    std::unique_ptr<device> own;
    buft_layout             buft;
};

struct layout_of_backend : qcache_abi_backend {
    std::unique_ptr<stream> own;
    ggml_backend_ptr        cpu;
};

device & of(ggml_backend_dev_t d) {
    return *((layout_of_device *) d)->own;
}

layout_of_backend & of(ggml_backend_t b) {
    return *(layout_of_backend *) (qcache_abi_backend *) b;
}

buffer_layout & of(ggml_backend_buffer_t b) {
    return *(buffer_layout *) b;
}

//
// buffers: the pages of the last one that was freed are the next one's, as it may happen
//

size_t page_bytes(size_t size) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    return (size + page - 1) / page * page + page;
}

struct page_store {
    std::mutex                       mutex;
    std::multimap<size_t, uint8_t *> free;
};

page_store & pages() {
    static auto * the = new page_store();
    return *the;
}

void buffer_free(ggml_backend_buffer_t buffer) {
    auto &       b    = of(buffer);
    const size_t size = page_bytes(b.size);
    of(((buft_layout *) b.buft)->device).freed(b.context, size);
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
    of(((buft_layout *) buft)->device).allocated(memory, size);
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

const char * backend_name(ggml_backend_t backend) {
    return of(of(backend).device).name.c_str();
}

void backend_synchronize(ggml_backend_t backend) {
    of(backend).own->synchronize();
}

void backend_free(ggml_backend_t backend) {
    delete &of(backend);
}

enum ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto & b = of(backend);
    b.own->compute([cpu = b.cpu.get(), given = *(qcache_abi_graph *) graph]() mutable { // ggml's encode it before they return
        return ggml_backend_graph_compute(cpu, (ggml_cgraph *) &given) == GGML_STATUS_SUCCESS;
    });
    return GGML_STATUS_SUCCESS;
}

void backend_record(ggml_backend_t backend, ggml_backend_event_t event) {
    of(backend).own->record(((qcache_abi_event *) event)->context);
}

void backend_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    of(backend).own->wait(((qcache_abi_event *) event)->context);
}

ggml_guid_t backend_guid() {
    static ggml_guid guid = { 0x6d, 0x6f, 0x63, 0x6b };
    return &guid;
}

//
// device
//

const char * device_name(ggml_backend_dev_t d) {
    return of(d).name.c_str();
}

const char * device_description(ggml_backend_dev_t d) {
    return of(d).description.c_str();
}

void device_memory(ggml_backend_dev_t d, size_t * free, size_t * total) {
    of(d).queried();
    *free = *total = (size_t) 8 << 30;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t d, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = device_name(d);
    props->description = device_description(d);
    props->type        = device_type(d);
    device_memory(d, &props->memory_free, &props->memory_total);
    props->caps.async  = true;
    props->caps.events = true;
}

ggml_backend_t device_init(ggml_backend_dev_t d, const char *) {
    auto * b = new layout_of_backend();
    b->own   = of(d).new_stream();
    b->cpu.reset(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(b->cpu.get(), 1);
    b->guid          = backend_guid();
    b->get_name      = backend_name;
    b->free          = backend_free;
    b->synchronize   = backend_synchronize;
    b->graph_compute = backend_compute;
    b->event_record  = backend_record;
    b->event_wait    = backend_wait;
    b->device        = d;
    b->context       = b->own->context();
    return (ggml_backend_t) (qcache_abi_backend *) b;
}

ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t d) {
    return (ggml_backend_buffer_type_t) &((layout_of_device *) d)->buft;
}

std::string & refused() {
    static auto * the = new std::string();
    return *the;
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * node) {
    return node->op != GGML_OP_CUSTOM && refused() != ggml_op_name(node->op) &&
           ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), node);
}

bool device_supports_buft(ggml_backend_dev_t d, ggml_backend_buffer_type_t buft) {
    return buft == device_buft(d);
}

ggml_backend_event_t device_event_new(ggml_backend_dev_t d) {
    void * event = of(d).new_event();
    return event == nullptr ? nullptr : (ggml_backend_event_t) new qcache_abi_event{ d, event };
}

void device_event_free(ggml_backend_dev_t d, ggml_backend_event_t event) {
    auto * e = (qcache_abi_event *) event;
    of(d).free_event(e->context);
    delete e;
}

void device_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t) {
    abort(); // nobody's part here
}

//
// registry
//

struct registry {
    std::string                     name;
    std::vector<ggml_backend_dev_t> devices;
    size_t                          n_counted = 0;
};

registry & the_registry() {
    static auto * the = new registry();
    return *the;
}

} // namespace

void add(const char * name, std::vector<std::unique_ptr<device>> given, size_t n_counted) {
    static qcache_abi_reg reg = { QCACHE_GGML_BACKEND_API,
                                  [](ggml_backend_reg_t) { return the_registry().name.c_str(); },
                                  [](ggml_backend_reg_t) { return the_registry().n_counted; },
                                  [](ggml_backend_reg_t, size_t i) { return the_registry().devices[i]; },
                                  [](ggml_backend_reg_t, const char *) -> void * { return nullptr; },
                                  nullptr };
    the_registry().name      = name;
    the_registry().n_counted = n_counted;
    for (auto & own : given) {
        auto * d             = new layout_of_device(); // as long as the process
        d->own               = std::move(own);
        d->get_name          = device_name;
        d->get_description   = device_description;
        d->get_memory        = device_memory;
        d->get_type          = device_type;
        d->get_props         = device_props;
        d->init_backend      = device_init;
        d->get_buffer_type   = device_buft;
        d->supports_op       = device_supports_op;
        d->supports_buft     = device_supports_buft;
        d->event_new         = device_event_new;
        d->event_free        = device_event_free;
        d->event_synchronize = device_event_synchronize;
        d->reg               = (ggml_backend_reg_t) &reg;
        const auto handle    = (ggml_backend_dev_t) (qcache_abi_device *) d;
        d->buft              = { buft_name, buft_alloc, buft_alignment, nullptr, nullptr, buft_is_host, handle, nullptr };
        the_registry().devices.push_back(handle);
    }
    ggml_backend_register((ggml_backend_reg_t) &reg);
}

const std::vector<ggml_backend_dev_t> & devices() {
    return the_registry().devices;
}

void refuse(const char * op_name) {
    refused() = op_name;
}

} // namespace ggml_mock

extern "C" __attribute__((visibility("default"))) void ggml_mock_refuse(const char * op_name) { // for the Python tests
    ggml_mock::refuse(op_name);
}
