"""What ``qcache diff`` tells of two files: keys, tensors and Lazy Blocks that differ."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize
from ggml_qcache_convert.lazy_layers import dropped_of, lazy_of
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .gguf_file import read_gguf, value

_CHUNK = 1 << 22  # values compared at a time: 16 MB as float32
_COUNTS = ("GGUF.tensor_count", "GGUF.kv_count")  # follow from the rest
_MISSING = "(missing)"


def diff_files(a: str | os.PathLike[str], b: str | os.PathLike[str], advance: Callable[[int], object] = lambda _: None) -> dict[str, Any]:
    """Compares two GGUF files, text or mmproj. The order of keys and tensors doesn't count.

    Args:
        a: A file.
        b: Another.
        advance: Called with the number of bytes compared since the last call; in all the size of the tensors of ``a`` that ``b``
            has too.

    Returns:
        What differs, as ``qcache diff --json`` prints it: ``metadata`` and ``tensors`` (each by name), and ``lazy`` (None when the
        Lazy Blocks are the same). ``same`` is whether nothing does. Where a tensor has the same shape in both, its values are
        compared as floats: ``max_abs_difference`` and, as a scale, ``max_abs`` of ``a``, both over the places where both are finite,
        and ``n_not_finite``, how many of the other places differ. Without these three it is of a type that can't be read as floats.

    Raises:
        FileError, ModelError: A file is missing or damaged.
    """
    first, second = read_gguf(a), read_gguf(b)
    metadata = _metadata(first, second)
    lazy = [_lazy(reader) for reader in (first, second)]
    tensors = _tensors(first, second, advance)
    return {
        "a": os.fspath(a),
        "b": os.fspath(b),
        "same": not metadata and not tensors,
        "metadata": metadata,
        "lazy": None if lazy[0] == lazy[1] else {"a": lazy[0], "b": lazy[1]},
        "tensors": tensors,
    }


def _metadata(first: GGUFReader, second: GGUFReader) -> dict[str, dict[str, Any]]:
    """Keys that one file lacks or that have another type or value, as short texts."""
    found = {}
    for key in dict.fromkeys([*first.fields, *second.fields]):
        fields = [reader.get_field(key) for reader in (first, second)]
        if key in _COUNTS:
            continue
        if fields[0] is None or fields[1] is None:
            found[key] = {side: _MISSING if field is None else _short(field.contents()) for side, field in zip("ab", fields)}
            continue
        (types_a, types_b), (value_a, value_b) = [field.types for field in fields], [field.contents() for field in fields]
        if types_a != types_b:
            found[key] = {side: f"{_short(field.contents())} ({_type(field.types)})" for side, field in zip("ab", fields)}
        elif not _equal(value_a, value_b):
            found[key] = _difference(value_a, value_b)
    return found


def _equal(a: Any, b: Any) -> bool:
    return a == b or repr(a) == repr(b)  # NaN is not itself


def _difference(a: Any, b: Any) -> dict[str, Any]:
    """Both values, or those of the first place where two arrays differ."""
    if not isinstance(a, list) or not isinstance(b, list) or max(len(a), len(b)) <= 8:
        return {"a": _short(a), "b": _short(b)}
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if not _equal(x, y)), min(len(a), len(b)))
    return {
        side: f"{len(values)} values, [{at}] is {_short(values[at])}" if at < len(values) else f"{len(values)} values"
        for side, values in (("a", a), ("b", b))
    }


def _short(content: Any) -> str:
    if isinstance(content, list) and len(content) > 8:
        return f"{len(content)} values"
    text = repr(content)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"


def _type(types: list[GGUFValueType]) -> str:
    return " of ".join(kind.name.lower() for kind in types)


def _lazy(reader: GGUFReader) -> dict[str, Any]:
    """Mode, lazy layers and layers without attention."""
    leader = value(reader, "qcache.lazy.leader")
    leader = leader if isinstance(leader, list) else []
    mode = value(reader, "qcache.lazy.mode", "off")
    return {"mode": mode, "lazy_layers": lazy_of(leader), "dropped_layers": dropped_of(leader)}


def _tensors(first: GGUFReader, second: GGUFReader, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
    """Tensors that one file lacks or that have another type, shape or content."""
    by_name = [{tensor.name: tensor for tensor in reader.tensors} for reader in (first, second)]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*by_name[0], *by_name[1]]):
        a, b = (tensors.get(name) for tensors in by_name)
        sides = {side: _MISSING if tensor is None else _layout(tensor) for side, tensor in (("a", a), ("b", b))}
        if a is None or b is None:
            found[name] = sides
            continue
        if list(a.shape) != list(b.shape):
            found[name] = sides
        elif a.tensor_type != b.tensor_type or not _same_bytes(a, b):
            found[name] = sides | _distance(a, b)
        advance(int(a.n_bytes))
    return found


def _layout(tensor: ReaderTensor) -> str:
    """Type and shape, outermost dimension first."""
    return f"{GGMLQuantizationType(tensor.tensor_type).name.lower()} {[int(n) for n in reversed(tensor.shape)]}"


def _same_bytes(a: ReaderTensor, b: ReaderTensor) -> bool:
    flat = [np.asarray(tensor.data).reshape(-1).view(np.uint8) for tensor in (a, b)]
    step = 4 * _CHUNK
    return all(np.array_equal(flat[0][i : i + step], flat[1][i : i + step]) for i in range(0, len(flat[0]), step))


def _distance(a: ReaderTensor, b: ReaderTensor) -> dict[str, float | int]:
    """How far two tensors of the same shape are apart, read a chunk at a time."""
    difference, scale, n_not_finite = 0.0, 0.0, 0
    rows = [np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1]) for tensor in (a, b)]
    step = max(1, _CHUNK // int(a.shape[0]))
    for start in range(0, len(rows[0]), step):
        try:
            x, y = (_floats(part[start : start + step], tensor.tensor_type) for part, tensor in zip(rows, (a, b)))
        except NotImplementedError:
            return {}
        finite = np.isfinite(x) & np.isfinite(y)
        difference = max(difference, float(np.abs(x[finite] - y[finite]).max(initial=0.0)))
        scale = max(scale, float(np.abs(x[finite]).max(initial=0.0)))
        n_not_finite += int((~finite & (x != y) & ~(np.isnan(x) & np.isnan(y))).sum())
    return {"max_abs_difference": difference, "max_abs": scale, "n_not_finite": n_not_finite}


def _floats(data: npt.NDArray[Any], qtype: GGMLQuantizationType) -> npt.NDArray[Any]:
    """Values of rows; f64 and integers as f64."""
    return data.astype(np.float64) if data.dtype.kind in "fi" else dequantize(data, qtype).astype(np.float64)


def draw(facts: dict[str, Any], console: Console) -> None:
    """Prints what differs for people."""
    for name, title in (("metadata", "metadata that differs"), ("tensors", "tensors that differ")):
        if facts[name]:
            table = Table(title=f"{title}: {len(facts[name])}", title_justify="left", box=None, padding=(0, 2, 0, 0))
            for column in ("", "a", "b", *(("largest difference", "of at most") if name == "tensors" else ())):
                table.add_column(column, overflow="fold")
            for key, one in facts[name].items():
                cells = [key, one["a"], one["b"]]
                if "max_abs_difference" in one:
                    apart = f", NaN or infinite: {one['n_not_finite']}" if one["n_not_finite"] else ""
                    cells += [f"{one['max_abs_difference']:.3g}{apart}", f"{one['max_abs']:.3g}"]
                table.add_row(*map(Text, cells))  # no markup: texts of the files
            console.print(table)
            console.print()
    if facts["lazy"]:
        for side in "ab":
            one = facts["lazy"][side]
            lazy, dropped = (", ".join(map(str, one[f"{kind}_layers"])) or "none" for kind in ("lazy", "dropped"))
            text = f"Lazy Blocks of {side}: {one['mode']} mode, lazy layers {lazy}, without attention {dropped}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
