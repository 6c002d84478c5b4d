"""Lazy-layer specifications: text to layer numbers, layer numbers to leaders. Standard library only."""

import re
from collections.abc import Iterable, Sequence

# what the names of the GGUF keys of lazy layers begin with; other `qcache.*` keys are the tokenizer's
LAZY_KEYS = ("qcache.version", "qcache.lazy.", "qcache.calibration.")
NO_ATTENTION = -1  # in place of a leader: the layer is dropped, it has no attention
_RANGE = re.compile(r"(drop\s*:\s*)?(\d+)(?:\s*-\s*(\d+))?", re.IGNORECASE)


def parse_layers(spec: str, n_layer: int) -> tuple[list[int], list[int]]:
    """Parses a specification of lazy and dropped layers such as ``9-15,18,drop:20-22,drop:25``.

    Args:
        spec: ``none``, or comma-separated layer numbers and inclusive ranges, counted from 0; ``drop:`` before one makes those
            layers lose their attention, and counts for that one alone.
        n_layer: Number of decoder layers of the model.

    Returns:
        The lazy layers and the dropped ones, each in ascending order; empty for ``none``.

    Raises:
        ValueError: The text is malformed, a range is reversed, a layer is out of range or named twice, or layer 0 is
            lazy: it has no layer before it that could be its leader.
    """
    if spec.strip().lower() == "none":
        return [], []
    lazy: list[int] = []
    dropped: list[int] = []
    for part in spec.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"lazy layers {spec!r}: {part.strip()!r} is neither a layer number nor a range like 9-15, nor drop: and one of them"
            )
        first = int(match[2])
        last = first if match[3] is None else int(match[3])
        if last < first:
            raise ValueError(f"lazy layers {spec!r}: the range {first}-{last} is reversed")
        if last >= n_layer:
            raise ValueError(
                f"lazy layers {spec!r}: layer {last} is out of range, the model has layers 0 to {n_layer - 1}"
            )
        (lazy if match[1] is None else dropped).extend(range(first, last + 1))
    return sorted(_checked(lazy, n_layer, "lazy")), sorted(_checked(dropped, n_layer, "dropped"))


def leaders_of(layers: str | Iterable[int], n_layer: int, dropped: Iterable[int] = ()) -> list[int]:
    """Gives the leader of each layer: itself for a full layer, the nearest full layer before it for a lazy one.

    Args:
        layers: Lazy layers, in any order, or a specification as ``parse_layers`` takes it.
        n_layer: Number of decoder layers of the model.
        dropped: Layers without attention, in any order; lazy layers find their leader across them.

    Returns:
        ``n_layer`` leaders, the value of the GGUF key ``qcache.lazy.leader``; ``NO_ATTENTION`` for a dropped layer.

    Raises:
        ValueError: As ``parse_layers``; or a layer is both, or lazy without a full layer before it.
    """
    gone = _checked(list(dropped), n_layer, "dropped")
    if isinstance(layers, str):
        layers, named = parse_layers(layers, n_layer)
        gone |= set(named)
    lazy = _checked(list(layers), n_layer, "lazy")
    if both := sorted(lazy & gone):
        raise ValueError(f"layer {both[0]} can't be both lazy and dropped")
    leaders: list[int] = []
    leader = NO_ATTENTION
    for layer in range(n_layer):
        if layer in lazy and leader == NO_ATTENTION:
            raise ValueError(f"layer {layer} can't be lazy: every layer before it is dropped, none could be its leader")
        if layer not in lazy and layer not in gone:
            leader = layer
        leaders.append(NO_ATTENTION if layer in gone else leader)
    return leaders


def lazy_of(leaders: Sequence[int]) -> list[int]:
    """The lazy layers, ascending."""
    return [layer for layer, leader in enumerate(leaders) if leader not in (layer, NO_ATTENTION)]


def dropped_of(leaders: Sequence[int]) -> list[int]:
    """The layers without attention, ascending."""
    return [layer for layer, leader in enumerate(leaders) if leader == NO_ATTENTION]


def spec_of(leaders: Sequence[int]) -> str:
    """The specification that ``leaders_of`` makes these leaders of."""
    parts = [*_ranges(lazy_of(leaders)), *(f"drop:{part}" for part in _ranges(dropped_of(leaders)))]
    return ",".join(parts) or "none"


def _ranges(layers: list[int]) -> list[str]:
    """Ascending layers as numbers and ranges."""
    starts = [layer for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer - 1]
    ends = [layer for i, layer in enumerate(layers) if i == len(layers) - 1 or layers[i + 1] != layer + 1]
    return [str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends)]


def _checked(layers: list[int], n_layer: int, kind: str) -> set[int]:
    """Returns the layers as a set once each is known to be valid and named once."""
    seen: set[int] = set()
    for layer in layers:
        if layer == 0 and kind == "lazy":
            raise ValueError("layer 0 can't be lazy: no layer before it could be its leader")
        if not 0 <= layer < n_layer:
            raise ValueError(f"{kind} layer {layer} is out of range, the model has layers 0 to {n_layer - 1}")
        if layer in seen:
            raise ValueError(f"{kind} layer {layer} is named twice")
        seen.add(layer)
    return seen
