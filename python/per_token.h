// per_token.h: what Python does for every generated token, each in one call. The processor's caches are cold after the
// weights have gone through them, so it is the number of Python's steps that counts. build_native.py gives it to cffi.

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// as llama_token_data and llama_token_data_array; candidates.py checks that
struct candidate {
    int32_t id;
    float   logit;
    float   p;
};
struct candidates {
    struct candidate * data;
    size_t             size;
    int64_t            selected;
    bool               sorted;
};

// Appends a text token to the first n_past of sequence 0, drops what was after them, and copies its logits to a row of some.
static enum qcache_status next_token(qcache_context_t * ctx, int32_t token, int32_t n_past, float * logits, size_t row, size_t n_vocab) {
    enum qcache_status status = QCACHE_STATUS_SUCCESS;
    if (qcache_seq_len(ctx, 0) > n_past) {
        status = qcache_seq_rm(ctx, 0, n_past, -1);
    }
    if (status == QCACHE_STATUS_SUCCESS) {
        const struct qcache_batch batch = { .n_tokens = 1, .token = &token };
        status = qcache_decode(ctx, batch);
    }
    if (status == QCACHE_STATUS_SUCCESS) {
        const float * last = qcache_get_logits_ith(ctx, -1);
        if (last == NULL) {
            qcache_seq_rm(ctx, 0, n_past, -1);
            return QCACHE_STATUS_INVALID_ARGUMENT; // a context without the last layers
        }
        memcpy(logits + row * n_vocab, last, n_vocab * sizeof(float));
    }
    return status;
}

// Lets llama.cpp's sampler (by the addresses of its functions) choose among all tokens by a row of logits, and tells it what it chose.
// -1: it chose none; -2: only tokens that can't be, and telling that to a grammar would end the process
static int32_t sample_token(uintptr_t apply, uintptr_t accept, uintptr_t sampler, struct candidates * out, const float * logits, size_t row, int32_t n_vocab) {
    logits += row * n_vocab;
    for (int32_t i = 0; i < n_vocab; i++) {
        out->data[i] = (struct candidate){ i, logits[i], 0.0f };
    }
    out->size     = n_vocab;
    out->selected = -1;
    out->sorted   = false;
    ((void (*)(void *, struct candidates *)) apply)((void *) sampler, out);
    if (out->selected < 0) {
        return -1;
    }
    const struct candidate chosen = out->data[out->selected];
    if (chosen.logit == -INFINITY) {
        return -2;
    }
    ((void (*)(void *, int32_t)) accept)((void *) sampler, chosen.id);
    return chosen.id;
}

// what stays the same from token to token
struct generation {
    uintptr_t           apply, accept, sampler;
    struct candidates * candidates;
    float *             logits; // of the last token
    int32_t             n_vocab;
    int32_t *           ids;    // of what was appended, by position
    enum qcache_status  status; // of next_token where that fails
};

// next_token, then sample_token. -3: nothing was appended, for the reason in status; else as sample_token
static int32_t generate_token(qcache_context_t * ctx, struct generation * g, int32_t token, int32_t n_past) {
    g->status = next_token(ctx, token, n_past, g->logits, 0, g->n_vocab);
    if (g->status != QCACHE_STATUS_SUCCESS) {
        return -3;
    }
    g->ids[n_past] = token;
    return sample_token(g->apply, g->accept, g->sampler, g->candidates, g->logits, 0, g->n_vocab);
}
