// qcache-composed.h: lazy attention from stock ggml operations only, for backends without a kernel of ours and as a
// cross-check in tests. Keys and values of all blocks of all sequences are gathered, one mask tells what a row sees.

#pragma once

#include "qcache-op.h"

struct ggml_cgraph;
struct qcache_composed;

// Makes the inputs that all layers of a step share (mask, row indices) in ctx. `step` must live as long as the graph.
qcache_composed * qcache_composed_init(ggml_context * ctx, const qcache_attn_step * step, int32_t n_block_tokens);
void              qcache_composed_free(qcache_composed * c);

// New K and V of one layer into their blocks; arguments as qcache_op_append. -> the last node, which is in graph already
ggml_tensor * qcache_composed_append(qcache_composed * c, ggml_context * ctx, ggml_cgraph * graph, ggml_tensor * k, ggml_tensor * v,
                                     const qcache_append_params * params);

// Attention of one layer; arguments and result as qcache_op_attn (score_op is ignored). `after` and the gathers are
// expanded into graph here, so that what append wrote is what they read.
ggml_tensor * qcache_composed_attn(qcache_composed * c, ggml_context * ctx, ggml_cgraph * graph, ggml_tensor * q_own,
                                   ggml_tensor * q_leader, ggml_tensor * after, const qcache_attn_params * params);

// Fills the shared inputs; to be called once the graph is allocated.
void qcache_composed_set_inputs(const qcache_composed * c);

// Upper bounds, to size the ggml context and graph: nodes of one layer and of the shared inputs.
size_t qcache_composed_n_nodes(const qcache_attn_step * step);
