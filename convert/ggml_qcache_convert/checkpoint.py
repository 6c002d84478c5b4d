"""Checkpoints of safetensors or PyTorch files: which tensor lies where, and rows of it as float32, without ever holding a whole file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConversionError
from .halves import to_float32
from .jsonfile import read_json
from .safetensors_file import read_safetensors_header
from .tensor_entry import ITEM_SIZE, TensorEntry
from .torch_file import read_torch_header

_NUMPY_TYPE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
# in the order of preference: files of several formats hold the same model
_READERS = {"model.safetensors": read_safetensors_header, "pytorch_model.bin": read_torch_header}
WEIGHT_FILES = tuple(_READERS)  # whole, or in shards that NAME.index.json names


class Checkpoint:
    """The tensors of a directory's ``model.safetensors`` or ``pytorch_model.bin``, or of the shards their ``.index.json`` names.

    Attributes:
        tensors: Every tensor by its stored name.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the headers.

        Args:
            directory: The checkpoint directory.

        Raises:
            ConversionError: No weights, a missing or damaged file, one that lies outside the directory, or an index that
                names a tensor its shard lacks.
        """
        self.tensors: dict[str, TensorEntry] = {}
        for name, read_header in _READERS.items():
            single, index = directory / name, directory / f"{name}.index.json"
            if single.exists():
                self.tensors = read_header(_inside(single))
                return
            if index.exists():
                self._read_index(index, read_header)
                return
        names = ", ".join(f"{name} nor {name}.index.json" for name in WEIGHT_FILES)
        raise ConversionError(f"{directory}: has no weights: neither {names}")

    def _read_index(self, index: Path, read_header: Callable[[Path], dict[str, TensorEntry]]) -> None:
        """Reads the shards an index file names."""
        shard_of = weight_map(index)
        shards = sorted(set(shard_of.values()))
        missing = [shard for shard in shards if not (index.parent / shard).is_file()]
        if missing:
            raise ConversionError(f"{index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}")
        headers = {shard: read_header(_inside(index.parent / shard)) for shard in shards}
        for name, shard in shard_of.items():
            if name not in headers[shard]:
                raise ConversionError(f"{index}: tensor {name!r} isn't in {shard}, where the index has it")
            self.tensors[name] = headers[shard][name]

    def read_rows(self, entry: TensorEntry, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Reads rows ``start`` to ``stop`` of a tensor, its deltas added. Several threads may read at once.

        Args:
            entry: The tensor.
            start: First index of its first dimension.
            stop: Index after the last.

        Returns:
            float32 ``[stop - start, product of the other dimensions]``.

        Raises:
            ConversionError: The file ends early, or a delta has NaN or infinite values.
        """
        values = as_float32(self.stored_rows(entry, start, stop), entry.dtype)
        for delta in entry.deltas:
            a = self._finite(delta.a, 0, delta.a.shape[0])
            if delta.transposed:
                values += delta.scale * (self._finite(delta.b, 0, delta.b.shape[0]) @ a[:, start:stop]).T
            else:
                values += delta.scale * (self._finite(delta.b, start, stop) @ a)
        return values

    def _finite(self, entry: TensorEntry, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Rows of one factor of a delta, checked here: in the sum nobody could tell whose fault a NaN is."""
        values = as_float32(self.stored_rows(entry, start, stop), entry.dtype)
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).sum())
            raise ConversionError(f"{entry.path}: tensor {entry.name!r} has {count} NaN or infinite values in rows {start} to {stop}")
        return values

    def stored_rows(self, entry: TensorEntry, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows as they lie in the file, without the deltas; bf16 as uint16."""
        row = math.prod(entry.shape[1:])
        offset = entry.offset + start * row * ITEM_SIZE[entry.dtype]
        data = np.fromfile(entry.path, dtype=_NUMPY_TYPE[entry.dtype], count=(stop - start) * row, offset=offset)
        if data.size != (stop - start) * row:
            raise ConversionError(f"{entry.path}: ends inside tensor {entry.name!r}, rows {start} to {stop}")
        return data.reshape(stop - start, row)


def as_float32(stored: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Values of rows as they lie in a file."""
    return to_float32(stored, dtype) if dtype in ("F16", "BF16") else stored.astype(np.float32, copy=False)


def read_first(directory: Path, names: Sequence[str]) -> dict[str, TensorEntry]:
    """Lists the tensors of the first of several files that is there.

    Raises:
        ConversionError: None is, or it is damaged or a link out of the directory.
    """
    for name in names:
        if (directory / name).exists():
            read_header = read_safetensors_header if name.endswith(".safetensors") else read_torch_header
            return read_header(_inside(directory / name))
    raise ConversionError(f"{directory}: has none of {', '.join(names)}")


def weight_map(index: Path) -> dict[str, str]:
    """Reads which shard each tensor is in.

    Raises:
        ConversionError: No index, or one that names anything else than files beside it.
    """
    content = read_json(index).get("weight_map")
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{index}: has no weight_map")
    for name, shard in content.items():
        # anything but a bare file name could read files elsewhere
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(c in shard for c in "/\\\0"):
            raise ConversionError(f"{index}: tensor {name!r} points to {shard!r}, which isn't a plain file name")
    return dict(content)


def _inside(path: Path) -> Path:
    """Gives a file of a checkpoint directory back, once it is known that it is no link out of there.

    In the Hugging Face cache a snapshot's files are links to ``../../blobs``: those belong to the checkpoint.
    """
    directory = path.parent.resolve()
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise ConversionError(f"{path}: is a link to {target}, outside the checkpoint directory; put the file itself there")
    return path
