// qcache-ggml-abi.h: what ggml 0.25.3 keeps to itself and a backend from outside has to know
//
// ggml installs no header for those who write backends. These are the layouts of its backend interface, version 2, and of
// a graph, under names of our own; qcache_ggml_abi_check() compares the version at run time, and the library loads with
// no other ggml anyway (qcache_check_ggml_version).

#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <cstring>

constexpr int QCACHE_GGML_BACKEND_API = 2;

// a registry, as ggml_backend_reg_t points to it
struct qcache_abi_reg {
    int api_version;
    const char * (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t);
    void * (*get_proc_address)(ggml_backend_reg_t, const char *);
    void * context;
};

// a device, as ggml_backend_dev_t points to it
struct qcache_abi_device {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t * free, size_t * total);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char * params);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t);                   // may be NULL
    ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t, void *, size_t, size_t); // may be NULL
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    bool (*offload_op)(ggml_backend_dev_t, const ggml_tensor *);                              // may be NULL
    ggml_backend_event_t (*event_new)(ggml_backend_dev_t);                                    // these three may be NULL
    void (*event_free)(ggml_backend_dev_t, ggml_backend_event_t);
    void (*event_synchronize)(ggml_backend_dev_t, ggml_backend_event_t);
    ggml_backend_reg_t reg;
    void *             context;
};

// a stream, as ggml_backend_t points to it; everything but name, free and compute may be NULL
struct qcache_abi_backend {
    ggml_guid_t guid;
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void (*set_tensor_async)(ggml_backend_t, ggml_tensor *, const void *, size_t offset, size_t size);
    void (*get_tensor_async)(ggml_backend_t, const ggml_tensor *, void *, size_t offset, size_t size);
    void (*set_tensor_2d_async)(ggml_backend_t, ggml_tensor *, const void *, size_t, size_t, size_t, size_t, size_t);
    void (*get_tensor_2d_async)(ggml_backend_t, const ggml_tensor *, void *, size_t, size_t, size_t, size_t, size_t);
    bool (*cpy_tensor_async)(ggml_backend_t src_backend, ggml_backend_t dst_backend, const ggml_tensor * src, ggml_tensor * dst);
    void (*synchronize)(ggml_backend_t);
    void * (*graph_plan_create)(ggml_backend_t, const ggml_cgraph *);
    void (*graph_plan_free)(ggml_backend_t, void *);
    void (*graph_plan_update)(ggml_backend_t, void *, const ggml_cgraph *);
    enum ggml_status (*graph_plan_compute)(ggml_backend_t, void *);
    enum ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    void (*event_record)(ggml_backend_t, ggml_backend_event_t);
    void (*event_wait)(ggml_backend_t, ggml_backend_event_t);
    void (*graph_optimize)(ggml_backend_t, ggml_cgraph *, void * params);
    ggml_backend_dev_t device;
    void *             context;
};

// an event; context is the wrapped runtime's own, a cudaEvent_t for one
struct qcache_abi_event {
    ggml_backend_dev_t device;
    void *             context;
};

// A part of a graph that shares the whole's hash table and use counts, by which backends decide what they may fuse.
struct qcache_abi_graph {
    int            size;
    int            n_nodes;
    int            n_leafs;
    ggml_tensor ** nodes;
    ggml_tensor ** grads;
    ggml_tensor ** grad_accs;
    ggml_tensor ** leafs;
    int32_t *      use_counts;
    struct {
        size_t         size;
        uint32_t *     used;
        ggml_tensor ** keys;
    } visited;
    int      order;
    uint64_t uid;
};

extern "C" qcache_abi_graph ggml_graph_view(ggml_cgraph * graph, int first, int end); // exported by ggml-base

// function and user data of a GGML_OP_CUSTOM node
struct qcache_abi_custom {
    ggml_custom_op_t fun;
    int              n_tasks;
    void *           userdata;
};

inline qcache_abi_custom qcache_abi_custom_of(const ggml_tensor * node) {
    qcache_abi_custom custom;
    static_assert(sizeof(custom) <= sizeof(node->op_params), "a custom node keeps its function in op_params");
    memcpy(&custom, node->op_params, sizeof(custom));
    return custom;
}

inline bool qcache_ggml_abi_check(ggml_backend_dev_t device) {
    const auto * reg = (const qcache_abi_reg *) ggml_backend_dev_backend_reg(device);
    return reg != nullptr && reg->api_version == QCACHE_GGML_BACKEND_API;
}
