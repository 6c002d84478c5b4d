"""What ``qcache validate`` does: checks our keys and tensors in a text GGUF against docs/gguf.md."""

from __future__ import annotations

import math
import os

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from ggml_qcache_convert.lazy_keys import ATTENTION
from ggml_qcache_convert.lazy_layers import LAZY_KEYS, NO_ATTENTION, dropped_of, lazy_of, leaders_of

from .gguf_file import read_gguf, value

_ARRAYS = {
    "qcache.lazy.js_divergence": 1,
    "qcache.calibration.pair_divergence": 2,
    "qcache.calibration.output_error": 1,
    "qcache.calibration.drop_error": 1,
    "qcache.calibration.corrected_error": 1,
}
_NEEDED = {"qcache.version": GGUFValueType.UINT32, "qcache.lazy.mode": GGUFValueType.STRING, "qcache.lazy.leader": GGUFValueType.ARRAY}

_TOKENIZER = {"qcache.tokenizer.prepend_scheme": ("first", "always"), "qcache.tokenizer.normalizer": ("NFC",)}


def validate_file(path: str | os.PathLike[str]) -> list[str]:
    """Checks a text GGUF.

    Args:
        path: The file.

    Returns:
        What is wrong with it, a sentence each; none for a plain model.

    Raises:
        FileError, ModelError: It can't be read as GGUF.
    """
    reader = read_gguf(os.fspath(path))
    architecture = value(reader, "general.architecture")
    n_layer = value(reader, f"{architecture}.block_count")
    if not isinstance(n_layer, int) or n_layer < 1:
        return [f"{architecture!r} is no text model: {architecture}.block_count is {n_layer!r}"]
    lazy = [name for name in reader.fields if name.startswith(LAZY_KEYS)]
    problems = [f"architecture {architecture!r} isn't llama or qwen2"] if lazy and architecture not in ("llama", "qwen2") else []
    problems += _key_problems(reader, n_layer) if lazy else []
    for name, known in _TOKENIZER.items():
        if value(reader, name) not in (None, *known):
            problems.append(f"{name} is {value(reader, name)!r}, expected {' or '.join(known)}")
    leader = value(reader, "qcache.lazy.leader", list(range(n_layer)))
    return problems + _tensor_problems(reader, architecture, n_layer, leader, value(reader, "qcache.lazy.mode", "off"))


def _key_problems(reader: GGUFReader, n_layer: int) -> list[str]:
    problems = []
    for name, kind in _NEEDED.items():
        field = reader.get_field(name)
        if field is None:
            problems.append(f"{name} is missing")
        elif field.types[0] != kind:
            problems.append(f"{name} is of type {field.types[0].name}, expected {kind.name}")
    if problems:
        return problems
    version, mode, leader = (value(reader, name) for name in _NEEDED)
    if version not in (1, 2):
        problems.append(f"qcache.version is {version}, known are 1 and 2")
    if mode not in ("visual", "global"):
        problems.append(f"qcache.lazy.mode is {mode!r}, expected visual or global")
    if reader.get_field("qcache.lazy.leader").types[-1] != GGUFValueType.INT32:
        problems.append(f"qcache.lazy.leader is an array of {reader.get_field('qcache.lazy.leader').types[-1].name}, expected INT32")
    if len(leader) != n_layer:
        problems.append(f"qcache.lazy.leader has {len(leader)} values for {n_layer} layers")
    else:
        problems += _leader_problems(leader, version)
    for name, power in _ARRAYS.items():
        values = value(reader, name)
        if values is not None and len(values) != n_layer**power:
            problems.append(f"{name} has {len(values)} values, expected {n_layer**power}")
        elif values is not None and not all(math.isfinite(v) and v >= -1e-6 for v in values):
            problems.append(f"{name} has values that are negative or not finite")
    return problems


def _leader_problems(leader: list[int], version: int) -> list[str]:
    for layer, of in enumerate(leader):
        if of == NO_ATTENTION:
            if version == 1:
                return [f"layer {layer} has no attention, which version 1 of the format has not"]
        elif not 0 <= of <= layer:
            return [f"leader {of} of layer {layer} is not among 0 to {layer}, nor {NO_ATTENTION}"]
        elif leader[of] == NO_ATTENTION:
            return [f"leader {of} of layer {layer} has no attention"]
        elif leader[of] != of:
            return [f"leader {of} of layer {layer} is lazy itself, its leader is {leader[of]}"]
    expected = leaders_of(lazy_of(leader), len(leader), dropped_of(leader))
    return [
        f"leader of layer {layer} is {of}, the nearest full layer before it is {want}"
        for layer, (of, want) in enumerate(zip(leader, expected))
        if of != want
    ]


def _tensor_problems(reader: GGUFReader, architecture: str, n_layer: int, leader: list[int], mode: str) -> list[str]:
    problems = []
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    n_head = value(reader, f"{architecture}.attention.head_count")
    for layer in range(n_layer):
        of = leader[layer] if layer < len(leader) else layer
        lazy, optional = of not in (layer, NO_ATTENTION), ATTENTION if of == NO_ATTENTION else ()
        if lazy and mode == "global":
            optional = ("attn_q", "attn_k")
        for name in ATTENTION:
            if f"blk.{layer}.{name}.weight" not in tensors and name not in optional:
                problems.append(f"blk.{layer}.{name}.weight is missing, and layer {layer} is {f'lazy in {mode} mode' if lazy else 'full'}")
        bias = tensors.get(f"blk.{layer}.attn_vis_bias.weight")
        if bias is not None and (bias.tensor_type != GGMLQuantizationType.F32 or [int(n) for n in bias.shape] != [n_head]):
            shape = [int(n) for n in bias.shape]
            problems.append(f"{bias.name} is {bias.tensor_type.name.lower()} {shape}, expected f32 [{n_head}]")
        elif bias is not None and not all(math.isfinite(v) for v in bias.data):
            problems.append(f"{bias.name} has values that are not finite")
    return problems
