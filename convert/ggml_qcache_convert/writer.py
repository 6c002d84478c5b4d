"""Streams planned tensors into GGUF files, and lets the files appear only when all of them are complete."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from .checkpoint import Checkpoint
from .errors import ConversionError
from .outtypes import quantised
from .plan import OutputTensor
from .tensor_entry import TensorEntry

CHUNK = 1 << 22  # elements read, checked and converted at a time: 16 MB as float32


class AtomicFiles:
    """Temporary files beside their targets that replace them together at ``commit``, and vanish on any other way out."""

    def __init__(self, targets: Iterable[Path]) -> None:
        self._temporary = {target: target.with_name(f".{target.name}.{os.getpid()}.part") for target in targets}

    def __enter__(self) -> "AtomicFiles":
        return self

    def path(self, target: Path) -> Path:
        """Where to write what will become ``target``."""
        return self._temporary[target]

    def commit(self) -> None:
        """Moves the files to their targets. When one can't be moved, those moved before it are removed again."""
        moved: list[Path] = []
        try:
            for target, temporary in self._temporary.items():
                os.replace(temporary, target)
                moved.append(target)
        except BaseException:
            for target in moved:
                target.unlink(missing_ok=True)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)


def write_gguf(
    path: Path,
    arch: str,
    add_keys: Callable[[GGUFWriter], None],
    plan: Sequence[OutputTensor],
    checkpoint: Checkpoint,
    advance: Callable[[int], object],
) -> None:
    """Writes one GGUF, one tensor at a time.

    Args:
        path: File to create.
        arch: ``general.architecture``.
        add_keys: Adds the other keys.
        plan: The tensors, in order.
        checkpoint: Where they are read from.
        advance: Called with the number of input bytes converted since the last call.

    Raises:
        ConversionError: A tensor has NaN or infinite values, or values its type can't hold, or its file ends early.
        OSError: The file can't be written.
    """
    writer = GGUFWriter(None, arch)
    add_keys(writer)
    for tensor in plan:
        shape, dtype = stored_layout(tensor.shape, tensor.qtype)
        writer.add_tensor_info(tensor.name, shape, dtype, stored_bytes(tensor.shape, tensor.qtype), raw_dtype=tensor.qtype)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan:
            writer.write_tensor_data(_converted(tensor, checkpoint, advance))
        writer.flush()
    finally:
        writer.close()


def stored_layout(shape: tuple[int, ...], qtype: GGMLQuantizationType) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and numpy type of a tensor's bytes: one numpy element per value for f32 and f16, raw bytes for the rest."""
    if qtype == GGMLQuantizationType.F32:
        return shape, np.dtype(np.float32)
    if qtype == GGMLQuantizationType.F16:
        return shape, np.dtype(np.float16)
    return tuple(quant_shape_to_byte_shape(shape, qtype)), np.dtype(np.uint8)


def stored_bytes(shape: tuple[int, ...], qtype: GGMLQuantizationType) -> int:
    """Size of a tensor in a file, in bytes."""
    stored, dtype = stored_layout(shape, qtype)
    return math.prod(stored) * dtype.itemsize


def _converted(tensor: OutputTensor, checkpoint: Checkpoint, advance: Callable[[int], object]) -> np.ndarray[Any, Any]:
    """Gives a tensor in its stored form. Holds the result and one chunk of the source, never the source as a whole."""
    if not isinstance(tensor.source, TensorEntry):
        advance(tensor.source.nbytes)
        return tensor.source
    entry = tensor.source
    shape, dtype = stored_layout(tensor.shape, tensor.qtype)
    result = np.empty(shape, dtype)
    n_row = entry.shape[0]
    rows = result.reshape(tensor.shape[0], -1)
    target = _interleaved_rows(n_row, tensor.rope_head_dim) if tensor.rope_head_dim else np.arange(n_row)
    step = max(1, CHUNK * n_row // max(1, int(np.prod(entry.shape, dtype=np.int64))))
    for start in range(0, n_row, step):
        stop = min(n_row, start + step)
        values = checkpoint.read_rows(entry, start, stop)
        if not np.isfinite(values).all():
            raise _not_finite(entry, checkpoint, step)
        with np.errstate(over="ignore"):
            stored = quantised(values, tensor.qtype, tensor.importance)
        if tensor.qtype == GGMLQuantizationType.F16 and np.isinf(stored).any():
            raise ConversionError(
                f"{entry.path}: tensor {entry.name!r} has values up to {np.abs(values).max():g}, over f16's range; "
                "use --outtype bf16 or f32"
            )
        rows[target[start:stop]] = stored
        if tensor.mirrored:
            rows[n_row + start : n_row + stop] = quantised(-values, tensor.qtype)
        advance((stop - start) * (entry.nbytes // n_row))
    return result


def _interleaved_rows(n_row: int, head_dim: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Where each row of a q or k projection goes: Hugging Face pairs row i with i + head_dim / 2, ggml 2i with 2i + 1."""
    row = np.arange(n_row)
    head, within = row - row % head_dim, row % head_dim
    half = head_dim // 2
    return head + 2 * (within % half) + within // half


def _not_finite(entry: TensorEntry, checkpoint: Checkpoint, step: int) -> ConversionError:
    """Counts a tensor's NaN and infinite values and finds the first."""
    count, first = 0, -1
    for start in range(0, entry.shape[0], step):
        values = checkpoint.read_rows(entry, start, min(entry.shape[0], start + step))
        bad = np.flatnonzero(~np.isfinite(values))
        if count == 0 and bad.size:
            first = start * values.shape[1] + int(bad[0])
        count += bad.size
    index = [int(i) for i in np.unravel_index(first, entry.shape)]
    return ConversionError(
        f"{entry.path}: tensor {entry.name!r} has {count} NaN or infinite values, the first at {index}"
    )
