"""Lazy-layer specifications: text to layer numbers, layer numbers to leaders. Standard library only."""

import re
from collections.abc import Iterable

# what the names of the GGUF keys of lazy layers begin with; other `qcache.*` keys are the tokenizer's
LAZY_KEYS = ("qcache.version", "qcache.lazy.", "qcache.calibration.")
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def parse_layers(spec: str, n_layer: int) -> list[int]:
    """Parses a lazy-layer specification such as ``9-15,18,20-31``.

    Args:
        spec: ``none``, or comma-separated layer numbers and inclusive ranges, counted from 0.
        n_layer: Number of decoder layers of the model.

    Returns:
        The lazy layers in ascending order; empty for ``none``.

    Raises:
        ValueError: The text is malformed, a range is reversed, a layer is out of range or named twice, or layer 0 is
            named: it has no layer before it that could be its leader.
    """
    if spec.strip().lower() == "none":
        return []
    layers: list[int] = []
    for part in spec.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"lazy layers {spec!r}: {part.strip()!r} is neither a layer number nor a range like 9-15")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ValueError(f"lazy layers {spec!r}: the range {first}-{last} is reversed")
        if last >= n_layer:
            raise ValueError(
                f"lazy layers {spec!r}: layer {last} is out of range, the model has layers 0 to {n_layer - 1}"
            )
        layers.extend(range(first, last + 1))
    return sorted(_checked(layers, n_layer))


def leaders_of(lazy_layers: Iterable[int], n_layer: int) -> list[int]:
    """Gives the leader of each layer: itself for a full layer, the nearest full layer before it for a lazy one.

    Args:
        lazy_layers: Lazy layers, in any order.
        n_layer: Number of decoder layers of the model.

    Returns:
        ``n_layer`` leaders, the value of the GGUF key ``qcache.lazy.leader``.

    Raises:
        ValueError: A layer is out of range or named twice, or layer 0 is lazy.
    """
    lazy = _checked(list(lazy_layers), n_layer)
    leaders: list[int] = []
    for layer in range(n_layer):
        leaders.append(leaders[-1] if layer in lazy else layer)
    return leaders


def _checked(layers: list[int], n_layer: int) -> set[int]:
    """Returns the layers as a set once each is known to be valid and named once."""
    seen: set[int] = set()
    for layer in layers:
        if layer == 0:
            raise ValueError("layer 0 can't be lazy: no layer before it could be its leader")
        if not 0 < layer < n_layer:
            raise ValueError(f"lazy layer {layer} is out of range, the model has layers 0 to {n_layer - 1}")
        if layer in seen:
            raise ValueError(f"lazy layer {layer} is named twice")
        seen.add(layer)
    return seen
