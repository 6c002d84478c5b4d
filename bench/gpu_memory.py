"""How fast a CUDA device copies memory, and how much of it is free; through the CUDA runtime, without a framework."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


class GpuError(RuntimeError):
    """The CUDA runtime is missing, or refused a call."""


@functools.cache
def _runtime() -> Any:
    # by soname first: that is the copy ggml has loaded
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise GpuError("libcudart.so cannot be loaded: a CUDA installation is needed")


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_runtime(), name)(*arguments)
    if status != 0:
        raise GpuError(f"{name} gave CUDA error {status}")


def free_gpu_bytes() -> int:
    """Bytes that can still be allocated on the current device."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value


def measure_copy_bandwidth(megabytes: int = 1024, repeats: int = 20) -> float:
    """Copies device memory to device memory several times and takes the best.

    Args:
        megabytes: Size of a copy, far beyond the caches.
        repeats: Number of copies.

    Returns:
        Bytes per second, those read and those written added up.
    """
    size = megabytes << 20
    source, target, start, stop = (ctypes.c_void_p() for _ in range(4))
    milliseconds = ctypes.c_float()
    best = 0.0
    try:
        _call("cudaMalloc", ctypes.byref(source), ctypes.c_size_t(size))
        _call("cudaMalloc", ctypes.byref(target), ctypes.c_size_t(size))
        _call("cudaMemset", source, 0x5A, ctypes.c_size_t(size))
        _call("cudaEventCreate", ctypes.byref(start))
        _call("cudaEventCreate", ctypes.byref(stop))
        for _ in range(repeats):
            _call("cudaEventRecord", start, None)
            _call("cudaMemcpyAsync", target, source, ctypes.c_size_t(size), 3, None)  # device to device
            _call("cudaEventRecord", stop, None)
            _call("cudaEventSynchronize", stop)
            _call("cudaEventElapsedTime", ctypes.byref(milliseconds), start, stop)
            best = max(best, 2 * size / (milliseconds.value / 1e3))
    finally:
        _runtime().cudaFree(source)
        _runtime().cudaFree(target)
    return best
