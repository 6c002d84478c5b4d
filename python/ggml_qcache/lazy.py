"""Which layers are lazy or dropped: from the arguments of ``Llama`` and the model file to leaders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

from ggml_qcache_convert.lazy_layers import dropped_of, lazy_of, leaders_of

from .native import ModelInfo


class LazyInfo(NamedTuple):
    """The lazy and dropped layers in force.

    Attributes:
        mode: ``"off"``, ``"visual"`` or ``"global"``.
        leader: Leader of each layer; a layer that is its own leader is full, one with -1 is dropped: it has no attention.
    """

    mode: str
    leader: tuple[int, ...]

    @property
    def n_lazy(self) -> int:
        """How many layers are lazy."""
        return len(lazy_of(self.leader))

    @property
    def n_dropped(self) -> int:
        """How many layers have no attention."""
        return len(dropped_of(self.leader))


def resolve_lazy(
    lazy_layers: Union[str, Sequence[int], None], lazy_mode: Optional[str], info: ModelInfo
) -> tuple[Optional[str], Optional[list[int]]]:
    """Turns the arguments of ``Llama`` into those of a context.

    Args:
        lazy_layers: As ``Llama`` takes it.
        lazy_mode: Likewise.
        info: What the file says.

    Returns:
        Mode and leaders; None: the file's.

    Raises:
        ValueError: Layers that break the rules, an unknown mode, or a mode where every layer is full.
    """
    if lazy_mode is not None and lazy_mode not in ("visual", "global"):
        raise ValueError(f"lazy_mode={lazy_mode!r} is neither 'visual' nor 'global'")
    if isinstance(lazy_layers, str) and lazy_layers.strip().lower() == "auto":
        if lazy_mode is not None and info.lazy_mode == "off":
            raise ValueError(f"lazy_mode={lazy_mode!r}, but the file has no lazy layers: name them with lazy_layers")
        return lazy_mode, None
    leaders = leaders_of(() if lazy_layers is None else lazy_layers, info.n_layer)
    if leaders == list(range(info.n_layer)):
        if lazy_mode is not None:
            raise ValueError(f"lazy_mode={lazy_mode!r} with lazy_layers={lazy_layers!r}: no layer is lazy")
        return "off", None
    file_mode = info.lazy_mode if info.lazy_mode != "off" else "visual"
    return lazy_mode or file_mode, leaders
