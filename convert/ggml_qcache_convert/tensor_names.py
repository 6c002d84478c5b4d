"""One canonical name for each tensor of a LLaVA checkpoint, whatever layout it was saved in.

| stored                                                                  | canonical     |
|-------------------------------------------------------------------------|---------------|
| `language_model.model.X`, `model.language_model.X`                      | `text.X`      |
| `language_model.lm_head.X`, `lm_head.X`                                 | `lm_head.X`   |
| `vision_tower.vision_model.X`, `vision_tower.X`, `model.vision_tower.X` | `vision.X`    |
| `multi_modal_projector.X`, `model.multi_modal_projector.X`              | `projector.X` |
| the original LLaVA's `model.X` and `model.mm_projector.X`               | see original_llava.py |
| `image_newline`, `model.image_newline`                                  | `image_newline` |

transformers 4 wrote the first form and from 4.52 on keeps the last in memory; transformers 5 saves `language_model.model.X`
but `vision_tower.X` without `vision_model`.
"""

import re
from collections.abc import Mapping

from .errors import ConversionError
from .tensor_entry import TensorEntry

_RULES = (
    (re.compile(r"model\.((?:layers|embed_tokens|norm)\..+)"), "text."),
    (re.compile(r"model\.mm_projector\.0\.(.+)"), "projector.linear_1."),
    (re.compile(r"model\.mm_projector\.2\.(.+)"), "projector.linear_2."),
    (re.compile(r"model\.mm_projector\.(weight|bias)"), "projector.linear."),
    (re.compile(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)"), "vision."),
    (re.compile(r"(?:model\.)?language_model\.lm_head\.(.+)"), "lm_head."),
    (re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)"), "text."),
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"), "vision."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.(.+)"), "projector."),
    (re.compile(r"lm_head\.(.+)"), "lm_head."),
    (re.compile(r"(?:model\.)?(image_newline)"), ""),
)
# buffers that old versions saved and that follow from the configuration
_DERIVED = re.compile(r"text\..*rotary_emb\.inv_freq|vision\.embeddings\.position_ids")


def canonical_tensors(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Maps canonical names to stored tensors, buffers that follow from the configuration left out.

    Args:
        tensors: Stored tensors by stored name.

    Returns:
        The tensors by canonical name. A name no rule knows stays as it is.

    Raises:
        ConversionError: Two stored tensors have the same canonical name.
    """
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        canonical = canonical_name(name)
        if _DERIVED.fullmatch(canonical):
            continue
        if canonical in result:
            raise ConversionError(
                f"{entry.path}: {name!r} and {result[canonical].name!r} are the same tensor under two names"
            )
        result[canonical] = entry
    return result


def canonical_name(name: str) -> str:
    """The canonical name of a stored tensor; one that no rule knows stays as it is."""
    for pattern, prefix in _RULES:
        match = pattern.fullmatch(name)
        if match:
            return prefix + match[1]
    return name
