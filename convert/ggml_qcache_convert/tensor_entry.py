"""A stored tensor of a checkpoint file, whatever the file's format: its place and type."""

import math
from dataclasses import dataclass
from pathlib import Path

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: where its bytes are and what they mean.

    Attributes:
        name: Name in the file.
        path: The file.
        dtype: A key of ``ITEM_SIZE``, or the name of a type that weights can't have.
        shape: Outermost dimension first; the values lie row by row, little-endian.
        offset: Of the first value, in bytes from the file's start.
        deltas: What is added to the values when they are read.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    deltas: tuple["LowRank", ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the stored data in bytes, of a type that weights have."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    @property
    def paths(self) -> set[Path]:
        """The files its values come from."""
        return {self.path}.union(*(delta.a.paths | delta.b.paths for delta in self.deltas))


@dataclass(frozen=True)
class LowRank:
    """The change ``scale * b @ a`` of a matrix, or its transpose.

    Attributes:
        a: ``[rank, n_in]``.
        b: ``[n_out, rank]``.
        scale: A factor.
        transposed: The matrix is ``[n_in, n_out]``, as embeddings are.
    """

    a: TensorEntry
    b: TensorEntry
    scale: float
    transposed: bool
