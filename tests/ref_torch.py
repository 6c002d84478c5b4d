"""Lazy Attention over a Hugging Face decoder in PyTorch: what the C++ core's logits are judged by.

Written from PAPER.md's table alone, with dense tensors and in float64. Hugging Face's own linear layers, MLPs and rotary
embedding are used; norms, attention and the order of things are spelled out here. The only thing shared with the C++ core
is what its cache is documented to do to K and V (f16, or q8_0 and q4_0 in groups of 32), so that bounds can be tight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

MODES = ("off", "global", "visual")


@dataclass(frozen=True)
class TextModel:
    """The parts of a Hugging Face causal language model.

    Attributes:
        decoder: ``LlamaModel``, ``Qwen2Model`` and the like.
        lm_head: Output matrix.
        interleaved: ggml rotates neighbouring pairs for this architecture, so its K rows are ordered pairwise.
    """

    decoder: nn.Module
    lm_head: nn.Linear
    interleaved: bool

    @classmethod
    def of(cls, model: nn.Module) -> "TextModel":
        """The text model of a ``LlavaForConditionalGeneration`` or of a ``...ForCausalLM``."""
        inner = model.model
        decoder = inner.language_model if hasattr(inner, "language_model") else inner
        return cls(decoder, model.lm_head, decoder.config.model_type != "qwen2")


def as_cached(x: torch.Tensor, cache_type: str) -> torch.Tensor:
    """Rounds K or V rows as a cache of that type does.

    Args:
        x: ``[n_head_kv, n, head_dim]``.
        cache_type: ``f32`` (as it is), ``f16``, ``q8_0`` or ``q4_0``.

    Returns:
        ``[n_head_kv, n, head_dim]`` of the type of ``x``.
    """
    if cache_type == "f32":
        return x
    if cache_type == "f16":
        return x.half().to(x.dtype)
    head_dim = x.shape[-1]
    groups = nn.functional.pad(x.float(), (0, -head_dim % 32)).unflatten(-1, (-1, 32))
    if cache_type == "q4_0":
        # the value of largest magnitude becomes -8
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        scaled = torch.where(scale != 0, groups / scale, 0.0)
        quants = torch.clamp(torch.floor(scaled + 8.5), 0, 15) - 8
        return (quants * scale.half().float()).flatten(-2)[..., :head_dim].to(x.dtype)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    scaled = torch.where(scale > 0, groups / scale, 0.0)
    quants = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)  # halves away from zero, as C's roundf
    return (quants * scale.half().float()).flatten(-2)[..., :head_dim].to(x.dtype)


def pairwise(k: torch.Tensor) -> torch.Tensor:
    """Reorders the last dimension from halves (Hugging Face's rotary embedding) to neighbouring pairs (ggml's for llama)."""
    return k.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def halves(k: torch.Tensor) -> torch.Tensor:
    """Undoes ``pairwise``."""
    return k.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@torch.no_grad()
def reference_logits(
    model: nn.Module,
    embeddings: torch.Tensor,
    visual: torch.Tensor,
    leader: Sequence[int],
    mode: str,
    vis_bias: Mapping[int, Sequence[float]] | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    layers: list[dict[str, np.ndarray]] | None = None,
) -> np.ndarray:
    """Logits of one sequence, every row in one pass, by PAPER.md's table.

    Args:
        model: ``LlavaForConditionalGeneration`` or a ``...ForCausalLM``, in float64 for a reference that deserves the name.
        embeddings: ``[n, n_embd]`` input rows, those of tokens looked up already.
        visual: ``[n]`` bool, which rows are visual.
        leader: ``[n_layer]``; ``leader[l] == l`` is a full layer, -1 one without attention.
        mode: ``off``, ``global`` or ``visual``.
        vis_bias: δ of lazy layers, ``[n_head]`` each; counts in visual mode only.
        type_k: How the cache rounds K: ``f32``, ``f16``, ``q8_0`` or ``q4_0``.
        type_v: Likewise V.
        layers: Gets what each layer computed, row first: ``scores`` and ``probs`` ``[n, n_head, n]``, ``attn``
            ``[n, n_head, head_dim]``, ``hidden`` ``[n, n_embd]``, and its ``v`` ``[n_head_kv, n, head_dim]``; ``hidden`` alone of
            a layer without attention.

    Returns:
        ``[n, n_vocab]`` float64.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} isn't one of {', '.join(MODES)}")
    text = TextModel.of(model)
    config = text.decoder.config
    n_head, n_head_kv = config.num_attention_heads, config.num_key_value_heads
    n_group = n_head // n_head_kv
    n = len(embeddings)

    def norm(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(n, count, -1).transpose(0, 1)  # [n, count * head_dim] -> [count, n, head_dim]

    def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        # query head h uses KV head h // n_group -> [n_head, n, n], row t against key i
        return q @ k.repeat_interleave(n_group, 0).transpose(1, 2) / q.shape[-1] ** 0.5

    x = embeddings.to(text.lm_head.weight.dtype)
    cos, sin = text.decoder.rotary_emb(x[None], torch.arange(n)[None])
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    row_visual, key_visual = visual[:, None], visual[None, :]
    leaders_products: dict[int, torch.Tensor] = {}

    for il, layer in enumerate(text.decoder.layers):
        attn = layer.self_attn
        if mode != "off" and leader[il] == -1:
            x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
            if layers is not None:
                layers.append({"hidden": x.numpy()})
            continue
        h = norm(x, layer.input_layernorm)
        v = as_cached(heads(attn.v_proj(h), n_head_kv), type_v)
        lazy = mode != "off" and leader[il] != il
        own = None
        if not (lazy and mode == "global"):
            q, k = apply_rotary_pos_emb(heads(attn.q_proj(h), n_head)[None], heads(attn.k_proj(h), n_head_kv)[None], cos, sin)
            k = halves(as_cached(pairwise(k[0]), type_k)) if text.interleaved else as_cached(k[0], type_k)
            own = products(q[0], k)
        if not lazy:
            logits = leaders_products[il] = own
        elif mode == "global":
            logits = leaders_products[leader[il]]
        else:
            logits = torch.where(row_visual | key_visual, leaders_products[leader[il]], own)
            if vis_bias and il in vis_bias:
                delta = torch.as_tensor(vis_bias[il], dtype=logits.dtype)[:, None, None]
                logits = logits + delta * (~row_visual & key_visual)
        weights = torch.softmax(logits.masked_fill(future, -torch.inf), -1)
        out = weights @ v.repeat_interleave(n_group, 0)  # [n_head, n, head_dim]
        x = x + attn.o_proj(out.transpose(0, 1).reshape(n, -1))
        x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
        if layers is not None:
            by_row = {"scores": logits.transpose(0, 1), "probs": weights.transpose(0, 1), "attn": out.transpose(0, 1)}
            layers.append({name: value.numpy() for name, value in {**by_row, "hidden": x, "v": v}.items()})
    return text.lm_head(norm(x, text.decoder.norm)).numpy()


@torch.no_grad()
def greedy_tokens(model: nn.Module, embeddings: torch.Tensor, n_tokens: int) -> list[int]:
    """Hugging Face's own greedy continuation of a prompt given as embeddings, ends of text ignored.

    Args:
        model: ``LlavaForConditionalGeneration`` or a ``...ForCausalLM``.
        embeddings: ``[n, n_embd]``.
        n_tokens: Tokens to generate.
    """
    text = TextModel.of(model)
    out = text.decoder(inputs_embeds=embeddings[None], use_cache=True)
    tokens = []
    for _ in range(n_tokens):
        tokens.append(int(text.lm_head(out.last_hidden_state[0, -1]).argmax()))
        out = text.decoder(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens
