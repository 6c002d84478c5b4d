"""Logits as llama.cpp's samplers take them."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama_c

from . import native
from .errors import QCacheError

# called from C, see per_token.h
_APPLY, _ACCEPT = (
    ctypes.cast(function, ctypes.c_void_p).value for function in (llama_c.llama_sampler_apply, llama_c.llama_sampler_accept)
)


class Candidates:
    """One candidate for each token of a vocabulary, filled in C: llama_cpp's own takes NumPy three strided copies, for every token."""

    def __init__(self, n_vocab: int) -> None:
        for ours, theirs in (("candidate", llama_c.llama_token_data), ("candidates", llama_c.llama_token_data_array)):
            assert native.ffi.sizeof(f"struct {ours}") == ctypes.sizeof(theirs), ours
        self._n_vocab = n_vocab
        self._data = native.ffi.new("struct candidate[]", n_vocab)
        self._array = native.ffi.new("struct candidates *", {"data": self._data})

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
        token: int = native.lib.sample_token(_APPLY, _ACCEPT, address, self._array, logits, row, self._n_vocab)
        if token == -1:
            raise QCacheError("the sampler chain selected no token")
        if token == -2:
            raise QCacheError("no token of the vocabulary continues the answer as grammar and logits demand")
        return token
