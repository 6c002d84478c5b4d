"""The text GGUF: tensors and keys of the language model, as llama.cpp's `llama` and `qwen2` loaders expect them."""

from collections.abc import Mapping, Sequence

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType

from .hparams import RopeScaling, TextParams
from .outtypes import OutType
from .plan import OutputTensor, TensorPicker


def text_tensors(
    params: TextParams, picker: TensorPicker, outtype: OutType, left_out: Mapping[int, Sequence[str]]
) -> list[OutputTensor]:
    """Plans the tensors of the text GGUF.

    Args:
        params: The language model.
        picker: The checkpoint's tensors.
        outtype: Types of the weight matrices.
        left_out: Tensors of the attention that are left out, by layer: GGUF names without layer and suffix.

    Returns:
        The tensors in the order they are written.

    Raises:
        ConversionError: A tensor is missing or of another shape.
    """
    plan: list[OutputTensor] = []

    def add(
        kind: MODEL_TENSOR,
        source: str,
        shape: tuple[int, ...],
        *,
        layer: int = -1,
        suffix: str = "weight",
        rope: bool = False,
    ) -> None:
        base = TENSOR_NAMES[kind].format(bid=layer)
        if base.rpartition(".")[2] in left_out.get(layer, ()):
            picker.skip([f"{source}.{suffix}"])
            return
        name = f"{base}.{suffix}"
        entry = picker.take(f"{source}.{suffix}", shape)
        # ggml's RoPE turns neighbouring pairs for llama, halves for qwen2; Hugging Face's always turns halves
        head_dim = params.head_dim if rope and params.arch == "llama" else 0
        plan.append(OutputTensor(name, shape, outtype.of(name, shape, params.n_layer, tied), entry, head_dim))

    def add_linear(
        kind: MODEL_TENSOR, source: str, shape: tuple[int, int], layer: int, bias: bool, rope: bool = False
    ) -> None:
        add(kind, source, shape, layer=layer, rope=rope)
        if bias:
            add(kind, source, shape[:1], layer=layer, suffix="bias", rope=rope)

    n_embd, n_ff = params.n_embd, params.n_ff
    n_q, n_kv = params.n_head * params.head_dim, params.n_head_kv * params.head_dim
    tied = params.tied and not picker.has("lm_head.weight")
    add(MODEL_TENSOR.TOKEN_EMBD, "text.embed_tokens", (params.n_vocab, n_embd))
    if params.rope_scaling is not None and params.rope_scaling.kind == "llama3":
        factors = _llama3_factors(params, params.rope_scaling)
        name = TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS] + ".weight"
        plan.append(OutputTensor(name, factors.shape, GGMLQuantizationType.F32, factors))
    for layer in range(params.n_layer):
        prefix = f"text.layers.{layer}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        add(MODEL_TENSOR.ATTN_NORM, prefix + "input_layernorm", (n_embd,), layer=layer)
        add_linear(MODEL_TENSOR.ATTN_Q, attn + "q_proj", (n_q, n_embd), layer, params.qkv_bias, rope=True)
        add_linear(MODEL_TENSOR.ATTN_K, attn + "k_proj", (n_kv, n_embd), layer, params.qkv_bias, rope=True)
        add_linear(MODEL_TENSOR.ATTN_V, attn + "v_proj", (n_kv, n_embd), layer, params.qkv_bias)
        add_linear(MODEL_TENSOR.ATTN_OUT, attn + "o_proj", (n_embd, n_q), layer, params.o_bias)
        add(MODEL_TENSOR.FFN_NORM, prefix + "post_attention_layernorm", (n_embd,), layer=layer)
        add_linear(MODEL_TENSOR.FFN_GATE, mlp + "gate_proj", (n_ff, n_embd), layer, params.mlp_bias)
        add_linear(MODEL_TENSOR.FFN_UP, mlp + "up_proj", (n_ff, n_embd), layer, params.mlp_bias)
        add_linear(MODEL_TENSOR.FFN_DOWN, mlp + "down_proj", (n_embd, n_ff), layer, params.mlp_bias)
    add(MODEL_TENSOR.OUTPUT_NORM, "text.norm", (n_embd,))
    if not tied:
        add(MODEL_TENSOR.OUTPUT, "lm_head", (params.n_vocab, n_embd))
    return plan


def add_text_keys(writer: GGUFWriter, params: TextParams, name: str, file_type: LlamaFileType) -> None:
    """Adds general and architecture keys; the vocabulary and the lazy layers have their own."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(params.n_vocab)
    writer.add_context_length(params.n_ctx)
    writer.add_embedding_length(params.n_embd)
    writer.add_block_count(params.n_layer)
    writer.add_feed_forward_length(params.n_ff)
    writer.add_head_count(params.n_head)
    writer.add_head_count_kv(params.n_head_kv)
    writer.add_key_length(params.head_dim)
    writer.add_value_length(params.head_dim)
    writer.add_layer_norm_rms_eps(params.rms_eps)
    writer.add_rope_dimension_count(params.head_dim)
    writer.add_rope_freq_base(params.rope_theta)
    scaling = params.rope_scaling
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling is not None and scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_attn_factors(scaling.attn_factor)


def _llama3_factors(params: TextParams, scaling: RopeScaling) -> np.ndarray:
    """Divisor of each rotary frequency, f32 [head_dim / 2] (Llama 3.1, transformers' `_compute_llama3_parameters`)."""
    frequency = params.rope_theta ** -(np.arange(0, params.head_dim, 2, dtype=np.float64) / params.head_dim)
    turns = scaling.original_context * frequency / (2 * np.pi)
    # with over high_freq_factor turns per context a frequency stays, under low_freq_factor it is divided
    blend = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
    return (1.0 / (blend + (1.0 - blend) / scaling.factor)).astype(np.float32)
