// test_context.cpp: the C API end to end on a random model made here; what the sanitizer build runs
//
// Numbers are judged by the Python tests; here a path is compared with another path of the same context, and every
// failure must leave the context as it was.

#include "check.h"
#include "qcache.h"

#include <ggml-cpp.h>
#include <ggml.h>
#include <gguf.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

static size_t n_allocations = 0; // by new, of this program and the libraries in it

[[gnu::noinline]] void * operator new(size_t size) {
    n_allocations++;
    void * p = malloc(size > 0 ? size : 1);
    if (p == nullptr) {
        throw std::bad_alloc();
    }
    return p;
}
[[gnu::noinline]] void operator delete(void * p) noexcept {
    free(p);
}
[[gnu::noinline]] void operator delete(void * p, size_t) noexcept {
    free(p);
}

namespace {

const int n_layer = 5, n_embd = 64, n_head = 4, n_head_kv = 2, head_dim = 16, n_ff = 96, n_vocab = 50;

std::string temporary(const char * name) {
    const char * dir = getenv("TMPDIR");
    return std::string(dir != nullptr ? dir : "/tmp") + "/qcache-test-" + std::to_string(getpid()) + "-" + name;
}

// a llama GGUF with random f32 weights and the given leaders; a layer without attention has none of its weights
void write_model(const std::string & path, const std::vector<int32_t> & leader, const char * mode) {
    std::mt19937                    rng(7);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    gguf_context_ptr                gguf{ gguf_init_empty() };
    ggml_context_ptr                ctx{ ggml_init({ 8u << 20, nullptr, false }) };

    gguf_set_val_str(gguf.get(), "general.architecture", "llama");
    gguf_set_val_u32(gguf.get(), "llama.block_count", n_layer);
    gguf_set_val_u32(gguf.get(), "llama.embedding_length", n_embd);
    gguf_set_val_u32(gguf.get(), "llama.feed_forward_length", n_ff);
    gguf_set_val_u32(gguf.get(), "llama.attention.head_count", n_head);
    gguf_set_val_u32(gguf.get(), "llama.attention.head_count_kv", n_head_kv);
    gguf_set_val_u32(gguf.get(), "llama.attention.key_length", head_dim);
    gguf_set_val_u32(gguf.get(), "llama.attention.value_length", head_dim);
    gguf_set_val_u32(gguf.get(), "llama.context_length", 512);
    gguf_set_val_f32(gguf.get(), "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    if (mode != nullptr) {
        gguf_set_val_u32(gguf.get(), "qcache.version", std::count(leader.begin(), leader.end(), QCACHE_LEADER_NONE) > 0 ? 2 : 1);
        gguf_set_val_str(gguf.get(), "qcache.lazy.mode", mode);
        gguf_set_arr_data(gguf.get(), "qcache.lazy.leader", GGUF_TYPE_INT32, leader.data(), leader.size());
    }
    const auto add = [&](const std::string & name, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ne1 == 0 ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ne0) : ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, ne1);
        ggml_set_name(t, name.c_str());
        const float scale = ne1 == 0 ? 0.1f : 1.0f / sqrtf((float) ne0);
        for (int64_t i = 0; i < ggml_nelements(t); i++) {
            ((float *) t->data)[i] = (ne1 == 0 ? 1.0f : 0.0f) + scale * normal(rng);
        }
        gguf_add_tensor(gguf.get(), t);
    };
    add("token_embd.weight", n_embd, n_vocab);
    add("output_norm.weight", n_embd, 0);
    for (int il = 0; il < n_layer; il++) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        if (il >= (int) leader.size() || leader[il] != QCACHE_LEADER_NONE) {
            add(blk + "attn_norm.weight", n_embd, 0);
            add(blk + "attn_q.weight", n_embd, n_head * head_dim);
            add(blk + "attn_k.weight", n_embd, n_head_kv * head_dim);
            add(blk + "attn_v.weight", n_embd, n_head_kv * head_dim);
            add(blk + "attn_output.weight", n_head * head_dim, n_embd);
        }
        add(blk + "ffn_norm.weight", n_embd, 0);
        add(blk + "ffn_gate.weight", n_embd, n_ff);
        add(blk + "ffn_up.weight", n_embd, n_ff);
        add(blk + "ffn_down.weight", n_ff, n_embd);
    }
    CHECK(gguf_write_to_file(gguf.get(), path.c_str(), false));
}

// text, an image of 70 embeddings, text
struct prompt {
    std::vector<int32_t> token;
    std::vector<float>   embd;
    std::vector<int8_t>  logits;

    prompt() {
        std::mt19937                    rng(11);
        std::normal_distribution<float> normal(0.0f, 0.5f);
        for (int i = 0; i < 90; i++) {
            const bool image = i >= 9 && i < 79;
            token.push_back(image ? -1 : (int32_t) (rng() % n_vocab));
            logits.push_back(1);
            for (int k = 0; k < n_embd; k++) {
                embd.push_back(normal(rng));
            }
        }
    }

    int32_t size() const { return (int32_t) token.size(); }

    struct qcache_batch rows(int32_t i0, int32_t i1, const int32_t * seq_id = nullptr) const {
        return { i1 - i0, token.data() + i0, embd.data() + (size_t) i0 * n_embd, seq_id, nullptr, logits.data() + i0, nullptr };
    }
};

double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0.0, power = 0.0;
    for (size_t i = 0; i < a.size(); i++) {
        error += ((double) a[i] - b[i]) * ((double) a[i] - b[i]);
        power += (double) b[i] * b[i];
    }
    return a.size() != b.size() || power == 0.0 ? 1.0 : error / power;
}

// logits of every row, the prompt fed in pieces of n rows
std::vector<float> run(qcache_context_t * ctx, const prompt & p, int32_t from, int32_t n) {
    std::vector<float> all;
    for (int32_t i = from; i < p.size(); i += n) {
        const int32_t end = std::min(i + n, p.size());
        CHECK(qcache_decode(ctx, p.rows(i, end)) == QCACHE_STATUS_SUCCESS);
        for (int32_t k = 0; k < end - i; k++) {
            const float * row = qcache_get_logits_ith(ctx, k);
            CHECK(row != nullptr);
            if (row != nullptr) {
                all.insert(all.end(), row, row + n_vocab);
            }
        }
    }
    return all;
}

struct context {
    qcache_context_t * ctx = nullptr;

    context(const qcache_model_t * model, struct qcache_context_params params) {
        CHECK(qcache_context_init(model, params, &ctx) == QCACHE_STATUS_SUCCESS);
    }
    ~context() { qcache_context_free(ctx); }
    context(const context &)             = delete;
    context & operator=(const context &) = delete;
};

struct qcache_context_params params_for(enum qcache_lazy_mode mode, const std::vector<int32_t> & leader) {
    struct qcache_context_params p = qcache_context_default_params();
    p.n_threads = p.n_threads_batch = 2;
    p.n_seq_max                     = 3;
    p.n_block_tokens                = 16;
    p.lazy_mode                     = mode;
    if (mode == QCACHE_LAZY_MODE_GLOBAL || mode == QCACHE_LAZY_MODE_VISUAL) {
        p.lazy_leader   = leader.data();
        p.n_lazy_leader = (int32_t) leader.size();
    }
    return p;
}

void same_whatever_the_way(const qcache_model_t * model, enum qcache_lazy_mode mode, const std::vector<int32_t> & leader) {
    const prompt       p;
    std::vector<float> expected;
    {
        context c(model, params_for(mode, leader));
        expected = run(c.ctx, p, 0, p.size());
        CHECK(qcache_seq_len(c.ctx, 0) == p.size());
    }
    for (const int32_t n : { 1, 7, 33 }) {
        context c(model, params_for(mode, leader));
        CHECK(nmse(run(c.ctx, p, 0, n), expected) < 1e-6);
    }
    for (const auto impl : { QCACHE_ATTN_IMPL_SCALAR, QCACHE_ATTN_IMPL_COMPOSED }) {
        auto params      = params_for(mode, leader);
        params.attn_impl = impl;
        params.n_ubatch  = 40;
        context c(model, params);
        CHECK(nmse(run(c.ctx, p, 0, p.size()), expected) < 1e-6);
    }
    for (const auto cache : { QCACHE_SCORE_CACHE_OFF, QCACHE_SCORE_CACHE_ON }) {
        auto params        = params_for(mode, leader);
        params.score_cache = cache;
        context c(model, params);
        CHECK(nmse(run(c.ctx, p, 0, 13), expected) < 1e-6);
    }
    auto q8   = params_for(mode, leader);
    q8.type_k = q8.type_v = GGML_TYPE_Q8_0;
    context c(model, q8);
    CHECK(nmse(run(c.ctx, p, 0, p.size()), expected) < 1e-2);
}

void state_and_sequences(const qcache_model_t * model, const std::vector<int32_t> & leader) {
    const prompt p;
    const auto   params = params_for(QCACHE_LAZY_MODE_VISUAL, leader);
    context      whole(model, params), half(model, params), other(model, params);

    const auto expected = run(whole.ctx, p, 0, p.size());
    const auto tail     = std::vector<float>(expected.begin() + 60 * n_vocab, expected.end());
    CHECK(qcache_decode(half.ctx, p.rows(0, 60)) == QCACHE_STATUS_SUCCESS);

    // bytes
    std::vector<uint8_t> state(qcache_state_size(half.ctx));
    CHECK(qcache_state_get(half.ctx, state.data(), state.size()) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_state_set(other.ctx, state.data(), state.size()) == QCACHE_STATUS_SUCCESS);
    CHECK(nmse(run(other.ctx, p, 60, 64), tail) < 1e-12);
    for (size_t n = 0; n < state.size(); n += n < 400 ? 1 : 4999) {
        CHECK(qcache_state_set(other.ctx, state.data(), n) == QCACHE_STATUS_INVALID_STATE);
    }
    std::mt19937 rng(3);
    for (int i = 0; i < 2000; i++) { // damaged headers: any status, no crash
        auto damaged = state;
        damaged[rng() % std::min<size_t>(160, damaged.size())] ^= (uint8_t) (1 + rng() % 255);
        qcache_state_set(other.ctx, damaged.data(), damaged.size());
    }
    CHECK(qcache_state_set(other.ctx, state.data(), state.size()) == QCACHE_STATUS_SUCCESS);
    CHECK(nmse(run(other.ctx, p, 60, 64), tail) < 1e-12);

    // file
    const std::string path = temporary("state");
    CHECK(qcache_state_save_file(half.ctx, path.c_str()) == QCACHE_STATUS_SUCCESS);
    qcache_clear(other.ctx);
    CHECK(qcache_get_kv_usage(other.ctx).bytes == 0);
    CHECK(qcache_state_load_file(other.ctx, path.c_str()) == QCACHE_STATUS_SUCCESS);
    CHECK(nmse(run(other.ctx, p, 60, 64), tail) < 1e-12);
    remove(path.c_str());
    CHECK(qcache_state_load_file(other.ctx, path.c_str()) == QCACHE_STATUS_FILE);

    // a copy shares blocks until it writes; both go on alike
    const size_t bytes = qcache_get_kv_usage(half.ctx).bytes;
    CHECK(qcache_seq_cp(half.ctx, 0, 1, -1) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_get_kv_usage(half.ctx).bytes == bytes);
    const std::vector<int32_t> ones(p.size(), 1);
    CHECK(qcache_decode(half.ctx, p.rows(60, p.size(), ones.data())) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_seq_len(half.ctx, 0) == 60 && qcache_seq_len(half.ctx, 1) == p.size());
    CHECK(nmse(run(half.ctx, p, 60, 64), tail) < 1e-12);
    CHECK(qcache_seq_rm(half.ctx, 0, 60, -1) == QCACHE_STATUS_SUCCESS);
    CHECK(nmse(run(half.ctx, p, 60, 64), tail) < 1e-12);
    CHECK(qcache_seq_rm(half.ctx, 0, 3, 10) == QCACHE_STATUS_INVALID_ARGUMENT);
    CHECK(qcache_seq_rm(half.ctx, -1, 0, -1) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_get_kv_usage(half.ctx).bytes == 0);
}

void failures_leave_the_context(const qcache_model_t * model, const std::vector<int32_t> & leader) {
    const prompt p;
    auto         params = params_for(QCACHE_LAZY_MODE_VISUAL, leader);
    context      whole(model, params);
    const auto   expected = run(whole.ctx, p, 0, p.size());
    const auto   tail     = std::vector<float>(expected.begin() + 60 * n_vocab, expected.end());

    params.kv_bytes_max = qcache_get_kv_usage(whole.ctx).bytes;
    params.n_ctx        = p.size();
    context small(model, params);
    CHECK(qcache_decode(small.ctx, p.rows(0, 60)) == QCACHE_STATUS_SUCCESS);
    const size_t               bytes = qcache_get_kv_usage(small.ctx).bytes;
    const std::vector<int32_t> ones(p.size(), 1);
    CHECK(qcache_decode(small.ctx, p.rows(0, p.size(), ones.data())) == QCACHE_STATUS_NO_BLOCKS);
    CHECK(strstr(qcache_last_error(), "kv_bytes_max") != nullptr);
    CHECK(qcache_decode(small.ctx, p.rows(0, 31)) == QCACHE_STATUS_CONTEXT_FULL);
    CHECK(qcache_get_logits_ith(small.ctx, 0) == nullptr);
    const int32_t wrong_token[] = { n_vocab };
    const int32_t wrong_seq[]   = { 3 };
    CHECK(qcache_decode(small.ctx, { 1, wrong_token, nullptr, nullptr, nullptr, nullptr, nullptr }) == QCACHE_STATUS_INVALID_ARGUMENT);
    CHECK(qcache_decode(small.ctx, { 1, p.token.data(), nullptr, wrong_seq, nullptr, nullptr, nullptr }) == QCACHE_STATUS_INVALID_ARGUMENT);
    CHECK(qcache_decode(small.ctx, { 0, p.token.data(), nullptr, nullptr, nullptr, nullptr, nullptr }) == QCACHE_STATUS_INVALID_ARGUMENT);
    CHECK(qcache_seq_len(small.ctx, 0) == 60 && qcache_seq_len(small.ctx, 1) == 0);
    CHECK(qcache_get_kv_usage(small.ctx).bytes == bytes);
    CHECK(nmse(run(small.ctx, p, 60, 64), tail) < 1e-12);
}

// what is captured must not depend on how the rows were cut into chunks
void capture(const qcache_model_t * model, enum qcache_lazy_mode mode, const std::vector<int32_t> & leader) {
    const prompt p;
    auto         params = params_for(mode, leader);
    context      whole(model, params);
    params.n_ubatch  = 13;
    params.attn_impl = QCACHE_ATTN_IMPL_COMPOSED;
    context cut(model, params);
    CHECK(qcache_capture_start(whole.ctx, 0) == QCACHE_STATUS_INVALID_ARGUMENT);
    CHECK(qcache_capture_start(whole.ctx, 16) == QCACHE_STATUS_INVALID_ARGUMENT);
    for (qcache_context_t * ctx : { whole.ctx, cut.ctx }) {
        CHECK(qcache_capture_start(ctx, 15) == QCACHE_STATUS_SUCCESS);
        CHECK(qcache_decode(ctx, p.rows(0, p.size())) == QCACHE_STATUS_SUCCESS);
    }
    for (const auto what : { QCACHE_CAPTURE_SCORES, QCACHE_CAPTURE_PROBS, QCACHE_CAPTURE_ATTN, QCACHE_CAPTURE_HIDDEN }) {
        const bool by_key = what == QCACHE_CAPTURE_SCORES || what == QCACHE_CAPTURE_PROBS;
        for (int32_t i = 0; i < n_layer * p.size(); i++) {
            int32_t       n = 0, n_cut = 0;
            const float * a = qcache_get_captured_ith(whole.ctx, what, i % n_layer, i / n_layer, &n);
            const float * b = qcache_get_captured_ith(cut.ctx, what, i % n_layer, i / n_layer, &n_cut);
            CHECK(a != nullptr && b != nullptr && n == n_cut && n == (by_key ? n_head * (i / n_layer + 1) : n_embd));
            if (a != nullptr && b != nullptr) {
                CHECK(nmse(std::vector<float>(a, a + n), std::vector<float>(b, b + n)) < 1e-6);
            }
        }
    }
    CHECK(qcache_get_captured_ith(whole.ctx, QCACHE_CAPTURE_ATTN, n_layer, 0, nullptr) == nullptr);
    std::vector<float> v((size_t) n_head_kv * head_dim * p.size());
    CHECK(qcache_seq_get_v(whole.ctx, 0, 1, v.data(), v.size()) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_seq_get_v(whole.ctx, 0, 1, v.data(), v.size() - 1) == QCACHE_STATUS_INVALID_ARGUMENT);
    qcache_capture_stop(whole.ctx);
    CHECK(qcache_get_captured_ith(whole.ctx, QCACHE_CAPTURE_ATTN, 0, 0, nullptr) == nullptr);
}

// steps of one shape share a graph and allocate nothing; a step of another shape in between changes no logits
void steady_steps(const qcache_model_t * model, enum qcache_lazy_mode mode, const std::vector<int32_t> & leader) {
    const prompt p;
    context      c(model, params_for(mode, leader));
    const auto   expected = run(c.ctx, p, 0, p.size());
    qcache_clear(c.ctx);

    const int32_t              first = p.size() - 11; // the text after the image, in one block
    const std::vector<int32_t> seq_id(3, 1);
    CHECK(qcache_decode(c.ctx, p.rows(0, first)) == QCACHE_STATUS_SUCCESS);
    for (int32_t i = first; i < p.size(); i++) {
        if (i == first + 6) { // two rows of another sequence: another graph
            CHECK(qcache_decode(c.ctx, p.rows(0, 2, seq_id.data())) == QCACHE_STATUS_SUCCESS);
        }
        const size_t before = n_allocations;
        CHECK(qcache_decode(c.ctx, p.rows(i, i + 1)) == QCACHE_STATUS_SUCCESS);
        if (i != first && i != first + 6) {
            CHECK(n_allocations == before);
        }
        const float * logits = qcache_get_logits_ith(c.ctx, 0);
        CHECK(logits != nullptr);
        if (logits != nullptr) {
            const std::vector<float> row(expected.begin() + (size_t) i * n_vocab, expected.begin() + (size_t) (i + 1) * n_vocab);
            CHECK(nmse({ logits, logits + n_vocab }, row) < 1e-6);
        }
    }
}

// two contexts, one before and one from the second leader on, and δ given at run time
void layers_and_bias(const qcache_model_t * model, const std::vector<int32_t> & leader) {
    const prompt       p;
    auto               params = params_for(QCACHE_LAZY_MODE_VISUAL, leader);
    std::vector<float> bias((size_t) n_layer * n_head, 0.3f);
    params.vis_bias   = bias.data();
    params.n_vis_bias = (int32_t) bias.size();
    context    whole(model, params);
    const auto expected = run(whole.ctx, p, 0, p.size());

    auto first = params, second = params;
    first.n_layers = second.layer_first = 3;
    context front(model, first), back(model, second);
    std::fill(bias.begin(), bias.end(), 9.0f); // copied
    CHECK(qcache_capture_start(front.ctx, QCACHE_CAPTURE_HIDDEN) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_decode(front.ctx, p.rows(0, p.size())) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_get_logits_ith(front.ctx, 0) == nullptr);
    std::vector<float>   stream, got;
    std::vector<int8_t>  modality;
    std::vector<int32_t> pos;
    for (int32_t i = 0; i < p.size(); i++) {
        const float * x = qcache_get_captured_ith(front.ctx, QCACHE_CAPTURE_HIDDEN, 2, i, nullptr);
        CHECK(x != nullptr);
        stream.insert(stream.end(), x, x + n_embd);
        modality.push_back(p.token[i] < 0);
        pos.push_back(i);
    }
    const struct qcache_batch batch = { p.size(), nullptr, stream.data(), nullptr, modality.data(), p.logits.data(), pos.data() };
    CHECK(qcache_decode(back.ctx, batch) == QCACHE_STATUS_SUCCESS);
    for (int32_t i = 0; i < p.size(); i++) {
        const float * row = qcache_get_logits_ith(back.ctx, i);
        CHECK(row != nullptr);
        got.insert(got.end(), row, row + n_vocab);
    }
    CHECK(nmse(got, expected) < 1e-9);
    CHECK(qcache_decode(back.ctx, p.rows(0, 1)) == QCACHE_STATUS_INVALID_ARGUMENT); // a token
    std::vector<float> v((size_t) n_head_kv * head_dim * p.size());
    CHECK(qcache_seq_get_v(back.ctx, 0, 2, v.data(), v.size()) == QCACHE_STATUS_INVALID_ARGUMENT);
    CHECK(qcache_seq_get_v(back.ctx, 0, 3, v.data(), v.size()) == QCACHE_STATUS_SUCCESS);
    second.layer_first = 4; // its leader is 3
    qcache_context_t * none = nullptr;
    second.vis_bias = bias.data();
    CHECK(qcache_context_init(model, second, &none) == QCACHE_STATUS_INVALID_ARGUMENT && none == nullptr);
}

// layers without attention: given at run time, then as a file that has not got their weights
void dropped(const qcache_model_t * full_model, const std::string & path) {
    const std::vector<int32_t> mixed = { 0, 0, QCACHE_LEADER_NONE, 0, QCACHE_LEADER_NONE };
    const std::vector<int32_t> first = { QCACHE_LEADER_NONE, 1, QCACHE_LEADER_NONE, 1, 4 };
    const std::vector<int32_t> none(n_layer, QCACHE_LEADER_NONE); // blocks of no bytes
    for (const auto & leader : { mixed, first, none }) {
        for (const auto mode : { QCACHE_LAZY_MODE_GLOBAL, QCACHE_LAZY_MODE_VISUAL }) {
            same_whatever_the_way(full_model, mode, leader);
        }
        state_and_sequences(full_model, leader);
    }
    failures_leave_the_context(full_model, mixed);

    write_model(path, mixed, "visual");
    qcache_model_t * model = nullptr;
    CHECK(qcache_model_init(path.c_str(), qcache_model_default_params(), &model) == QCACHE_STATUS_SUCCESS);
    if (model == nullptr) {
        return;
    }
    {
        const prompt p;
        context      ctx(model, params_for(QCACHE_LAZY_MODE_FILE, {}));
        CHECK(run(ctx.ctx, p, 0, p.size()).size() == (size_t) p.size() * n_vocab);
        const auto usage = qcache_get_kv_usage(ctx.ctx);
        CHECK(usage.n_lazy_layers == 2 && usage.n_dropped_layers == 2);
        CHECK(usage.bytes_block_text * 10 == usage.bytes_block_full * 6 && usage.bytes_block_visual * 10 == usage.bytes_block_full * 4);
        CHECK(qcache_capture_start(ctx.ctx, QCACHE_CAPTURE_ATTN | QCACHE_CAPTURE_HIDDEN) == QCACHE_STATUS_SUCCESS);
        qcache_clear(ctx.ctx);
        CHECK(qcache_decode(ctx.ctx, p.rows(0, 20)) == QCACHE_STATUS_SUCCESS);
        CHECK(qcache_get_captured_ith(ctx.ctx, QCACHE_CAPTURE_HIDDEN, 4, 0, nullptr) != nullptr);
        CHECK(qcache_get_captured_ith(ctx.ctx, QCACHE_CAPTURE_ATTN, 4, 0, nullptr) == nullptr);
        std::vector<float> v((size_t) n_head_kv * head_dim * 20);
        CHECK(qcache_seq_get_v(ctx.ctx, 0, 2, v.data(), v.size()) == QCACHE_STATUS_INVALID_ARGUMENT);
        CHECK(qcache_seq_get_v(ctx.ctx, 0, 3, v.data(), v.size()) == QCACHE_STATUS_SUCCESS);
    }
    qcache_context_t * refused = nullptr;
    CHECK(qcache_context_init(model, params_for(QCACHE_LAZY_MODE_OFF, {}), &refused) == QCACHE_STATUS_UNSUPPORTED && refused == nullptr);
    qcache_model_free(model);
    remove(path.c_str());
}

void set_weight(const std::string & path) {
    qcache_model_t * model = nullptr;
    CHECK(qcache_model_init(path.c_str(), qcache_model_default_params(), &model) == QCACHE_STATUS_SUCCESS);
    std::vector<float> zeros((size_t) n_embd * n_head * head_dim, 0.0f);
    CHECK(qcache_model_set_weight(model, "blk.1.attn_output.weight", zeros.data(), zeros.size()) == QCACHE_STATUS_SUCCESS);
    CHECK(qcache_model_set_weight(model, "blk.1.attn_output.weight", zeros.data(), zeros.size() - 1) == QCACHE_STATUS_INVALID_ARGUMENT);
    CHECK(qcache_model_set_weight(model, "blk.99.attn_output.weight", zeros.data(), zeros.size()) == QCACHE_STATUS_INVALID_ARGUMENT);
    zeros[5] = NAN;
    CHECK(qcache_model_set_weight(model, "blk.1.attn_output.weight", zeros.data(), zeros.size()) == QCACHE_STATUS_INVALID_ARGUMENT);
    const prompt p;
    {
        context    ctx(model, params_for(QCACHE_LAZY_MODE_OFF, {}));
        const auto logits = run(ctx.ctx, p, 0, p.size());
        CHECK(std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }));
    }
    qcache_model_free(model);
}

void bad_files(const std::string & path) {
    std::ifstream     in(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const std::string cut = temporary("cut.gguf");
    for (const double share : { 0.0, 0.001, 0.01, 0.02, 0.3, 0.999 }) {
        std::ofstream(cut, std::ios::binary).write(bytes.data(), (std::streamsize) (share * (double) bytes.size()));
        qcache_model_t *         model  = nullptr;
        const enum qcache_status status = qcache_model_init(cut.c_str(), qcache_model_default_params(), &model);
        CHECK(status == QCACHE_STATUS_INVALID_MODEL && model == nullptr);
        CHECK(strstr(qcache_last_error(), cut.c_str()) != nullptr);
    }
    remove(cut.c_str());
    qcache_model_t * model = nullptr;
    CHECK(qcache_model_init(cut.c_str(), qcache_model_default_params(), &model) == QCACHE_STATUS_FILE);

    for (const auto & leader : std::vector<std::vector<int32_t>>{ { 0, 2, 2, 3, 4 }, { 0, 0, 1, 3, 4 }, { 0, 0, 2, 0, 4 }, { 0, 0, 2 }, { 1, 1, 1, 1, 1 }, { 0, -2, 2, 3, 4 }, { 0, -1, 1, 3, 4 }, { 0, 9, 2, 3, 4 } }) {
        write_model(cut, leader, "visual");
        CHECK(qcache_model_init(cut.c_str(), qcache_model_default_params(), &model) == QCACHE_STATUS_INVALID_MODEL);
        CHECK(strstr(qcache_last_error(), "qcache.lazy.leader") != nullptr);
    }
    remove(cut.c_str());
    CHECK(qcache_check_ggml_version("0.9.4") == QCACHE_STATUS_VERSION);
    CHECK(qcache_check_ggml_version(ggml_version()) == QCACHE_STATUS_SUCCESS);
}

} // namespace

int main() {
    ggml_log_set([](enum ggml_log_level, const char *, void *) {}, nullptr); // bad files are expected here
    const std::vector<int32_t> leader = { 0, 0, 0, 3, 3 };
    const std::string          path   = temporary("model.gguf");
    write_model(path, leader, "visual");

    qcache_model_t * model = nullptr;
    if (qcache_model_init(path.c_str(), qcache_model_default_params(), &model) != QCACHE_STATUS_SUCCESS) {
        fprintf(stderr, "%s\n", qcache_last_error());
        return 1;
    }
    CHECK(qcache_model_get_info(model).lazy_mode == QCACHE_LAZY_MODE_VISUAL);
    for (const auto mode : { QCACHE_LAZY_MODE_OFF, QCACHE_LAZY_MODE_GLOBAL, QCACHE_LAZY_MODE_VISUAL }) {
        same_whatever_the_way(model, mode, leader);
        capture(model, mode, leader);
        steady_steps(model, mode, leader);
    }
    state_and_sequences(model, leader);
    failures_leave_the_context(model, leader);
    layers_and_bias(model, leader);
    dropped(model, temporary("dropped.gguf"));
    qcache_model_free(model);
    set_weight(path);
    bad_files(path);
    remove(path.c_str());
    return check_report("test-context");
}
