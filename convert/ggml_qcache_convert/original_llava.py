"""Checkpoints as the original LLaVA repository saves them, told in Hugging Face's terms.

There the language model's configuration is the root with `mm_*` keys among it, the projector is `model.mm_projector`, and the
vision tower is another checkpoint, named by `mm_vision_tower`. A LoRA of it holds the configuration and the projector itself, and
its base is a plain language model.

| stored                                        | canonical                                    |
|-----------------------------------------------|----------------------------------------------|
| `model.X`                                     | `text.X`                                     |
| `model.mm_projector.0.X`, `.2.X`              | `projector.linear_1.X`, `projector.linear_2.X` |
| `model.mm_projector.X` of type `linear`       | `projector.linear.X`                         |
| `model.vision_tower.vision_tower.vision_model.X` | `vision.X` (a tower that was trained too)  |
| `vision_model.X` of the vision tower          | `vision.X`                                   |
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import ConversionError
from .jsonfile import read_json, read_json_if_present
from .tensor_entry import TensorEntry

# transformers' kind of language model by model_type
_TEXT = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_ARCHITECTURES = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
_TOWER = re.compile(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)")
# of a whole CLIP; the tower is half of it
_TEXT_TOWER = re.compile(r"text_model\..+|logit_scale|(?:text|visual)_projection\.weight")


@dataclass(frozen=True)
class Source:
    """Where the parts of a model are.

    Attributes:
        config_path: Directory of config.json.
        config: Its content, in Hugging Face's terms.
        images_path: Directory of the image processor's configuration.
        tower: Tensors of a vision tower outside the checkpoint, by canonical name.
    """

    config_path: Path
    config: Mapping[str, Any]
    images_path: Path
    tower: Mapping[str, TensorEntry] = field(default_factory=dict)


def find_source(directory: Path, vision_tower: Path | None, adapters: Sequence[Path]) -> Source:
    """Finds the parts of a model, in Hugging Face's layout or in the original one.

    Args:
        directory: The checkpoint directory.
        vision_tower: Directory of the vision tower; needed with the original layout, which only names it.
        adapters: LoRA adapters; where the directory is a plain language model, one of them may have LLaVA's configuration.

    Raises:
        ConversionError: A file is missing or damaged; the tower is missing, or given where the checkpoint has its own; a key of the
            original configuration that isn't supported, by name.
    """
    where, config = directory, read_json(directory / "config.json")
    if not _is_original(config) and "vision_config" not in config:
        for adapter in adapters:
            if _is_original(own := read_json_if_present(adapter / "config.json")):
                where, config = adapter, own
    if not _is_original(config):
        if vision_tower is not None:
            raise ConversionError(f"{directory / 'config.json'}: the checkpoint has its own vision tower, {vision_tower} isn't needed")
        return Source(where, config, directory)
    path = where / "config.json"
    if vision_tower is None:
        raise ConversionError(
            f"{path}: the vision tower {config.get('mm_vision_tower')!r} isn't in the checkpoint: name its directory, or this name on "
            "the Hub, with --vision-tower"
        )
    tower_config = read_json(vision_tower / "config.json")
    vision = tower_config.get("vision_config") if tower_config.get("model_type") == "clip" else tower_config
    return Source(where, _translated(path, config, vision), vision_tower, _tower_tensors(vision_tower))


def _is_original(config: Mapping[str, Any]) -> bool:
    return "mm_vision_tower" in config


def _translated(path: Path, config: Mapping[str, Any], vision: Any) -> dict[str, Any]:
    """The configuration as LlavaConfig has it."""

    def supported(key: str, value: Any, *values: Any) -> None:
        if value not in values:
            raise ConversionError(f"{path}: {key} {value!r} isn't supported; supported: {', '.join(map(repr, values))}")

    supported("architectures", config.get("architectures"), None, [], *([name] for name in _ARCHITECTURES))
    model_type = config.get("model_type")
    supported("model_type", model_type, *_TEXT)
    # the original's own default
    supported("mm_projector_type", config.get("mm_projector_type", "linear"), "mlp2x_gelu", "linear")
    supported("mm_resampler_type", config.get("mm_resampler_type"), None)
    supported("image_aspect_ratio", config.get("image_aspect_ratio", "square"), "pad", "square")
    supported("mm_use_im_start_end", config.get("mm_use_im_start_end", False), False)
    supported("s2", config.get("s2", False), False)
    feature = config.get("mm_vision_select_feature", "patch")
    supported("mm_vision_select_feature", feature, "patch")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**config, "model_type": _TEXT[model_type]},
        "vision_config": vision,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }


def _tower_tensors(directory: Path) -> dict[str, TensorEntry]:
    """Tensors of a CLIP vision tower, or of the vision half of a CLIP, by canonical name."""
    result = {}
    for name, entry in Checkpoint(directory).tensors.items():
        match = _TOWER.fullmatch(name)
        if match is not None and match[1] != "embeddings.position_ids":  # a buffer that old versions saved
            result[f"vision.{match[1]}"] = entry
        elif match is None and not _TEXT_TOWER.fullmatch(name):
            raise ConversionError(f"{entry.path}: tensor {name!r} belongs to no CLIP vision tower")
    return result
