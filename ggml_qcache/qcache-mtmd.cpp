// qcache-mtmd.cpp: right position and patch indices for libmtmd's llava graph, see qcache.h
//
// No GGUF can make up for the wrong ones: positions are indices into a table that the class token shares. The callback
// is asked about each node before the graph is computed, when the inputs are already on the node's backend.

#include "qcache.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <cstring>
#include <vector>

bool qcache_mtmd_eval_callback(struct ggml_tensor * node, bool ask, void * user_data) {
    auto & state = *(struct qcache_mtmd_state *) user_data;
    if (!ask || node->src[0] == nullptr || node->src[1] == nullptr) {
        return false; // nobody needs a node's result, so the graph runs in one piece
    }
    ggml_tensor * first  = node->src[0];
    ggml_tensor * second = node->src[1];
    if (strncmp(second->name, "v.class_embd", 12) == 0) {
        state.class_token_last = true;
    } else if (strncmp(first->name, "v.class_embd", 12) == 0) {
        state.class_token_last = false;
    }
    // a backend's copy of an input is called like "CPU#positions#0"
    const bool positions = strstr(second->name, "positions") != nullptr;
    const bool patches   = strstr(second->name, "patches") != nullptr;
    if (!state.class_token_last || (!positions && !patches) || second->type != GGML_TYPE_I32) {
        return false;
    }
    const int32_t        n = (int32_t) ggml_nelements(second);
    std::vector<int32_t> index(n);
    for (int32_t i = 0; i < n; i++) {
        index[i] = patches ? i : (i + 1) % n; // the class token, now last, has position 0
    }
    ggml_backend_tensor_set(second, index.data(), 0, n * sizeof(int32_t));
    state.n_corrected++;
    return false;
}
