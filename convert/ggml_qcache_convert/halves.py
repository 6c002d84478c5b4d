"""f32 from and to f16 and bf16, by ggml: it has instructions for them where NumPy takes 10 to 30 times as long."""

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

_STORED: dict[str, type[np.generic]] = {"F16": np.float16, "BF16": np.uint16}
_SUFFIX = {"F16": "fp16", "BF16": "bf16"}


def to_float32(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values of ``F16`` (float16) or ``BF16`` (uint16), in the same shape."""
    return _convert(stored, _STORED[dtype], np.float32, f"ggml_cpu_{_SUFFIX[dtype]}_to_fp32")


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """``F16`` (float16, infinite over its range) or ``BF16`` (uint16) in the same shape, rounded to nearest, ties to even."""
    return _convert(values, np.float32, _STORED[dtype], f"ggml_cpu_fp32_to_{_SUFFIX[dtype]}")


@functools.cache
def _library() -> Any:
    """ggml, with its table of f16 values filled: what is left of a row after whole vectors is looked up there."""
    from llama_cpp._ggml import libggml

    libggml.ggml_cpu_init()
    return libggml


def _convert(array: npt.NDArray[Any], source: type[np.generic], target: type[np.generic], function: str) -> npt.NDArray[Any]:
    given = np.ascontiguousarray(array, dtype=source)
    result = np.empty(array.shape, dtype=target)
    convert = getattr(_library(), function)
    convert(given.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(given.size))
    return result
