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
from .chunks import CHUNK, in_chunks
from .errors import ConversionError
from .outtypes import quantised
from .plan import OutputTensor
from .tensor_entry import TensorEntry

# the bits of an exponent that only infinity and NaN have all of, in types that a checkpoint and a GGUF share
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}


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
    """Writes one GGUF. Chunks of rows go from their checkpoint to their place in it, several at a time.

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
    finally:
        writer.close()
    end = path.stat().st_size
    for tensor in plan:
        start = GGUFWriter.ggml_pad(end, writer.data_alignment)
        _write_tensor(path, start, tensor, checkpoint, advance)
        end = start + stored_bytes(tensor.shape, tensor.qtype)
    os.truncate(path, GGUFWriter.ggml_pad(end, writer.data_alignment))


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


def _write_tensor(path: Path, offset: int, tensor: OutputTensor, checkpoint: Checkpoint, advance: Callable[[int], object]) -> None:
    """Puts a tensor in its stored form into a file. Holds a chunk of its rows for each core."""
    row_bytes = stored_bytes(tensor.shape, tensor.qtype) // tensor.shape[0]

    def write(row: int, stored: np.ndarray[Any, Any]) -> None:
        with path.open("r+b") as file:  # each thread has a position of its own
            file.seek(offset + row * row_bytes)
            file.write(np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")))

    if not isinstance(tensor.source, TensorEntry):
        write(0, tensor.source)
        advance(tensor.source.nbytes)
        return
    entry = tensor.source
    n_row = entry.shape[0]
    order = _source_rows(n_row, tensor.rope_head_dim) if tensor.rope_head_dim else None

    def put(start: int, stop: int, stored: np.ndarray[Any, Any]) -> None:
        write(start, stored if order is None else stored[order[start:stop] - start])

    def copy(start: int, stop: int) -> None:
        stored = checkpoint.stored_rows(entry, start, stop)
        exponent = np.uint16(_EXPONENT[entry.dtype])
        if ((stored.view(np.uint16) & exponent) == exponent).any():
            raise _not_finite(entry, checkpoint)
        put(start, stop, stored)

    def convert(start: int, stop: int) -> None:
        values = checkpoint.read_rows(entry, start, stop)
        if not np.isfinite(values).all():
            raise _not_finite(entry, checkpoint)
        stored = quantised(values, tensor.qtype, tensor.importance)
        if tensor.qtype == GGMLQuantizationType.F16 and np.isinf(stored).any():
            raise ConversionError(
                f"{entry.path}: tensor {entry.name!r} has values up to {np.abs(values).max():g}, over f16's range; "
                "use --outtype bf16 or f32"
            )
        put(start, stop, stored)
        if tensor.mirrored:
            write(n_row + start, quantised(-values, tensor.qtype))

    same = entry.dtype == tensor.qtype.name and entry.dtype in _EXPONENT and not entry.deltas and not tensor.mirrored
    for n in in_chunks(n_row, math.prod(entry.shape[1:]), copy if same else convert, tensor.rope_head_dim or 1):
        advance(n * (entry.nbytes // n_row))


def _source_rows(n_row: int, head_dim: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Which row of a q or k projection comes to each place: Hugging Face pairs row i of a head with i + head_dim / 2, ggml 2i with 2i + 1."""
    row = np.arange(n_row)
    within = row % head_dim
    return row - within + within // 2 + within % 2 * (head_dim // 2)


def _not_finite(entry: TensorEntry, checkpoint: Checkpoint) -> ConversionError:
    """Counts a tensor's NaN and infinite values and finds the first."""
    n_col = math.prod(entry.shape[1:])
    step = max(1, CHUNK // n_col)
    count, first = 0, -1
    for start in range(0, entry.shape[0], step):
        bad = np.flatnonzero(~np.isfinite(checkpoint.read_rows(entry, start, min(entry.shape[0], start + step))))
        if count == 0 and bad.size:
            first = start * n_col + int(bad[0])
        count += bad.size
    index = [int(i) for i in np.unravel_index(first, entry.shape)]
    return ConversionError(
        f"{entry.path}: tensor {entry.name!r} has {count} NaN or infinite values, the first at {index}"
    )
