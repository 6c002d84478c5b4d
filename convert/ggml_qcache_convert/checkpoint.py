"""Safetensors checkpoints: which tensor lies where, and rows of it as float32, without ever holding a whole file.

The safetensors library validates each file's header (sizes, overlaps, length). The data is read here with plain file
reads: the library has no numpy bfloat16, and its memory map would count the whole model as resident.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .jsonfile import read_json

_ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_NUMPY_TYPE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: where its bytes are and what they mean."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the stored data in bytes."""
        return math.prod(self.shape) * _ITEM_SIZE[self.dtype]


class Checkpoint:
    """The tensors of a directory with ``model.safetensors`` or a ``model.safetensors.index.json`` and its shards.

    A context manager: files are opened on first use and closed at the end.

    Attributes:
        tensors: Every tensor by its stored name.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the headers.

        Args:
            directory: The checkpoint directory.

        Raises:
            ConversionError: No safetensors weights, a missing or damaged file, an index that points outside the
                directory or names a tensor its shard lacks, or a tensor of an unsupported type.
        """
        self.tensors: dict[str, TensorEntry] = {}
        self._files: dict[Path, BinaryIO] = {}
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        if single.exists():
            self.tensors = _read_header(single)
        elif index.exists():
            self._read_index(index)
        else:
            pickles = sorted(path.name for path in directory.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle, which isn't read: save the model as safetensors" if pickles else ""
            raise ConversionError(f"{directory}: has neither model.safetensors nor model.safetensors.index.json{hint}")

    def _read_index(self, index: Path) -> None:
        """Reads the shards an index file names."""
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise ConversionError(f"{index}: has no weight_map")
        for name, shard in weight_map.items():
            # a shard is a bare file name beside the index; anything else could read files elsewhere
            if not isinstance(shard, str) or shard in ("", ".", "..") or any(c in shard for c in "/\\\0"):
                raise ConversionError(f"{index}: tensor {name!r} points to {shard!r}, which isn't a plain file name")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (index.parent / shard).is_file()]
        if missing:
            raise ConversionError(f"{index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}")
        headers = {shard: _read_header(index.parent / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise ConversionError(f"{index}: tensor {name!r} isn't in {shard}, where the index has it")
            self.tensors[name] = headers[shard][name]

    def read_rows(self, entry: TensorEntry, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Reads rows ``start`` to ``stop`` of a tensor.

        Args:
            entry: The tensor.
            start: First index of its first dimension.
            stop: Index after the last.

        Returns:
            float32 ``[stop - start, product of the other dimensions]``.

        Raises:
            ConversionError: The file ends early.
        """
        row = math.prod(entry.shape[1:])
        if entry.path not in self._files:
            self._files[entry.path] = entry.path.open("rb")
        file = self._files[entry.path]
        file.seek(entry.offset + start * row * _ITEM_SIZE[entry.dtype])
        data = np.fromfile(file, dtype=_NUMPY_TYPE[entry.dtype], count=(stop - start) * row)
        if data.size != (stop - start) * row:
            raise ConversionError(f"{entry.path}: ends inside tensor {entry.name!r}, rows {start} to {stop}")
        if entry.dtype == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float32, copy=False).reshape(stop - start, row)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of one safetensors file."""
    try:
        with safe_open(path, framework="np") as file:
            names = file.offset_keys()
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: isn't a readable safetensors file: {error}") from error
    with path.open("rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    entries: dict[str, TensorEntry] = {}
    # the library guarantees that the tensors fill the data section without holes, in this order
    for name, (dtype, shape) in shapes.items():
        if dtype not in _ITEM_SIZE:
            raise ConversionError(f"{path}: tensor {name!r} is of type {dtype}; supported: {', '.join(_ITEM_SIZE)}")
        entries[name] = TensorEntry(name, path, dtype, shape, offset)
        offset += entries[name].nbytes
    return entries
