// qcache-gguf.cpp: hyper-parameters and lazy keys of a GGUF, validated
//
// gguf's typed getters abort on a key of another type, so every read here checks the type first.

#include "qcache-model.h"

#include <ggml.h>

#include <cmath>
#include <cstring>

namespace {

struct reader {
    const gguf_context * gguf;
    const char *         path;
    std::string          arch;

    // "%s" in the name stands for the architecture
    std::string full(const char * name) const {
        return strncmp(name, "%s", 2) == 0 ? arch + (name + 2) : std::string(name);
    }

    enum qcache_status missing(const char * name) const {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: key %s is missing", path, full(name).c_str());
    }

    enum qcache_status wrong_type(const char * name, int64_t id, const char * expected) const {
        const bool array = gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY;
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: key %s is of type %s%s, expected %s", path, full(name).c_str(),
                           gguf_type_name(array ? gguf_get_arr_type(gguf, id) : gguf_get_kv_type(gguf, id)), array ? "[]" : "", expected);
    }

    // a positive count; `fallback` < 0: the key must be there
    enum qcache_status count(const char * name, int32_t & value, int32_t fallback) const {
        const int64_t id = gguf_find_key(gguf, full(name).c_str());
        if (id < 0) {
            value = fallback;
            return fallback < 0 ? missing(name) : QCACHE_STATUS_SUCCESS;
        }
        int64_t v;
        switch (gguf_get_kv_type(gguf, id)) {
            case GGUF_TYPE_UINT32: v = gguf_get_val_u32(gguf, id); break;
            case GGUF_TYPE_INT32:  v = gguf_get_val_i32(gguf, id); break;
            case GGUF_TYPE_UINT64: v = (int64_t) gguf_get_val_u64(gguf, id); break;
            case GGUF_TYPE_UINT16: v = gguf_get_val_u16(gguf, id); break;
            default:               return wrong_type(name, id, "u32");
        }
        if (v < 1 || v > INT32_MAX / 4) {
            return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: key %s is %lld, which is out of range", path, full(name).c_str(), (long long) v);
        }
        value = (int32_t) v;
        return QCACHE_STATUS_SUCCESS;
    }

    enum qcache_status real(const char * name, float & value, bool required) const {
        const int64_t id = gguf_find_key(gguf, full(name).c_str());
        if (id < 0) {
            return required ? missing(name) : QCACHE_STATUS_SUCCESS;
        }
        switch (gguf_get_kv_type(gguf, id)) {
            case GGUF_TYPE_FLOAT32: value = gguf_get_val_f32(gguf, id); break;
            case GGUF_TYPE_FLOAT64: value = (float) gguf_get_val_f64(gguf, id); break;
            default:                return wrong_type(name, id, "f32");
        }
        if (!std::isfinite(value) || value < 0.0f) {
            return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: key %s is %g, which is out of range", path, full(name).c_str(), value);
        }
        return QCACHE_STATUS_SUCCESS;
    }

    enum qcache_status string(const char * name, std::string & value, bool required) const {
        const int64_t id = gguf_find_key(gguf, full(name).c_str());
        if (id < 0) {
            return required ? missing(name) : QCACHE_STATUS_SUCCESS;
        }
        if (gguf_get_kv_type(gguf, id) != GGUF_TYPE_STRING) {
            return wrong_type(name, id, "str");
        }
        value = gguf_get_val_str(gguf, id);
        return QCACHE_STATUS_SUCCESS;
    }
};

#define TRY(expr)                                     \
    do {                                              \
        const enum qcache_status try_status = (expr); \
        if (try_status != QCACHE_STATUS_SUCCESS) {    \
            return try_status;                        \
        }                                             \
    } while (0)

enum qcache_status read_rope(const reader & r, qcache_hparams & hp) {
    hp.rope_type = hp.architecture == "llama" ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX;
    TRY(r.count("%s.rope.dimension_count", hp.n_rot, hp.head_dim));
    if (hp.n_rot > hp.head_dim || hp.n_rot % 2 != 0) {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: key %s is %d, expected an even number up to head_dim %d", r.path,
                           r.full("%s.rope.dimension_count").c_str(), hp.n_rot, hp.head_dim);
    }
    TRY(r.real("%s.rope.freq_base", hp.rope_freq_base, false));
    if (hp.rope_freq_base == 0.0f) {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: key %s is 0, which is out of range", r.path, r.full("%s.rope.freq_base").c_str());
    }

    std::string type = "linear";
    float       factor = 0.0f;
    TRY(r.string("%s.rope.scaling.type", type, false));
    TRY(r.real("%s.rope.scale_linear", factor, false)); // older files
    TRY(r.real("%s.rope.scaling.factor", factor, false));
    if (type != "none" && type != "linear" && type != "yarn") {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: rope scaling '%s' is not supported (none, linear, yarn, or Llama 3's rope_freqs are)",
                           r.path, type.c_str());
    }
    if (type != "none" && factor != 0.0f) {
        hp.rope_freq_scale = 1.0f / factor;
    }
    TRY(r.count("%s.rope.scaling.original_context_length", hp.rope_n_ctx_orig, hp.n_ctx_train));
    TRY(r.real("%s.rope.scaling.attn_factor", hp.rope_attn_factor, false));
    if (type == "yarn") {
        hp.rope_ext_factor = 1.0f;
        if (factor > 0.0f && factor < 1.0f) {
            hp.rope_attn_factor /= 1.0f + 0.1f * logf(factor); // ggml's own factor, which YaRN has above 1 only
        }
    }
    if (gguf_find_key(r.gguf, r.full("%s.rope.dimension_sections").c_str()) >= 0) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: M-RoPE (key %s) is not supported", r.path,
                           r.full("%s.rope.dimension_sections").c_str());
    }
    return QCACHE_STATUS_SUCCESS;
}

enum qcache_status read_lazy(const reader & r, qcache_hparams & hp) {
    hp.lazy_mode = QCACHE_LAZY_MODE_OFF;
    hp.lazy_leader.resize(hp.n_layer);
    for (int32_t il = 0; il < hp.n_layer; il++) {
        hp.lazy_leader[il] = il;
    }
    const char *  key    = "qcache.lazy.leader";
    const int64_t id     = gguf_find_key(r.gguf, key);
    const bool    has_mode = gguf_find_key(r.gguf, "qcache.lazy.mode") >= 0;
    if (id < 0 && !has_mode) {
        return QCACHE_STATUS_SUCCESS;
    }
    if (id < 0) {
        return r.missing(key);
    }
    int32_t version = 0;
    TRY(r.count("qcache.version", version, -1));
    if (version != 1 && version != 2) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: qcache.version is %d, this library reads versions 1 and 2", r.path, version);
    }
    std::string mode;
    TRY(r.string("qcache.lazy.mode", mode, true));
    if (mode != "visual" && mode != "global") {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: qcache.lazy.mode is '%s', expected 'visual' or 'global'", r.path, mode.c_str());
    }
    if (gguf_get_kv_type(r.gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(r.gguf, id) != GGUF_TYPE_INT32) {
        return r.wrong_type(key, id, "i32[n_layer]");
    }
    const int32_t * leader = (const int32_t *) gguf_get_arr_data(r.gguf, id);
    const size_t    n      = gguf_get_arr_n(r.gguf, id);
    const std::string source = std::string(r.path) + ": " + key;
    TRY(qcache_lazy_leader_check(leader, n, hp.n_layer, source.c_str(), QCACHE_STATUS_INVALID_MODEL));
    for (int32_t il = 0; il < hp.n_layer && version == 1; il++) {
        if (leader[il] == QCACHE_LEADER_NONE) {
            return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s[%d] is %d, a layer without attention, which version 1 of the format has not",
                               source.c_str(), il, leader[il]);
        }
    }

    hp.lazy_leader.assign(leader, leader + n);
    for (int32_t il = 0; il < hp.n_layer; il++) {
        if (hp.lazy_leader[il] != il) {
            hp.lazy_mode = mode == "visual" ? QCACHE_LAZY_MODE_VISUAL : QCACHE_LAZY_MODE_GLOBAL;
        }
    }
    return QCACHE_STATUS_SUCCESS;
}

} // namespace

enum qcache_status qcache_lazy_leader_check(const int32_t * leader, size_t n, int32_t n_layer, const char * source,
                                            enum qcache_status status) {
    if (n != (size_t) n_layer) {
        return qcache_fail(status, "%s has %zu values, the model has %d layers", source, n, n_layer);
    }
    int32_t before = -1; // the last layer with attention
    for (int32_t il = 0; il < n_layer; il++) {
        const int32_t j = leader[il];
        if (j == QCACHE_LEADER_NONE) {
            continue;
        }
        if (j < 0 || j >= n_layer) {
            return qcache_fail(status, "%s[%d] is %d, expected 0 .. %d, or %d for no attention", source, il, j, n_layer - 1, QCACHE_LEADER_NONE);
        }
        if (j > il) {
            return qcache_fail(status, "%s[%d] is %d: a leader comes before its lazy layers", source, il, j);
        }
        if (leader[j] == QCACHE_LEADER_NONE) {
            return qcache_fail(status, "%s[%d] is %d, but layer %d has no attention", source, il, j, j);
        }
        if (leader[j] != j) {
            return qcache_fail(status, "%s[%d] is %d, but layer %d is lazy itself (its leader is %d)", source, il, j, j, leader[j]);
        }
        if (j < il && leader[before] != j) {
            return qcache_fail(status, "%s[%d] is %d, but layer %d between them has leader %d: a Lazy Block is consecutive", source,
                               il, j, before, leader[before]);
        }
        before = il;
    }
    return QCACHE_STATUS_SUCCESS;
}

enum qcache_status qcache_hparams_read(const gguf_context * gguf, const char * path, qcache_hparams & hp) {
    reader r{ gguf, path, "" };
    TRY(r.string("general.architecture", hp.architecture, true));
    r.arch = hp.architecture;
    if (hp.architecture != "llama" && hp.architecture != "qwen2") {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: architecture '%s' is not supported (llama, qwen2 are)", path, hp.architecture.c_str());
    }
    TRY(r.count("%s.block_count", hp.n_layer, -1));
    TRY(r.count("%s.embedding_length", hp.n_embd, -1));
    TRY(r.count("%s.feed_forward_length", hp.n_ff, -1));
    TRY(r.count("%s.attention.head_count", hp.n_head, -1));
    TRY(r.count("%s.attention.head_count_kv", hp.n_head_kv, hp.n_head));
    TRY(r.count("%s.context_length", hp.n_ctx_train, -1));
    TRY(r.real("%s.attention.layer_norm_rms_epsilon", hp.rms_eps, true));

    if (hp.n_layer > 1024) {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: %d layers are out of range (1024)", path, hp.n_layer);
    }
    if (hp.n_head % hp.n_head_kv != 0) {
        return qcache_fail(QCACHE_STATUS_INVALID_MODEL, "%s: %d heads do not divide into %d KV heads", path, hp.n_head, hp.n_head_kv);
    }
    TRY(r.count("%s.attention.key_length", hp.head_dim, hp.n_embd / hp.n_head));
    int32_t v_length = 0;
    TRY(r.count("%s.attention.value_length", v_length, hp.head_dim));
    if (v_length != hp.head_dim) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: key length %d and value length %d differ", path, hp.head_dim, v_length);
    }
    int32_t n_expert = 0;
    if (gguf_find_key(gguf, r.full("%s.expert_count").c_str()) >= 0) {
        const int64_t id = gguf_find_key(gguf, r.full("%s.expert_count").c_str());
        n_expert         = gguf_get_kv_type(gguf, id) == GGUF_TYPE_UINT32 ? (int32_t) gguf_get_val_u32(gguf, id) : -1;
    }
    if (n_expert != 0) {
        return qcache_fail(QCACHE_STATUS_UNSUPPORTED, "%s: mixture-of-experts models are not supported", path);
    }
    TRY(read_rope(r, hp));
    return read_lazy(r, hp);
}
