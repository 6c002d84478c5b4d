// qcache-capture.h: what the layers computed for chosen rows, kept beside the logits
//
// While a graph is built, the tensors to keep are added layer by layer as outputs of the graph; once it is computed,
// store() copies them to where their rows are in the batch.

#pragma once

#include "qcache-impl.h"
#include "qcache-op.h"

#include <cstdint>
#include <vector>

class qcache_capture_store {
  public:
    static constexpr int32_t n_kinds = 4; // bits of enum qcache_capture

    qcache_capture_store(int32_t what, int32_t n_layer);

    int32_t kinds() const { return what; } // enum qcache_capture, added up
    bool wants(enum qcache_capture kind) const { return (what & kind) != 0; }

    // A batch with n_out rows to keep; earlier ones go.
    void begin_batch(int32_t n_out);
    void begin_step();

    // x: [..., n_out of the step], the last dimension being rows
    void add(enum qcache_capture kind, int32_t il, ggml_tensor * x);

    // Row r of the step's tensors becomes row out[r] of the batch. n_keys[r]: keys that it sees.
    void store(const std::vector<int32_t> & out, const std::vector<int32_t> & n_keys);

    // Of row k of the batch's rows to keep; NULL where there is nothing.
    const std::vector<float> * get(enum qcache_capture kind, int32_t il, int32_t k) const;

  private:
    struct added {
        enum qcache_capture kind;
        int32_t             il;
        ggml_tensor *       tensor;
    };

    int32_t                         what;
    int32_t                         n_layer;
    int32_t                         n_out = 0;
    std::vector<added>              step;
    std::vector<std::vector<float>> values[n_kinds]; // [n_layer * n_out]
};

// what a scores node points to; must live as long as the graph
struct qcache_scores_node {
    qcache_attn_params params;
    const int32_t *    rows; // [n_rows] rows of the step
    int32_t            n_rows;
};

// Logits of the attention for chosen rows, from the same Q, K and parameters as the attention node's.
// q_own, q_leader, after: as for qcache_op_attn -> [n_keys, n_head, n_rows] f32, -inf where a row does not see a key;
// n_keys is the longest row's.
ggml_tensor * qcache_capture_scores(ggml_context * ctx, ggml_tensor * q_own, ggml_tensor * q_leader, ggml_tensor * after,
                                    const qcache_scores_node * node);
