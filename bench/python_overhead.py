"""What Python adds to a generated token: its time less what is spent in native functions."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ggml_qcache import Llama, native

WARMUP = 8


class _Clock:
    """Adds up the seconds inside the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


class _TimedLibrary:
    """The native library with every function timed."""

    def __init__(self, library: Any, clock: _Clock) -> None:
        self._library, self._clock = library, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        value = self._clock.wrap(found) if callable(found) else found
        setattr(self, name, value)
        return value


def measure_python_overhead(path: Path, n_threads: int, n_gpu_layers: int = 0, n_tokens: int = 64, **sampling: float) -> float:
    """Generates tokens with ``Llama.generate`` and takes the median of what each costs outside of native functions.

    What cffi and the timing itself take counts as Python.

    Args:
        path: GGUF with a vocabulary.
        n_threads: Threads of the native part.
        n_gpu_layers: Layers on the first GPU.
        n_tokens: Tokens to time.
        **sampling: Arguments of ``Llama.generate``; greedy if none are given.

    Returns:
        Seconds per token.
    """
    clock = _Clock()
    seconds = []
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(
            Llama(str(path), n_ctx=2 * n_tokens, n_threads=n_threads, n_threads_batch=n_threads, n_gpu_layers=n_gpu_layers, verbose=False)
        )
        stack.enter_context(patch.object(native, "lib", _TimedLibrary(native.lib, clock)))
        tokens = llm.generate([1, 300, 301], **(sampling or {"temp": 0.0}))
        for _ in range(WARMUP + n_tokens):
            started, native_before = time.perf_counter(), clock.seconds
            next(tokens)
            seconds.append(time.perf_counter() - started - (clock.seconds - native_before))
    return statistics.median(seconds[WARMUP:])
