"""The weights of a GGUF, as calibration reads and changes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor

from ..outtypes import dequantised, quantised

if TYPE_CHECKING:
    from ggml_qcache.native import Model

Array = npt.NDArray[np.float32]


class Weights:
    """Weights by GGUF name, as f32; the file stays mapped."""

    _of_models: "WeakKeyDictionary[Model, Weights]" = WeakKeyDictionary()

    @classmethod
    def of(cls, model: "Model") -> "Weights":
        """Those of a loaded model's file, which is opened once a model: a large vocabulary takes its time."""
        if model not in cls._of_models:
            cls._of_models[model] = cls(model.path)
        return cls._of_models[model]

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        """A weight in numpy's order of dimensions."""
        tensor = self._tensors[name]
        # read, since pages of the mapping would stay in memory: those of W_o alone are 9 MB a layer in a 7B model of four bits
        data = np.fromfile(self._path, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset).reshape(tensor.data.shape)
        return dequantised(data, tensor.tensor_type)

    def rows(self, name: str, indices: npt.NDArray[np.integer]) -> Array:
        """Some rows of a matrix, ``[len(indices), n]``."""
        tensor = self._tensors[name]
        return dequantised(tensor.data[indices], tensor.tensor_type)

    def rounded(self, name: str, values: Array) -> Array:
        """Values as they would be read back from a weight of this type."""
        qtype = self._tensors[name].tensor_type
        return dequantised(quantised(values, qtype), qtype)

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
