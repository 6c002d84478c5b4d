"""PEFT LoRA adapters merged into a checkpoint while it streams: W + scale * B A in float32, and whole tensors where a module was trained.

`fan_in_fan_out` needs nothing: PEFT itself drops it for linear layers, and these models have no others.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import read_first
from .errors import ConversionError
from .jsonfile import read_json
from .tensor_entry import ITEM_SIZE, LowRank, TensorEntry
from .tensor_names import canonical_name

# say where the adapter comes from, how it was trained, or which modules it has: its tensors tell those
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "alpha_pattern", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# others, such as PiSSA, change the base weights too
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_PAIR = re.compile(r"(.+)\.lora_(?:(embedding)_)?([AB])(?:\.default)?(?(2)|\.weight)")
# PEFT saves the untouched part of an adapted embedding too: its vocabulary may have grown
_WHOLE = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.weight$|\.bias$)")


def merge_adapters(tensors: Mapping[str, TensorEntry], directories: Sequence[Path]) -> dict[str, TensorEntry]:
    """Merges adapters, one after the other.

    Args:
        tensors: The checkpoint's tensors by canonical name.
        directories: Adapters, each with an adapter_config.json and adapter_model.safetensors or .bin; non_lora_trainables.bin, as
            the original LLaVA saves its projector, is read too.

    Returns:
        The tensors with those that an adapter changes replaced.

    Raises:
        ConversionError: No adapter, one of another kind than LoRA or with a feature that isn't understood, by name; a tensor that
            has no partner or fits no tensor of the checkpoint.
    """
    merged = dict(tensors)
    changed: dict[str, Path] = {}
    for directory in directories:
        for name, entry in _merged(merged, directory).items():
            if name in changed and entry.path != merged[name].path:
                raise ConversionError(f"{entry.path}: {entry.name!r} takes the place of a tensor that {changed[name]} changes already")
            merged[name] = entry
            changed[name] = directory
    return merged


def _merged(tensors: Mapping[str, TensorEntry], directory: Path) -> dict[str, TensorEntry]:
    """The tensors that one adapter changes, by canonical name."""
    if not directory.is_dir():
        raise ConversionError(f"{directory}: isn't a directory of a LoRA adapter")
    path = directory / "adapter_config.json"
    config = _checked_config(path)
    entries = list(read_first(directory, ("adapter_model.safetensors", "adapter_model.bin")).values())
    if (directory / "non_lora_trainables.bin").exists():
        entries += read_first(directory, ("non_lora_trainables.bin",)).values()
    pairs = _pairs(entries)
    result: dict[str, TensorEntry] = {}
    for entry in entries:
        if _PAIR.fullmatch(entry.name) is None:
            name = canonical_name(_WHOLE.sub("", _without_prefix(entry.name)))
            # a tied model's output matrix may be trained apart, and the original LLaVA's base has no projector
            if name in result or (name not in tensors and name != "lm_head.weight" and not name.startswith("projector.")):
                raise ConversionError(f"{entry.path}: {entry.name!r} is neither a LoRA matrix nor a tensor of the checkpoint")
            result[name] = entry
    for module, (a, b, embedding) in pairs.items():
        name = canonical_name(f"{module}.weight")
        base = result.get(name, tensors.get(name))
        if base is None:
            raise ConversionError(f"{a.path}: adapts {module!r}, which the checkpoint doesn't have")
        rank = _by_pattern(path, config, "rank_pattern", module, config.get("r"))
        alpha = _by_pattern(path, config, "alpha_pattern", module, config.get("lora_alpha"))
        _check_shapes(module, base, a, b, rank, embedding)
        delta = LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), embedding)
        result[name] = replace(base, deltas=(*base.deltas, delta))
    return result


def _check_shapes(module: str, base: TensorEntry, a: TensorEntry, b: TensorEntry, rank: int, embedding: bool) -> None:
    """Refuses factors that don't fit the matrix, or each other."""
    if len(base.shape) != 2:
        raise ConversionError(f"{a.path}: adapts {module!r} of shape {list(base.shape)}; only linear layers and embeddings are supported")
    for half in (a, b):
        if half.dtype not in ITEM_SIZE:
            raise ConversionError(f"{half.path}: tensor {half.name!r} is of type {half.dtype}; supported: {', '.join(ITEM_SIZE)}")
    # an embedding's A has the vocabulary as its inputs, the rows of its base
    n_out, n_in = base.shape[::-1] if embedding else base.shape
    if a.shape != (rank, n_in) or b.shape != (n_out, rank):
        raise ConversionError(
            f"{a.path}: {a.name!r} has shape {list(a.shape)} and {b.name!r} {list(b.shape)}; rank {rank} and the checkpoint's "
            f"{list(base.shape)} need {[rank, n_in]} and {[n_out, rank]}"
        )


def _checked_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(f"{path}: peft_type {kind!r} isn't supported; supported: LORA")
    # a key this version doesn't know is no matter as long as it's off
    for key, value in config.items():
        if key not in _NEUTRAL and value and not (key == "bias" and value == "none"):
            what = "DoRA" if key == "use_dora" else key
            raise ConversionError(f"{path}: {what} isn't supported ({key} is {value!r})")
    if (init := config.get("init_lora_weights")) not in _PLAIN_INITS:
        raise ConversionError(f"{path}: init_lora_weights {init!r} isn't supported: such adapters fit changed base weights")
    return config


def _by_pattern(path: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT looks it up."""
    value, patterns = default, config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise ConversionError(f"{path}: {key} must be an object, got {patterns!r}")
    for pattern, given in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = given
                break
        except re.error as error:
            raise ConversionError(f"{path}: {key} {pattern!r} isn't a regular expression: {error}") from error
    whole = key == "rank_pattern"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < float("inf"):
        name = "rank" if whole else "lora_alpha"
        raise ConversionError(f"{path}: {name} of {module!r} must be a positive {'integer' if whole else 'number'}, got {value!r}")
    return value


def _pairs(entries: Iterable[TensorEntry]) -> dict[str, tuple[TensorEntry, TensorEntry, bool]]:
    """A and B of each module, and whether it is an embedding."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    embeddings: set[str] = set()
    for entry in entries:
        match = _PAIR.fullmatch(entry.name)
        if match is None:
            if "lora_magnitude_vector" in entry.name:
                raise ConversionError(f"{entry.path}: {entry.name!r}: DoRA isn't supported")
            continue
        module = _without_prefix(match[1])
        halves.setdefault(module, {})[match[3]] = entry
        if match[2]:
            embeddings.add(module)
    for module, found in halves.items():
        if len(found) < 2:
            (entry,) = found.values()
            raise ConversionError(f"{entry.path}: {entry.name!r} has no partner: {module!r} needs a lora_A and a lora_B")
    return {module: (found["A"], found["B"], module in embeddings) for module, found in halves.items()}


def _without_prefix(name: str) -> str:
    return name.removeprefix("base_model.model.")
