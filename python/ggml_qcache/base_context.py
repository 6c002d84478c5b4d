"""What llama_cpp's ``Llama`` reaches for and doesn't find here: its context, and its objects once they are freed."""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as llama_c

from .errors import UnsupportedError
from .native import Context


class BaseContext:
    """What the base class asks of its ``LlamaContext``, answered by ours."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def ctx(self) -> Any:
        raise UnsupportedError("ggml_qcache.Llama has no llama_context: what needs one can't run on it")

    def n_ctx(self) -> int:
        return self._context.n_ctx

    def pooling_type(self) -> int:
        return llama_c.LLAMA_POOLING_TYPE_NONE

    def kv_cache_seq_rm(self, _seq_id: int, p0: int, p1: int) -> bool:
        self._context.seq_rm(0, p0, p1)
        return True

    def kv_cache_clear(self) -> None:
        self._context.clear()

    def reset_timings(self) -> None:
        """Nothing: ``last_timings`` starts anew by itself."""

    def print_timings(self) -> None:
        """Nothing: ``last_timings`` is there to be read."""


class Closed:
    """Stands where freed objects were: the base would hand their dangling pointers to C."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"the model {self._path!r} is closed")
