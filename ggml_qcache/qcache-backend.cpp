// qcache-backend.cpp: a backend that wraps a device
//
// ggml's scheduler synchronises the host wherever a graph goes from one backend to another, so our operations on a device
// of their own would stall every layer. This backend takes the whole graph instead. Stretches of stock nodes go to
// the wrapped backend as views of the graph, which keeps the fusions it knows; our nodes go to kernels of ours, on
// the same stream or on one of our own; events order the two, and the host waits for neither.

#include "qcache-backend.h"

#include "gpu/gpu-ops.h"
#include "qcache-ggml-abi.h"
#include "qcache-impl.h"

#include <ggml-cpp.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct device_context {
    ggml_backend_dev_t   wrapped;
    const qcache_gpu_i * api;
    std::string          name;
};

struct backend_context {
    ggml_backend_ptr                wrapped;
    std::unique_ptr<qcache_gpu_ops> ops;
    std::string                     name;
    std::string                     error; // of ours in the last graph; empty: none

    // keeps what went wrong before another call writes over it
    bool check(bool ok) {
        if (!ok && error.empty()) {
            error = qcache_last_error();
        }
        return ok;
    }
};

// those that live, to be told of buffers that go; contexts are made and freed by several threads
struct live_backends {
    std::mutex                     mutex;
    std::vector<backend_context *> all;

    static live_backends & get() {
        static auto * the = new live_backends(); // buffers may outlive statics
        return *the;
    }
    void add(backend_context * b) {
        std::lock_guard<std::mutex> lock(mutex);
        all.push_back(b);
    }
    void remove(backend_context * b) {
        std::lock_guard<std::mutex> lock(mutex);
        all.erase(std::find(all.begin(), all.end(), b));
    }
};

device_context & of(ggml_backend_dev_t device) {
    return *(device_context *) ((qcache_abi_device *) device)->context;
}

backend_context & of(ggml_backend_t backend) {
    return *(backend_context *) ((qcache_abi_backend *) backend)->context;
}

const qcache_abi_backend & inside(ggml_backend_t backend) {
    return *(const qcache_abi_backend *) of(backend).wrapped.get();
}

//
// operations
//

enum class node_kind { stock, append, attn };

node_kind kind_of(const ggml_tensor * node) {
    if (node->op != GGML_OP_CUSTOM) {
        return node_kind::stock;
    }
    const ggml_custom_op_t fun = qcache_abi_custom_of(node).fun;
    return fun == qcache_op_append_cpu ? node_kind::append : fun == qcache_op_attn_cpu ? node_kind::attn : node_kind::stock;
}

// whether nodes first .. end-1 compute anything, or only give names to parts of others
bool has_work(ggml_cgraph * graph, int first, int end) {
    for (int i = first; i < end; i++) {
        const enum ggml_op op = ggml_graph_node(graph, i)->op;
        if (op != GGML_OP_NONE && op != GGML_OP_VIEW && op != GGML_OP_RESHAPE && op != GGML_OP_PERMUTE && op != GGML_OP_TRANSPOSE) {
            return true;
        }
    }
    return false;
}

bool run_stock(backend_context & b, ggml_cgraph * graph, int first, int end) {
    if (!has_work(graph, first, end)) {
        return true;
    }
    qcache_abi_graph view = ggml_graph_view(graph, first, end);
    return ggml_backend_graph_compute_async(b.wrapped.get(), (ggml_cgraph *) &view) == GGML_STATUS_SUCCESS;
}

enum ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    backend_context & b = of(backend);
    const int         n = ggml_graph_n_nodes(graph);

    std::vector<const qcache_attn_params *> attn;
    const qcache_attn_step *                step = nullptr;
    for (int i = 0; i < n; i++) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        const node_kind     kind = kind_of(node);
        if (kind == node_kind::attn) {
            attn.push_back(&((const qcache_attn_node *) qcache_abi_custom_of(node).userdata)->params);
            step = attn.back()->step;
        } else if (kind == node_kind::append) {
            step = ((const qcache_append_params *) qcache_abi_custom_of(node).userdata)->step;
        }
    }
    b.error.clear();
    bool ok     = step == nullptr || b.check(b.ops->begin(*step, attn));
    bool within = false; // a stretch of ours
    int  stock  = 0;     // first stock node that has not run
    int  i_attn = 0;
    for (int i = 0; i < n && ok; i++) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        const node_kind     kind = kind_of(node);
        if (kind == node_kind::stock) {
            continue;
        }
        // only what takes time on the other stream needs the order
        if (within && has_work(graph, stock, i)) {
            ok     = b.check(b.ops->leave());
            within = false;
        }
        ok = ok && run_stock(b, graph, stock, i);
        if (!within) {
            within = ok && b.check(b.ops->enter());
            ok     = within;
        }
        const void * userdata = qcache_abi_custom_of(node).userdata;
        if (kind == node_kind::append) {
            ok = ok && b.check(b.ops->append(*(const qcache_append_params *) userdata, node));
        } else {
            ok = ok && b.check(b.ops->attn(((const qcache_attn_node *) userdata)->params, i_attn++, node));
        }
        stock = i + 1;
    }
    // after a failure too: the next graph has to find both streams as this one did
    ok = (!within || b.check(b.ops->leave())) && ok;
    return ok && run_stock(b, graph, stock, n) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

//
// backend
//

const char * backend_name(ggml_backend_t backend) {
    return of(backend).name.c_str();
}

bool is_ours(ggml_backend_t backend) {
    return ((const qcache_abi_backend *) backend)->get_name == backend_name;
}

void backend_free(ggml_backend_t backend) {
    live_backends::get().remove(&of(backend));
    delete &of(backend);
    delete (qcache_abi_backend *) backend;
}

void backend_set_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    ggml_backend_tensor_set_async(of(backend).wrapped.get(), tensor, data, offset, size);
}

void backend_get_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    ggml_backend_tensor_get_async(of(backend).wrapped.get(), tensor, data, offset, size);
}

bool backend_copy_async(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * src, ggml_tensor * dst) {
    // the wrapped backend asks whether both are its own kind; `to` is ours, since ggml calls that one's function
    const auto unwrap = [](ggml_backend_t backend) {
        return is_ours(backend) ? of(backend).wrapped.get() : backend;
    };
    const auto copy = inside(to).cpy_tensor_async;
    return copy != nullptr && copy(unwrap(from), unwrap(to), src, dst);
}

void backend_synchronize(ggml_backend_t backend) {
    of(backend).check(of(backend).ops->synchronize());
    ggml_backend_synchronize(of(backend).wrapped.get());
}

void backend_event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    ggml_backend_event_record(event, of(backend).wrapped.get());
}

void backend_event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    ggml_backend_event_wait(of(backend).wrapped.get(), event);
}

ggml_guid_t backend_guid() {
    static ggml_guid guid = { 0x71, 0x63, 0x61, 0x63, 0x68, 0x65, 0x2d, 0x6c, 0x61, 0x7a, 0x79, 0x2d, 0x61, 0x74, 0x74, 0x6e };
    return &guid;
}

//
// device
//

const char * device_name(ggml_backend_dev_t device) {
    return of(device).name.c_str();
}

const char * device_description(ggml_backend_dev_t device) {
    return ggml_backend_dev_description(of(device).wrapped);
}

void device_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    ggml_backend_dev_memory(of(device).wrapped, free, total);
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(of(device).wrapped);
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(of(device).wrapped, props);
    props->name                      = of(device).name.c_str();
    props->caps.buffer_from_host_ptr = false;
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char * params) {
    auto context     = std::make_unique<backend_context>();
    context->wrapped = ggml_backend_ptr(ggml_backend_dev_init(of(device).wrapped, params));
    if (!context->wrapped) {
        qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "device %s cannot be started", ggml_backend_dev_name(of(device).wrapped));
        return nullptr;
    }
    context->name = of(device).name;
    context->ops  = qcache_gpu_ops::init(of(device).api, context->wrapped.get());
    if (!context->ops) {
        return nullptr;
    }
    auto * backend           = new qcache_abi_backend();
    backend->guid            = backend_guid();
    backend->get_name        = backend_name;
    backend->free            = backend_free;
    backend->set_tensor_async = backend_set_async;
    backend->get_tensor_async = backend_get_async;
    backend->cpy_tensor_async = backend_copy_async;
    backend->synchronize     = backend_synchronize;
    backend->graph_compute   = backend_graph_compute;
    backend->event_record    = backend_event_record;
    backend->event_wait      = backend_event_wait;
    backend->device          = device;
    live_backends::get().add(context.get());
    backend->context         = context.release();
    return (ggml_backend_t) backend;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) {
    return ggml_backend_dev_buffer_type(of(device).wrapped);
}

ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t device) {
    return ggml_backend_dev_host_buffer_type(of(device).wrapped);
}

bool device_supports_op(ggml_backend_dev_t device, const ggml_tensor * node) {
    switch (kind_of(node)) {
        case node_kind::append: return true; // refused where it is made
        case node_kind::attn: return qcache_gpu_ops::supports(((const qcache_attn_node *) qcache_abi_custom_of(node).userdata)->params);
        default: return ggml_backend_dev_supports_op(of(device).wrapped, node);
    }
}

bool device_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft) {
    return ggml_backend_dev_supports_buft(of(device).wrapped, buft);
}

bool device_offload_op(ggml_backend_dev_t device, const ggml_tensor * node) {
    return ggml_backend_dev_offload_op(of(device).wrapped, node);
}

ggml_backend_event_t device_event_new(ggml_backend_dev_t device) {
    return ggml_backend_event_new(of(device).wrapped); // and ggml frees and awaits it through the device in it, the wrapped one
}

//
// registry
//

struct wrapping_device : qcache_abi_device { // what ggml sees comes first
    device_context own;
};

std::vector<std::unique_ptr<wrapping_device>> & devices() {
    static std::vector<std::unique_ptr<wrapping_device>> all;
    return all;
}

const char * reg_name(ggml_backend_reg_t) {
    return "qcache";
}

size_t reg_device_count(ggml_backend_reg_t) {
    return devices().size();
}

ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t i) {
    return i < devices().size() ? (ggml_backend_dev_t) devices()[i].get() : nullptr;
}

void * reg_proc_address(ggml_backend_reg_t, const char *) {
    return nullptr;
}

ggml_backend_reg_t registry() {
    static qcache_abi_reg reg = { QCACHE_GGML_BACKEND_API, reg_name, reg_device_count, reg_device, reg_proc_address, nullptr };
    return (ggml_backend_reg_t) &reg;
}

} // namespace

ggml_backend_dev_t qcache_backend_device(ggml_backend_dev_t wrapped) {
    static std::mutex           mutex; // models may be loaded by several threads
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto & device : devices()) {
        if (of((ggml_backend_dev_t) device.get()).wrapped == wrapped) {
            return (ggml_backend_dev_t) device.get();
        }
    }
    const char *         why_not = nullptr;
    const qcache_gpu_i * api     = qcache_gpu_for(wrapped, &why_not);
    if (api == nullptr) {
        return wrapped;
    }
    if (!qcache_ggml_abi_check(wrapped)) {
        qcache_fail(QCACHE_STATUS_VERSION, "device %s: its backend interface is not version %d", ggml_backend_dev_name(wrapped),
                    QCACHE_GGML_BACKEND_API);
        return nullptr;
    }
    auto device                  = std::make_unique<wrapping_device>();
    device->get_name             = device_name;
    device->get_description      = device_description;
    device->get_memory           = device_memory;
    device->get_type             = device_type;
    device->get_props            = device_props;
    device->init_backend         = device_init;
    device->get_buffer_type      = device_buffer_type;
    device->get_host_buffer_type = device_host_buffer_type;
    device->supports_op          = device_supports_op;
    device->supports_buft        = device_supports_buft;
    device->offload_op           = device_offload_op;
    device->event_new            = device_event_new;
    device->reg                  = registry();
    device->own                  = { wrapped, api, std::string("qcache-") + ggml_backend_dev_name(wrapped) };
    device->context              = &device->own;
    devices().push_back(std::move(device));
    return (ggml_backend_dev_t) devices().back().get();
}

ggml_backend_dev_t qcache_backend_wrapped(ggml_backend_dev_t device) {
    return ggml_backend_dev_backend_reg(device) == registry() ? of(device).wrapped : device;
}

const char * qcache_backend_kernels(ggml_backend_dev_t device, const char ** why_not) {
    if (qcache_backend_wrapped(device) != device) {
        return of(device).api->name;
    }
    qcache_gpu_for(device, why_not);
    return nullptr;
}

const char * qcache_backend_failed(ggml_backend_t backend) {
    return is_ours(backend) && !of(backend).error.empty() ? of(backend).error.c_str() : nullptr;
}

void qcache_backend_forget(ggml_backend_buffer_t buffer) {
    live_backends &             live = live_backends::get();
    std::lock_guard<std::mutex> lock(live.mutex);
    for (backend_context * b : live.all) {
        b->ops->forget(buffer);
    }
}

void qcache_backend_forget_all(ggml_backend_t backend) {
    if (is_ours(backend)) {
        of(backend).ops->forget(nullptr);
    }
}

static std::vector<ggml_backend_dev_t> gpus() {
    std::vector<ggml_backend_dev_t> found;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        const ggml_backend_dev_t         device  = ggml_backend_dev_get(i);
        const enum ggml_backend_dev_type type    = ggml_backend_dev_type(device);
        const char *                     why_not = nullptr;
        if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU || qcache_gpu_for(device, &why_not) != nullptr) {
            found.push_back(device);
        }
    }
    return found;
}

int qcache_backend_count() {
    return (int) gpus().size();
}

ggml_backend_dev_t qcache_backend_get(int i) {
    const auto found = gpus();
    return i >= 0 && i < (int) found.size() ? found[i] : nullptr;
}
