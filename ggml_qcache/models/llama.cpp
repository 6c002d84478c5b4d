// llama.cpp: the LLaMA decoder with lazy layers. It serves `llama` (LLaMA 1-3, Vicuna, Mistral) and `qwen2`, which
// differ only in the order of rope's pairs and in biases: both come from the model.

#include "../qcache-graph.h"

ggml_tensor * qcache_build_llama(qcache_graph & g) {
    const auto &  hp = g.model.hparams;
    ggml_tensor * x  = g.embed(); // [n_embd, n_rows]

    // no row looks at another after this layer: from here on only those count whose logits are wanted
    const int32_t last = g.last_attention();
    if (last < 0) {
        if (!g.has_out()) {
            return x;
        }
        x = g.out_rows(x);
    }
    for (int32_t il = g.step.layer_first; il < g.step.layer_end; il++) {
        const auto &  layer = g.model.layers[il];
        ggml_tensor * cur;

        if (g.has_attention(il)) {
            cur = g.norm(x, layer.attn_norm);

            // a lazy layer projects Q and K only for the rows that do not inherit them
            ggml_tensor * q = nullptr;
            ggml_tensor * k = nullptr;
            if (g.n_own(il) > 0) {
                ggml_tensor * own = g.first_rows(cur, g.n_own(il));
                q = g.rope(g.linear(layer.wq, layer.bq, own), hp.n_head);    // [head_dim, n_head, n_own]
                k = g.rope(g.linear(layer.wk, layer.bk, own), hp.n_head_kv); // [head_dim, n_head_kv, n_own]
            }
            ggml_tensor * v = g.linear(layer.wv, layer.bv, cur); // [n_head_kv * head_dim, n_rows]

            cur = g.lazy_attention(il, q, k, v);
            if (cur == nullptr || (il == last && !g.has_out())) {
                return cur;
            }
            if (il == last) {
                cur = g.out_rows(cur);
                x   = g.out_rows(x);
            }
            x = g.add(g.linear(layer.wo, layer.bo, cur), x);
        }
        cur = g.norm(x, layer.ffn_norm);
        cur = g.swiglu(g.linear(layer.ffn_gate, nullptr, cur), g.linear(layer.ffn_up, nullptr, cur));
        x   = g.add(g.linear(layer.ffn_down, nullptr, cur), x);
        g.capture_hidden(il, x);
    }
    return g.step.has_logits() ? g.linear(g.model.output, g.model.output_bias, g.norm(x, g.model.output_norm)) : x;
}
