// qcache-model.cpp: reads the weights of a GGUF into backend buffers
//
// Each weight goes to the device that computes its layer. On the CPU quantised matrices are packed for our own products
// where it has the instructions (qcache-matmul.h). The others go to its extra buffer types (CPU_REPACK) where ggml can
// multiply them there, the rest to the plain CPU buffer: without repacking, quantised prefill is several times slower. AMX,
// an extra buffer type as well, comes before all of these. Token embeddings stay with the host, which looks them up.

#include "qcache-model.h"

#include "qcache-backend.h"
#include "qcache-matmul.h"
#include "qcache-probe.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>
#include <tuple>

#ifdef _WIN32
#    define fseeko _fseeki64
#    define ftello _ftelli64
#endif

namespace {

struct file_closer {
    void operator()(FILE * file) const { fclose(file); }
};

using file_ptr = std::unique_ptr<FILE, file_closer>;

// how a weight is used decides where it can live
enum class weight_use { host, elementwise, matmul };

// where a weight lives; packed for our own products, it is in the CPU's plain buffer type
struct weight_home {
    ggml_backend_buffer_type_t   buft;
    const qcache_matmul_kernel * kernel; // NULL: not packed

    bool operator<(const weight_home & other) const { return std::tie(buft, kernel) < std::tie(other.buft, other.kernel); }
};

// rows as the file has them
void set_rows(ggml_tensor * tensor, const void * rows) {
    if (qcache_matmul_is_packed(tensor)) {
        qcache_matmul_set(tensor, rows);
    } else {
        ggml_backend_tensor_set(tensor, rows, 0, ggml_nbytes(tensor));
    }
}

struct loader {
    const char *                path;
    gguf_context *              gguf = nullptr;
    ggml_context *              meta = nullptr; // the file's tensors, without data
    FILE *                      file = nullptr;
    qcache_model &              model;
    struct qcache_model_params  params;
    ggml_backend_dev_t          cpu;
    std::vector<ggml_backend_buffer_type_t> extra_bufts; // of the CPU
    const qcache_placement *    place = nullptr; // of the weights that are being planned

    struct job {
        ggml_tensor * tensor;
        int64_t       id; // in gguf
    };
    std::vector<job>                                          jobs;
    std::map<weight_home, ggml_context *>                     ctx_of_home;
    std::vector<bool>                                         seen; // by gguf tensor id
    enum qcache_status                                        status = QCACHE_STATUS_SUCCESS;

    weight_home home_for(weight_use use, const ggml_tensor * shape) const {
        if (use == weight_use::host) {
            return { ggml_backend_dev_buffer_type(cpu), nullptr };
        }
        if (use == weight_use::matmul && params.use_extra_bufts && !place->is_gpu) {
            const qcache_matmul_kernel * kernel = qcache_matmul_kernel_for(shape->type, shape->ne[0], shape->ne[1]);
            for (auto buft : extra_bufts) {
                const bool is_repack = strcmp(ggml_backend_buft_name(buft), "CPU_REPACK") == 0;
                if (!(kernel != nullptr && is_repack) && qcache_supports_matmul(cpu, buft, shape) && qcache_buft_works(buft)) {
                    return { buft, nullptr };
                }
            }
            if (kernel != nullptr) {
                return { ggml_backend_dev_buffer_type(cpu), kernel };
            }
        }
        return { ggml_backend_dev_buffer_type(place->device), nullptr };
    }

    ggml_context * ctx_for(const weight_home & home) {
        auto it = ctx_of_home.find(home);
        if (it == ctx_of_home.end()) {
            const size_t n = (size_t) gguf_get_n_tensors(gguf) + 1 + model.placements.size(); // output may double tok_embd
            model.ctxs.emplace_back(ggml_init({ ggml_tensor_overhead() * n, nullptr, true }));
            if (!model.ctxs.back()) {
                throw std::bad_alloc();
            }
            it = ctx_of_home.emplace(home, model.ctxs.back().get()).first;
        }
        return it->second;
    }

    // the file's tensor of that name with the given shape, to be read later; NULL when there is none and it is optional
    ggml_tensor * weight(const std::string & name, weight_use use, bool required, int64_t ne0, int64_t ne1 = 1) {
        if (status != QCACHE_STATUS_SUCCESS) {
            return nullptr;
        }
        const int64_t id = gguf_find_tensor(gguf, name.c_str());
        if (id < 0) {
            if (required) {
                status = qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: tensor %s is missing", path, name.c_str());
            }
            return nullptr;
        }
        const ggml_tensor * shape = ggml_get_tensor(meta, name.c_str());
        if (shape->ne[0] != ne0 || shape->ne[1] != ne1 || shape->ne[2] != 1 || shape->ne[3] != 1) {
            status = qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: tensor %s is [%lld, %lld, %lld, %lld], expected [%lld, %lld]", path,
                                 name.c_str(), (long long) shape->ne[0], (long long) shape->ne[1], (long long) shape->ne[2],
                                 (long long) shape->ne[3], (long long) ne0, (long long) ne1);
            return nullptr;
        }
        const bool is_matrix = use == weight_use::matmul || shape == ggml_get_tensor(meta, "token_embd.weight");
        if (!is_matrix && shape->type != GGML_TYPE_F32) {
            status = qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: tensor %s is of type %s, expected f32", path, name.c_str(),
                                 ggml_type_name(shape->type));
            return nullptr;
        }
        if (is_matrix && ggml_get_type_traits_cpu(shape->type)->vec_dot == nullptr) {
            // ggml aborts the process on these, integers and formats of activations, once they are computed with
            status = qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: tensor %s is of type %s, which a matrix of weights cannot have", path,
                                 name.c_str(), ggml_type_name(shape->type));
            return nullptr;
        }
        const weight_home home = home_for(use, shape);
        if (use == weight_use::matmul && place->is_gpu && !qcache_supports_matmul(place->device, home.buft, shape)) {
            status = qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: tensor %s is of type %s, with which %s cannot multiply", path, name.c_str(),
                                 ggml_type_name(shape->type), ggml_backend_dev_name(place->device));
            return nullptr;
        }
        ggml_tensor * tensor = ggml_dup_tensor(ctx_for(home), shape);
        ggml_set_name(tensor, name.c_str());
        if (home.kernel != nullptr) {
            qcache_matmul_make_packed(tensor, home.kernel);
        }
        seen[id] = true;
        jobs.push_back({ tensor, id });
        model.n_params += ggml_nelements(tensor);
        model.n_bytes_gpu += place->is_gpu && use != weight_use::host ? ggml_nbytes(tensor) : 0;
        return tensor;
    }

    std::string blk(int32_t il, const char * name) const { return "blk." + std::to_string(il) + "." + name; }

    void plan() {
        const auto &  hp     = model.hparams;
        const int64_t n_embd = hp.n_embd;
        const int64_t n_q    = (int64_t) hp.n_head * hp.head_dim;
        const int64_t n_kv   = (int64_t) hp.n_head_kv * hp.head_dim;

        place             = &model.placements.back();
        model.tok_embd    = weight("token_embd.weight", weight_use::host, true, n_embd, hp.n_vocab);
        model.output_norm = weight("output_norm.weight", weight_use::elementwise, true, n_embd);
        model.output      = weight("output.weight", weight_use::matmul, false, n_embd, hp.n_vocab);
        model.output_bias = weight("output.bias", weight_use::elementwise, false, hp.n_vocab);
        if (status == QCACHE_STATUS_SUCCESS && model.output == nullptr) {
            model.output = weight("token_embd.weight", weight_use::matmul, true, n_embd, hp.n_vocab);
            if (model.output != nullptr) {
                model.n_params -= ggml_nelements(model.output);
            }
        }
        for (auto & placement : model.placements) {
            place                = &placement;
            placement.rope_freqs = weight("rope_freqs.weight", weight_use::elementwise, false, hp.n_rot / 2);
            if (placement.rope_freqs != nullptr && &placement != &model.placements.front()) {
                model.n_params -= ggml_nelements(placement.rope_freqs); // counted once
            }
        }
        model.layers.resize(hp.n_layer);
        place = &model.placements.front();
        for (int32_t il = 0; il < hp.n_layer; il++) {
            place += il == place->end;
            auto &     layer    = model.layers[il];
            const bool attends  = hp.lazy_leader[il] != QCACHE_LEADER_NONE;
            const bool needs_qk = attends && (hp.lazy_mode != QCACHE_LAZY_MODE_GLOBAL || hp.lazy_leader[il] == il);

            layer.attn_norm = weight(blk(il, "attn_norm.weight"), weight_use::elementwise, attends, n_embd);
            layer.wq        = weight(blk(il, "attn_q.weight"), weight_use::matmul, needs_qk, n_embd, n_q);
            layer.wk        = weight(blk(il, "attn_k.weight"), weight_use::matmul, needs_qk, n_embd, n_kv);
            layer.wv        = weight(blk(il, "attn_v.weight"), weight_use::matmul, attends, n_embd, n_kv);
            layer.wo        = weight(blk(il, "attn_output.weight"), weight_use::matmul, attends, n_q, n_embd);
            layer.bq        = weight(blk(il, "attn_q.bias"), weight_use::elementwise, false, n_q);
            layer.bk        = weight(blk(il, "attn_k.bias"), weight_use::elementwise, false, n_kv);
            layer.bv        = weight(blk(il, "attn_v.bias"), weight_use::elementwise, false, n_kv);
            layer.bo        = weight(blk(il, "attn_output.bias"), weight_use::elementwise, false, n_embd);
            layer.vis_bias  = weight(blk(il, "attn_vis_bias.weight"), weight_use::host, false, hp.n_head);
            layer.ffn_norm  = weight(blk(il, "ffn_norm.weight"), weight_use::elementwise, true, n_embd);
            layer.ffn_gate  = weight(blk(il, "ffn_gate.weight"), weight_use::matmul, true, n_embd, hp.n_ff);
            layer.ffn_up    = weight(blk(il, "ffn_up.weight"), weight_use::matmul, true, n_embd, hp.n_ff);
            layer.ffn_down  = weight(blk(il, "ffn_down.weight"), weight_use::matmul, true, hp.n_ff, n_embd);
        }
        for (int64_t id = 0; id < gguf_get_n_tensors(gguf) && status == QCACHE_STATUS_SUCCESS; id++) {
            if (!seen[id]) {
                // running on without a weight that changes the result would give wrong answers silently
                status = qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: tensor %s is not one that architecture '%s' has", path,
                                     gguf_get_tensor_name(gguf, id), hp.architecture.c_str());
            }
        }
    }

    enum qcache_status allocate() {
        for (auto & [home, ctx] : ctx_of_home) {
            const ggml_backend_buffer_type_t buft = home.buft;
            ggml_backend_buffer_ptr          buffer{ ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
            if (!buffer) {
                return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "%s: cannot allocate %zu bytes of %s for weights", path,
                                   ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, buft), ggml_backend_buft_name(buft));
            }
            ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            const size_t size = ggml_backend_buffer_get_size(buffer.get());
            model.n_bytes += size;
            if (home.kernel != nullptr || std::find(extra_bufts.begin(), extra_bufts.end(), buft) != extra_bufts.end()) {
                model.n_bytes_extra += size;
            }
            model.buffers.push_back(std::move(buffer));
        }
        return QCACHE_STATUS_SUCCESS;
    }

    enum qcache_status read() {
        const size_t data_offset = gguf_get_data_offset(gguf);
        size_t       total       = 0;
        for (const auto & j : jobs) {
            total += ggml_nbytes(j.tensor);
        }
        size_t               done = 0;
        std::vector<uint8_t> staging; // for buffers that convert what they are given
        for (const auto & j : jobs) {
            const size_t offset = data_offset + gguf_get_tensor_offset(gguf, j.id);
            const size_t size   = ggml_nbytes(j.tensor);
            const bool   direct = j.tensor->buffer != nullptr && !qcache_matmul_is_packed(j.tensor) &&
                                  ggml_backend_buffer_get_type(j.tensor->buffer) == ggml_backend_dev_buffer_type(cpu);
            if (!direct) {
                staging.resize(size);
            }
            void * target = direct ? j.tensor->data : staging.data();
            if (fseeko(file, (off_t) offset, SEEK_SET) != 0 || fread(target, 1, size, file) != size) {
                return qcache_fail(QCACHE_STATUS_FILE, "%s: cannot read %zu bytes of tensor %s at offset %zu", path, size,
                                   j.tensor->name, offset);
            }
            if (!direct) {
                set_rows(j.tensor, staging.data());
            }
            done += size;
            if (params.progress && !params.progress((float) ((double) done / (double) total), params.progress_user_data)) {
                return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "%s: cancelled", path);
            }
        }
        return QCACHE_STATUS_SUCCESS;
    }
};

enum qcache_status check_file_size(const char * path, FILE * file, const gguf_context * gguf) {
    fseeko(file, 0, SEEK_END);
    const size_t size  = (size_t) ftello(file);
    const size_t start = gguf_get_data_offset(gguf);
    for (int64_t id = 0; id < gguf_get_n_tensors(gguf); id++) {
        const size_t end = start + gguf_get_tensor_offset(gguf, id) + gguf_get_tensor_size(gguf, id);
        if (end > size) {
            return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s is truncated: tensor %s ends at byte %zu, the file at %zu", path,
                               gguf_get_tensor_name(gguf, id), end, size);
        }
    }
    return QCACHE_STATUS_SUCCESS;
}

// Which device computes which layers: the last n_gpu_layers on the GPU, but no Lazy Block is torn, since its lazy layers
// read the leader's K.
enum qcache_status place_layers(const struct qcache_model_params & params, ggml_backend_dev_t cpu, qcache_model & model) {
    const auto & hp = model.hparams;
    if (params.n_gpu_layers == 0) {
        model.placements = { { cpu, 0, hp.n_layer, false } };
        return QCACHE_STATUS_SUCCESS;
    }
    const int n_devices = qcache_backend_count();
    if (n_devices == 0) {
        std::string found;
        for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
            found += std::string(i > 0 ? ", " : "") + ggml_backend_dev_name(ggml_backend_dev_get(i));
        }
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "n_gpu_layers is %d, but of ggml's devices (%s) none is a GPU",
                           params.n_gpu_layers, found.c_str());
    }
    if (params.main_gpu < 0 || params.main_gpu >= n_devices) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "main_gpu is %d, there are %d GPUs", params.main_gpu, n_devices);
    }
    const ggml_backend_dev_t gpu = qcache_backend_device(qcache_backend_get(params.main_gpu));
    if (gpu == nullptr) {
        return QCACHE_STATUS_UNSUPPORTED; // qcache_last_error() says why
    }
    int32_t first = params.n_gpu_layers < 0 ? 0 : std::max(0, hp.n_layer - params.n_gpu_layers);
    const auto torn = [&](int32_t at) {
        return std::any_of(hp.lazy_leader.begin() + at, hp.lazy_leader.end(), [&](int32_t leader) { return leader >= 0 && leader < at; });
    };
    while (torn(first)) {
        first++;
    }
    if (first > 0) {
        model.placements.push_back({ cpu, 0, first, false });
    }
    if (first < hp.n_layer) {
        model.placements.push_back({ gpu, first, hp.n_layer, true });
    }
    return QCACHE_STATUS_SUCCESS;
}

enum qcache_status load(const char * path, struct qcache_model_params params, qcache_model & model) {
    file_ptr file{ fopen(path, "rb") };
    if (!file) {
        return qcache_fail(QCACHE_STATUS_FILE, "%s: %s", path, strerror(errno));
    }
    char         magic[4] = { 0 };
    const size_t n_magic  = fread(magic, 1, sizeof(magic), file.get());
    if (ferror(file.get())) {
        return qcache_fail(QCACHE_STATUS_FILE, "%s: %s", path, strerror(errno)); // a directory, for one
    }
    if (n_magic != sizeof(magic) || memcmp(magic, "GGUF", 4) != 0) {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s is not a GGUF file: it starts with bytes %02x %02x %02x %02x", path,
                           (unsigned char) magic[0], (unsigned char) magic[1], (unsigned char) magic[2], (unsigned char) magic[3]);
    }
    ggml_context *   meta = nullptr;
    gguf_context_ptr gguf{ gguf_init_from_file(path, { true, &meta }) };
    ggml_context_ptr meta_owner{ meta };
    if (!gguf) {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: the GGUF header is truncated or damaged", path);
    }
    enum qcache_status status = qcache_hparams_read(gguf.get(), path, model.hparams);
    if (status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    status = check_file_size(path, file.get(), gguf.get());
    if (status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    const ggml_tensor * embd = ggml_get_tensor(meta, "token_embd.weight");
    if (embd == nullptr) {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: tensor token_embd.weight is missing", path);
    }
    model.hparams.n_vocab = (int32_t) embd->ne[1];

    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (cpu == nullptr) {
        return qcache_fail(QCACHE_STATUS_INTERNAL, "ggml has no CPU device");
    }
    status = place_layers(params, cpu, model);
    if (status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    loader l{ path, gguf.get(), meta, file.get(), model, params, cpu, qcache_extra_bufts(cpu), nullptr, {}, {}, {} };
    l.seen.resize(gguf_get_n_tensors(gguf.get()));

    l.plan();
    if (l.status != QCACHE_STATUS_SUCCESS) {
        return l.status;
    }
    status = l.allocate();
    return status == QCACHE_STATUS_SUCCESS ? l.read() : status;
}

} // namespace

struct qcache_model_params qcache_model_default_params(void) {
    return { true, nullptr, nullptr, 0, 0 };
}

enum qcache_status qcache_model_init(const char * path, struct qcache_model_params params, qcache_model_t ** model) {
    if (model == nullptr || path == nullptr) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "path and model must not be NULL");
    }
    *model = nullptr;
    enum qcache_status status = qcache_check_ggml_version(ggml_version());
    if (status != QCACHE_STATUS_SUCCESS) {
        return status;
    }
    try {
        auto loaded = std::make_unique<qcache_model>();
        status      = load(path, params, *loaded);
        if (status == QCACHE_STATUS_SUCCESS) {
            *model = loaded.release();
        }
        return status;
    } catch (const std::bad_alloc &) {
        return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "%s: out of memory", path);
    } catch (const std::exception & e) {
        return qcache_fail(QCACHE_STATUS_INTERNAL, "%s: %s", path, e.what());
    }
}

void qcache_model_free(qcache_model_t * model) {
    delete model;
}

enum qcache_status qcache_model_set_weight(qcache_model_t * model, const char * name, const float * values, size_t n_values) {
    if (model == nullptr || name == nullptr || values == nullptr) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "model, name and values must not be NULL");
    }
    std::vector<ggml_tensor *> tensors; // two where the output matrix is the token embeddings'
    for (const auto & ctx : model->ctxs) {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
            if (strcmp(t->name, name) == 0) {
                tensors.push_back(t);
            }
        }
    }
    if (tensors.empty()) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "the model has no weight %s", name);
    }
    const ggml_tensor * shape = tensors[0];
    if ((size_t) ggml_nelements(shape) != n_values) {
        return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "n_values is %zu, %s has %lld", n_values, name, (long long) ggml_nelements(shape));
    }
    if (ggml_quantize_requires_imatrix(shape->type)) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s is of type %s, which is only written with an importance matrix", name,
                           ggml_type_name(shape->type));
    }
    for (size_t i = 0; i < n_values; i++) {
        if (!std::isfinite(values[i])) {
            return qcache_fail(QCACHE_STATUS_INVALID_ARGUMENT, "value %zu of %zu for %s is %g", i, n_values, name, values[i]);
        }
    }
    try {
        std::vector<uint8_t> rounded(ggml_nbytes(shape));
        ggml_quantize_chunk(shape->type, values, rounded.data(), 0, ggml_nrows(shape), shape->ne[0], nullptr);
        for (ggml_tensor * tensor : tensors) {
            set_rows(tensor, rounded.data());
        }
        return QCACHE_STATUS_SUCCESS;
    } catch (const std::bad_alloc &) {
        return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "out of memory for %s", name);
    }
}

struct qcache_model_info qcache_model_get_info(const qcache_model_t * model) {
    const auto & hp = model->hparams;

    struct qcache_model_info info;
    info.architecture  = hp.architecture.c_str();
    info.n_layer       = hp.n_layer;
    info.n_embd        = hp.n_embd;
    info.n_head        = hp.n_head;
    info.n_head_kv     = hp.n_head_kv;
    info.head_dim      = hp.head_dim;
    info.n_vocab       = hp.n_vocab;
    info.n_ctx_train   = hp.n_ctx_train;
    info.n_params      = model->n_params;
    info.n_bytes       = model->n_bytes;
    info.n_bytes_extra = model->n_bytes_extra;
    info.n_bytes_gpu   = model->n_bytes_gpu;
    info.n_gpu_layers  = 0;
    info.gpu           = nullptr;
    if (const auto & last = model->placements.back(); last.is_gpu) {
        info.n_gpu_layers = last.end - last.first;
        info.gpu          = ggml_backend_dev_name(qcache_backend_wrapped(last.device));
    }
    info.lazy_mode     = hp.lazy_mode;
    info.lazy_leader   = hp.lazy_leader.data();
    return info;
}
