"""What will be written: one tensor after the other, type chosen, source checked against the configuration."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from .errors import ConversionError
from .tensor_entry import ITEM_SIZE, TensorEntry


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the GGUF.

    Attributes:
        name: GGUF name.
        shape: Shape with the outermost dimension first, as numpy and safetensors have it (ggml's is reversed).
        qtype: Stored type.
        source: Stored tensor it is read from, or its values.
        importance: Of each input when it is quantised, f32 ``[shape[-1]]``.
        mirrored: The source's rows are followed by their negatives.
        rope_head_dim: Head size when the rows of each head must be reordered for interleaved RoPE, else 0.
    """

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    source: TensorEntry | np.ndarray[Any, np.dtype[np.float32]]
    rope_head_dim: int = 0
    importance: np.ndarray[Any, np.dtype[np.float32]] | None = None
    mirrored: bool = False


class TensorPicker:
    """Takes tensors out of a checkpoint by canonical name, and knows in the end what nobody took."""

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this canonical name."""
        return name in self._tensors

    def take(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """Takes a tensor.

        Args:
            name: Canonical name.
            shape: The shape the configuration implies.

        Raises:
            ConversionError: The checkpoint lacks it, has another shape, or a type that weights can't have.
        """
        entry = self._tensors.get(name)
        if entry is None:
            raise ConversionError(f"the checkpoint has no tensor {name!r} of shape {list(shape)}")
        if entry.shape != shape:
            raise ConversionError(
                f"{entry.path}: tensor {entry.name!r} has shape {list(entry.shape)}, the configuration needs "
                f"{list(shape)}"
            )
        if entry.dtype not in ITEM_SIZE:
            raise ConversionError(f"{entry.path}: tensor {entry.name!r} is of type {entry.dtype}; supported: {', '.join(ITEM_SIZE)}")
        self._taken.add(name)
        return entry

    def skip(self, names: Iterable[str]) -> None:
        """Marks tensors as known, though nothing is written from them."""
        self._taken.update(names)

    def refuse_leftovers(self) -> None:
        """Raises a ConversionError when tensors are left that this kind of model doesn't have: it is of another kind."""
        left = [self._tensors[name] for name in self._tensors if name not in self._taken]
        if left:
            shown = ", ".join(repr(entry.name) for entry in left[:4]) + (", ..." if len(left) > 4 else "")
            raise ConversionError(f"{left[0].path}: {len(left)} tensors that this kind of model doesn't have: {shown}")
