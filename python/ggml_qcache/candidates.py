"""Logits as llama.cpp's samplers take them."""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

import llama_cpp.llama_cpp as llama_c
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals as internals

from . import native
from .errors import QCacheError

# called from C, see per_token.h
_APPLY, _ACCEPT = (
    ctypes.cast(function, ctypes.c_void_p).value for function in (llama_c.llama_sampler_apply, llama_c.llama_sampler_accept)
)

NOT_APPENDED = -3  # of generate_token


class Candidates:
    """One candidate for each token of a vocabulary, filled in C: llama_cpp's own takes NumPy three strided copies, for every token."""

    def __init__(self, n_vocab: int) -> None:
        for ours, theirs in (("candidate", llama_c.llama_token_data), ("candidates", llama_c.llama_token_data_array)):
            assert native.ffi.sizeof(f"struct {ours}") == ctypes.sizeof(theirs), ours
        self._n_vocab = n_vocab
        self._data = native.ffi.new("struct candidate[]", n_vocab)
        self.array = native.ffi.new("struct candidates *", {"data": self._data})

    def sample(self, sampler: Any, logits: Any, row: int) -> int:
        """Chooses a token, which the sampler then has accepted.

        Args:
            sampler: Pointer to a ``llama_sampler`` chain, of ctypes.
            logits: ``native.float_buffer`` of ``[n_rows, n_vocab]``.
            row: Which row to choose by; it must be there.

        Raises:
            QCacheError: The chain selects nothing, or all that it selects from is impossible (a grammar, or biases).
        """
        address = ctypes.addressof(sampler.contents)
        token: int = native.lib.sample_token(_APPLY, _ACCEPT, address, self.array, logits, row, self._n_vocab)
        if token < 0:
            raise _no_choice(token)
        return token


class Generation:
    """What ``native.lib.generate_token`` needs to append a token and to choose the next one, for every token of an answer.

    Attributes:
        state: Its second argument.
    """

    def __init__(self, sampler: internals.LlamaSampler, candidates: Candidates, logits: Any, ids: npt.NDArray[np.intc]) -> None:
        """Collects it.

        Args:
            sampler: The chain that chooses.
            candidates: Of the context's vocabulary.
            logits: ``native.float_buffer`` of one row, where those of the last token go.
            ids: Where the ids of appended tokens go, by position.
        """
        self.state = state = native.ffi.new("struct generation *")
        state.apply, state.accept, state.sampler = _APPLY, _ACCEPT, ctypes.addressof(sampler.sampler.contents)
        state.candidates, state.logits, state.n_vocab = candidates.array, logits, len(logits)
        state.ids = native.ffi.from_buffer("int32_t[]", ids, require_writable=True)
        self._kept = sampler, candidates, logits, ids

    def fail(self, code: int) -> NoReturn:
        """Raises the error of a negative result, at once after it. With ``NOT_APPENDED`` the context is as it was."""
        if code == NOT_APPENDED:
            native.check(self.state.status)
        raise _no_choice(code)


def _no_choice(code: int) -> QCacheError:
    """Why ``sample_token`` gave no token."""
    if code == -1:
        return QCacheError("the sampler chain selected no token")
    return QCacheError("no token of the vocabulary continues the answer as grammar and logits demand")
