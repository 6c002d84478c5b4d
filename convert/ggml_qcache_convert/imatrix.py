"""Importance matrices in llama.cpp's GGUF form, made by its `llama-imatrix`: how much each input of a matrix matters when it is quantised."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from .errors import ConversionError
from .outtypes import FLOATS, OUTTYPES
from .plan import OutputTensor

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """Mean square of each input, f32 ``[n_in]``, by the GGUF name of the matrix; the file and what it says of its making."""

    path: Path
    values: Mapping[str, npt.NDArray[np.float32]]
    datasets: Sequence[str]
    n_chunks: int

    def of(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
        """The importance of a matrix' inputs, or None where nothing was measured.

        Raises:
            ConversionError: It was measured on a matrix of another width.
        """
        found = self.values.get(name)
        if found is not None and found.shape != shape[-1:]:
            raise ConversionError(f"{self.path}: {name!r} has {found.size} inputs, the model's has {shape[-1]}")
        return found


def read_imatrix(path: Path) -> Imatrix:
    """Reads an importance matrix.

    Raises:
        ConversionError: Not such a file, damaged, without one of a pair of tensors, of a mixture of experts, or with values that are
            negative, NaN or infinite.
        OSError: It can't be opened.
    """
    try:
        reader = GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # the reader runs into whatever a damaged file leads it to
        raise ConversionError(f"{path}: isn't an importance matrix in GGUF form, or damaged ({error}); the older .dat form isn't read") from error
    kind = _key(path, reader, "general.type", "")
    if kind != "imatrix":
        raise ConversionError(f"{path}: isn't an importance matrix: general.type is {kind!r}")
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    values = {}
    for name, sums in tensors.items():
        if not name.endswith(_SUMS):
            continue
        matrix = name.removesuffix(_SUMS)
        counts = tensors.get(matrix + _COUNTS)
        if counts is None:
            raise ConversionError(f"{path}: {name!r} has no {matrix + _COUNTS!r} beside it")
        if counts.size != 1 or sums.dtype != np.float32 or counts.dtype != np.float32:
            raise ConversionError(f"{path}: {matrix!r} has {counts.size} matrices of type {sums.dtype}; one of float32 is supported")
        for part, found in ((name, sums), (matrix + _COUNTS, counts)):
            if not (np.isfinite(found) & (found >= 0)).all():
                raise ConversionError(f"{path}: {part!r} has values that are negative, NaN or infinite")
        count = counts.reshape(-1)[0]
        # never seen: nothing is known, so every input matters the same
        values[matrix] = sums.reshape(-1) / count if count > 0 else np.ones(sums.size, np.float32)
    if not values:
        raise ConversionError(f"{path}: has no tensors NAME{_SUMS}")
    return Imatrix(path, values, _key(path, reader, "imatrix.datasets", []), _key(path, reader, "imatrix.chunk_count", 0))


def checked_imatrix(path: Path, outtype: str | None) -> Imatrix:
    """Reads an importance matrix for a type.

    Raises:
        ValueError: The type isn't quantised.
        ConversionError: As ``read_imatrix``.
    """
    if outtype is None or OUTTYPES[outtype].matrix in FLOATS:
        raise ValueError(f"an importance matrix goes with a quantised outtype, got {outtype}")
    return read_imatrix(path)


def importance_of(
    imatrix: Imatrix, tensors: Iterable[tuple[str, tuple[int, ...], GGMLQuantizationType]]
) -> dict[str, npt.NDArray[np.float32] | None]:
    """Gives the importance of the inputs of each tensor that is quantised.

    Args:
        imatrix: The importance matrix.
        tensors: Names, shapes (outermost dimension first) and types.

    Raises:
        ConversionError: The importance matrix is of another model: a width differs, or nothing fits.
    """
    result = {name: imatrix.of(name, shape) for name, shape, qtype in tensors if qtype not in FLOATS}
    if all(found is None for found in result.values()):
        named = ", ".join(list(imatrix.values)[:3])
        raise ConversionError(f"{imatrix.path}: has none of the model's quantised tensors; it is of {named}, ...")
    return result


def with_importance(plan: Sequence[OutputTensor], imatrix: Imatrix) -> list[OutputTensor]:
    """Gives the planned tensors with the importance of their inputs; raises as ``importance_of``."""
    importance = importance_of(imatrix, ((tensor.name, tensor.shape, tensor.qtype) for tensor in plan))
    return [replace(tensor, importance=importance.get(tensor.name)) for tensor in plan]


def add_imatrix_keys(writer: GGUFWriter, imatrix: Imatrix) -> None:
    """Adds the keys by which llama.cpp's own quantiser says what it used."""
    writer.add_string("quantize.imatrix.file", imatrix.path.name)
    if imatrix.datasets:
        writer.add_string("quantize.imatrix.dataset", imatrix.datasets[0])
    writer.add_uint32("quantize.imatrix.entries_count", len(imatrix.values))
    writer.add_uint32("quantize.imatrix.chunks_count", imatrix.n_chunks)


def _key(path: Path, reader: GGUFReader, name: str, default: Any) -> Any:
    field = reader.get_field(name)
    value = default if field is None else field.contents()
    if type(value) is not type(default):
        raise ConversionError(f"{path}: key {name!r} is {value!r}, expected a {type(default).__name__}")
    return value
