"""Hyper-parameters of a Hugging Face LLaVA: config.json, transformers' defaults filled in, checked.

A saved config leaves out what equals the class's default (llava-1.5-7b's text_config names neither hidden size nor
layers), so the defaults of transformers' configuration classes are repeated here; tests/test_convert_hparams.py compares
them with the classes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .jsonfile import read_json

_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
}
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
# what a model takes when it has no vision_config at all: CLIP ViT-L/14 at 336 pixels, SigLIP so400m at 384 less a layer
_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
# an image of more would take minutes and a context that no model has
_MAX_TILES = 256
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_PINPOINTS = [[height, width] for height in range(384, 2305, 384) for width in range(384, 2305, 384)]
# ggml's gelu is the tanh form; the erf form differs by less than f16 rounds
_GELU_TANH = ("gelu", "gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class _Family:
    """What one of transformers' LLaVA classes takes for granted. ``layout`` places the tiles of an image; "" has none."""

    architecture: str
    layout: str = ""
    text: str = "llama"
    tower: str = "clip_vision_model"
    no_vision: Mapping[str, Any] = field(default_factory=lambda: _CLIP_L)
    feature_layer: int = -2
    select_strategy: str = "default"
    pinpoints: Sequence[Sequence[int]] = ()


# by model_type
_FAMILIES = {
    "llava": _Family("LlavaForConditionalGeneration"),
    "llava_next": _Family("LlavaNextForConditionalGeneration", "llava_next", pinpoints=_NEXT_PINPOINTS),
    "llava_onevision": _Family(
        "LlavaOnevisionForConditionalGeneration",
        "llava_onevision",
        text="qwen2",
        tower="siglip_vision_model",
        no_vision=_SIGLIP_SO400M,
        feature_layer=-1,
        select_strategy="full",
        pinpoints=_ONEVISION_PINPOINTS,
    ),
}


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary embedding: ``linear`` by a factor, ``llama3`` or ``yarn`` by wavelength.

    ``attn_factor`` goes with ``yarn``: what cosine and sine are multiplied by beside YaRN's own factor.
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context: int = 0
    attn_factor: float = 1.0


@dataclass(frozen=True)
class TextParams:
    """The language model. ``arch`` is the GGUF architecture; Mistral without a sliding window is a ``llama``."""

    arch: str
    n_vocab: int
    n_ctx: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool


@dataclass(frozen=True)
class Anyres:
    """How an image becomes several tiles: ``llava_next``, or ``llava_onevision`` with its limit on visual tokens.

    ``pinpoints`` are the sizes, height and width in pixels, that an image may be scaled to. ``max_tiles`` tiles' worth of
    tokens are kept, 0 for all.
    """

    layout: str
    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int


@dataclass(frozen=True)
class VisionParams:
    """The CLIP or SigLIP tower and what the projector takes from it.

    ``feature_layers`` index the tower's hidden states: 0 is the input of the first layer, ``n_layer`` the output of the
    last. SigLIP has no class token and no norm before the first layer. ``anyres`` is None where an image is one tile.
    """

    siglip: bool
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    image_size: int
    patch_size: int
    act: str
    norm_eps: float
    feature_layers: tuple[int, ...]
    projector_bias: bool
    anyres: Anyres | None


@dataclass(frozen=True)
class LlavaParams:
    """Everything config.json says, and remarks for the user about what it implies."""

    text: TextParams
    vision: VisionParams
    token_ids: dict[str, int]
    warnings: tuple[str, ...]


class _Section:
    """One object of config.json, read key by key with its defaults; errors name file, key and value."""

    def __init__(self, where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values
        self.defaults = defaults

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def integer(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConversionError(f"{self.where}{key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConversionError(f"{self.where}{key} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConversionError(f"{self.where}{key} must be true or false, got {value!r}")
        return value

    def section(self, key: str) -> "_Section":
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping):
            raise ConversionError(f"{self.where}{key} must be an object, got {value!r}")
        return _Section(f"{self.where}{key}.", value, {})

    def refuse(self, key: str, value: Any, supported: str) -> ConversionError:
        return ConversionError(f"{self.where}{key} {value!r} isn't supported; supported: {supported}")


def read_hparams(directory: Path, config: Mapping[str, Any] | None = None) -> LlavaParams:
    """Reads and checks ``config.json``.

    Args:
        directory: The checkpoint directory.
        config: What the file says, where it is in other terms than Hugging Face's.

    Returns:
        The hyper-parameters, complete and consistent.

    Raises:
        ConversionError: A model, a tower, a projector or a feature this converter doesn't support, each by name; a value
            that is missing, of the wrong type or contradicts another.
    """
    path = directory / "config.json"
    root = _Section(f"{path}: ", read_json(path) if config is None else config, {})
    family = _family(path, root)
    for section in (root, root.section("text_config")):
        if section.get("quantization_config"):
            method = section.section("quantization_config").get("quant_method")
            raise ConversionError(
                f"{section.where}quantization_config: weights quantised by {method!r} aren't supported; "
                "convert the unquantised checkpoint"
            )
    warnings: list[str] = []
    text = _text_params(root, family, warnings)
    return LlavaParams(text, _vision_params(root, family), _token_ids(root), tuple(warnings))


def _family(path: Path, root: _Section) -> _Family:
    """The class of the model, by its architecture, and by its model_type where a config names none."""
    architectures = root.get("architectures") or []
    for model_type, family in _FAMILIES.items():
        if architectures == [family.architecture] or (not architectures and root.get("model_type") == model_type):
            return family
    named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else architectures
    raise ConversionError(
        f"{path}: architecture {named or root.get('model_type')!r} isn't supported; "
        f"supported: {', '.join(family.architecture for family in _FAMILIES.values())}"
    )


def _token_ids(root: _Section) -> dict[str, int]:
    """Token ids config.json names, for tokenizers that name none."""
    text = root.section("text_config")
    ids: dict[str, int] = {}
    for kind in ("bos", "eos", "pad", "unk"):
        key = f"{kind}_token_id"
        value = text.get(key) if text.get(key) is not None else root.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, int) and value >= 0:
            ids[kind] = value
    return ids


def _text_params(root: _Section, family: _Family, warnings: list[str]) -> TextParams:
    section = root.section("text_config")
    kind = section.get("model_type") or family.text
    if kind not in _TEXT_DEFAULTS:
        raise section.refuse("model_type", kind, ", ".join(_TEXT_DEFAULTS))
    text = _Section(section.where, section.values, _TEXT_DEFAULTS[kind])
    if (act := text.get("hidden_act") or "silu") != "silu":
        raise text.refuse("hidden_act", act, "silu")
    if (partial := text.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise text.refuse("partial_rotary_factor", partial, "1")
    n_embd, n_head = text.integer("hidden_size"), text.integer("num_attention_heads")
    n_head_kv = n_head if text.get("num_key_value_heads") is None else text.integer("num_key_value_heads")
    head_dim = n_embd // n_head if text.get("head_dim") is None else text.integer("head_dim")
    if text.get("head_dim") is None and n_embd % n_head:
        raise ConversionError(f"{text.where}hidden_size {n_embd} isn't a multiple of num_attention_heads {n_head}")
    if n_head % n_head_kv:
        raise ConversionError(
            f"{text.where}num_attention_heads {n_head} isn't a multiple of num_key_value_heads {n_head_kv}"
        )
    if head_dim % 2:
        raise ConversionError(f"{text.where}head_dim {head_dim} is odd, rotary embedding needs pairs")
    if kind == "qwen2" and head_dim * n_head != n_embd:
        raise ConversionError(
            f"{text.where}qwen2 needs head_dim * num_attention_heads = hidden_size, got {head_dim} * {n_head} "
            f"and {n_embd}"
        )
    theta, scaling = _rope(text, kind, warnings)
    attention_bias = kind == "llama" and text.flag("attention_bias", False)
    return TextParams(
        arch="qwen2" if kind == "qwen2" else "llama",
        n_vocab=text.integer("vocab_size"),
        n_ctx=_context(text, kind, scaling, warnings),
        n_embd=n_embd,
        n_ff=text.integer("intermediate_size"),
        n_layer=text.integer("num_hidden_layers"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        rms_eps=text.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=attention_bias or kind == "qwen2",
        o_bias=attention_bias,
        mlp_bias=kind == "llama" and text.flag("mlp_bias", False),
        # transformers 4 ties by the text config, 5 by the outer one
        tied=text.flag("tie_word_embeddings", False) or root.flag("tie_word_embeddings", False),
    )


def _context(text: _Section, kind: str, scaling: RopeScaling | None, warnings: list[str]) -> int:
    """Context length; a sliding window bounds it, for up to there full attention gives the same result."""
    n_ctx = text.integer("max_position_embeddings")
    if scaling is not None and scaling.kind == "yarn":
        # some configurations name the context before scaling, some the one after
        n_ctx = max(n_ctx, int(scaling.factor * scaling.original_context))
    explicit_none = kind == "mistral" and "sliding_window" in text.values and text.values["sliding_window"] is None
    windowed = (kind == "mistral" and not explicit_none) or (kind == "qwen2" and text.flag("use_sliding_window", False))
    if windowed and text.integer("sliding_window") < n_ctx:
        window = text.integer("sliding_window")
        warnings.append(
            f"the model attends over a sliding window of {window} tokens, which isn't supported; "
            f"the context length is written as {window} instead of {n_ctx}, where it makes no difference"
        )
        return window
    return n_ctx


def _rope(text: _Section, kind: str, warnings: list[str]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    parameters = text.section("rope_parameters")
    legacy = text.section("rope_scaling")
    section = parameters if parameters.values else legacy
    theta_owner = next((s for s in (parameters, text, legacy) if s.get("rope_theta") is not None), None)
    theta = 10000.0 if theta_owner is None else theta_owner.number("rope_theta")
    scaling = section.get("rope_type") or section.get("type") or "default"
    if section.get("mrope_section") is not None:
        raise section.refuse("mrope_section", section.get("mrope_section"), "positions with one axis (this is M-RoPE)")
    if scaling == "default":
        return theta, None
    if scaling == "linear":
        return theta, RopeScaling("linear", section.number("factor"))
    if scaling == "dynamic":
        n_ctx = text.integer("max_position_embeddings")
        warnings.append(
            f"rope_type 'dynamic' changes the rotary base with the length of the text beyond {n_ctx} tokens, "
            f"which isn't supported; the context length stays {n_ctx}, up to which it makes no difference"
        )
        return theta, None
    if scaling == "yarn":
        return theta, _yarn(text, section)
    if scaling == "llama3" and kind != "qwen2":
        result = RopeScaling(
            "llama3",
            section.number("factor"),
            section.number("low_freq_factor"),
            section.number("high_freq_factor"),
            _original_context(text, section),
        )
        if result.low_freq_factor >= result.high_freq_factor:
            raise ConversionError(
                f"{section.where}low_freq_factor {result.low_freq_factor} must be below high_freq_factor "
                f"{result.high_freq_factor}"
            )
        return theta, result
    raise section.refuse("rope_type", scaling, "default, linear, dynamic, yarn" + ("" if kind == "qwen2" else ", llama3"))


def _original_context(text: _Section, section: _Section) -> int:
    """Context length before scaling."""
    key = "original_max_position_embeddings"
    owner = next((one for one in (text, section) if one.get(key) is not None), None)
    return text.integer("max_position_embeddings") if owner is None else owner.integer(key)


def _yarn(text: _Section, section: _Section) -> RopeScaling:
    """YaRN as transformers has it, as far as llama.cpp can say it."""
    original = _original_context(text, section)
    factor = text.integer("max_position_embeddings") / original if section.get("factor") is None else section.number("factor")
    # llama.cpp reads neither bound for these architectures, and always rounds
    for key, fixed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if section.get(key) not in (None, fixed):
            raise section.refuse(key, section.get(key), f"{fixed}, llama.cpp's")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if section.get("attention_factor") is not None:
        attention = section.number("attention_factor")
    elif section.get("mscale") and section.get("mscale_all_dim"):
        attention = magnitude(section.number("mscale")) / magnitude(section.number("mscale_all_dim"))
    else:
        attention = magnitude(1)
    return RopeScaling("yarn", factor, original_context=original, attn_factor=attention / magnitude(1))


def _vision_params(root: _Section, family: _Family) -> VisionParams:
    section = root.section("vision_config")
    kind = section.get("model_type") or family.tower
    if kind not in _VISION_DEFAULTS:
        raise section.refuse("model_type", kind, ", ".join(_VISION_DEFAULTS))
    siglip = kind == "siglip_vision_model"
    defaults = _VISION_DEFAULTS[kind] if section.values else {**_VISION_DEFAULTS[kind], **family.no_vision}
    vision = _Section(section.where, section.values, defaults)
    act = vision.get("hidden_act")
    if act not in ("quick_gelu", "silu", *_GELU_TANH):
        raise vision.refuse("hidden_act", act, ", ".join(("quick_gelu", "silu", *_GELU_TANH)))
    if (channels := vision.integer("num_channels")) != 3:
        raise vision.refuse("num_channels", channels, "3")
    n_embd, n_head, n_layer = (
        vision.integer(f"{key}") for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if n_embd % n_head:
        raise ConversionError(f"{vision.where}hidden_size {n_embd} isn't a multiple of num_attention_heads {n_head}")
    image_size, patch_size = vision.integer("image_size"), vision.integer("patch_size")
    if patch_size > image_size:
        raise ConversionError(f"{vision.where}patch_size {patch_size} is larger than image_size {image_size}")
    if (projector := root.get("projector_hidden_act") or "gelu") not in _GELU_TANH:
        raise root.refuse("projector_hidden_act", projector, ", ".join(_GELU_TANH))
    expected = "full" if siglip else "default"
    if (strategy := root.get("vision_feature_select_strategy") or family.select_strategy) != expected:
        why = "SigLIP has no class token to drop" if siglip else "llama.cpp always drops the class token"
        raise root.refuse("vision_feature_select_strategy", strategy, f"{expected} ({why})")
    return VisionParams(
        siglip,
        n_embd,
        vision.integer("intermediate_size"),
        n_layer,
        n_head,
        image_size,
        patch_size,
        act,
        vision.number("layer_norm_eps"),
        _feature_layers(root, family, n_layer),
        root.flag("multimodal_projector_bias", True),
        _anyres(root, family, image_size) if family.layout else None,
    )


def _anyres(root: _Section, family: _Family, image_size: int) -> Anyres:
    """Tiles of an image, each the tower's image."""
    value = root.get("image_grid_pinpoints") or family.pinpoints
    key = f"{root.where}image_grid_pinpoints"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConversionError(f"{key} must be a list of sizes, got {value!r}")
    for size in value:
        # bool is an int
        if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int for side in size):
            raise ConversionError(f"{key}: {size!r} isn't a height and a width")
        if any(side <= 0 or side % image_size for side in size) or size[0] * size[1] > image_size**2 * _MAX_TILES:
            raise ConversionError(
                f"{key}: {size!r} isn't made of 1 to {_MAX_TILES} of the tower's images of {image_size} pixels"
            )
    max_tiles = 0
    if family.layout == "llava_onevision":
        ratio = root.get("vision_aspect_ratio") or "anyres_max_9"
        match = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio) if isinstance(ratio, str) else None
        if match is None:
            raise root.refuse("vision_aspect_ratio", ratio, "anyres_max_N")
        max_tiles = int(match[1])
    return Anyres(family.layout, tuple((height, width) for height, width in value), max_tiles)


def _feature_layers(root: _Section, family: _Family, n_layer: int) -> tuple[int, ...]:
    """Hidden states the projector reads, counted from 0."""
    value = root.get("vision_feature_layer")
    chosen = [family.feature_layer] if value is None else value if isinstance(value, list) else [value]
    layers: list[int] = []
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layer - 1 <= layer <= n_layer:
            raise ConversionError(
                f"{root.where}vision_feature_layer {value!r}: {layer!r} isn't one of the {n_layer + 1} hidden states"
            )
        layers.append(layer if layer >= 0 else n_layer + 1 + layer)
    if not layers or any(b <= a for a, b in zip(layers, layers[1:])):
        raise root.refuse(
            "vision_feature_layer",
            value,
            "one layer, or several from shallow to deep, the order in which llama.cpp joins them",
        )
    return tuple(layers)
