"""The weights of a GGUF, as calibration reads and changes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from ..outtypes import quantised

if TYPE_CHECKING:
    from ggml_qcache.native import Model

Array = npt.NDArray[np.float32]


class Weights:
    """Weights by GGUF name, as f32; the file stays mapped."""

    def __init__(self, path: str | Path) -> None:
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        """A weight in numpy's order of dimensions."""
        tensor = self._tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    def rounded(self, name: str, values: Array) -> Array:
        """Values as they would be read back from a weight of this type."""
        qtype = self._tensors[name].tensor_type
        return np.asarray(dequantize(quantised(values, qtype), qtype), dtype=np.float32)

    @contextmanager
    def replaced(self, model: "Model", weights: Mapping[str, Array]) -> Iterator[None]:
        """Has a loaded model compute with other weights, and with the file's again at the end."""
        try:
            for name, values in weights.items():
                model.set_weight(name, values)
            yield
        finally:
            for name in weights:
                model.set_weight(name, self[name])
