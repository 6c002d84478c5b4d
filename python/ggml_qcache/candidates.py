"""Logits as llama.cpp's samplers take them."""

from __future__ import annotations

import ctypes

import llama_cpp.llama_cpp as llama_c
import numpy as np
import numpy.typing as npt

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

    def sample(self, sampler: int, logits: npt.NDArray[np.float32]) -> int:
        """Chooses a token, which the sampler then has accepted.

        Args:
            sampler: Address of a ``llama_sampler`` chain.
            logits: ``[n_vocab]``.

        Raises:
            QCacheError: The chain selects nothing, or all that it selects from is impossible (a grammar, or biases).
        """
        logits_pointer = native.ffi.from_buffer("float[]", logits)
        token: int = native.lib.sample_token(_APPLY, _ACCEPT, sampler, self._array, logits_pointer, self._n_vocab)
        if token == -1:
            raise QCacheError("the sampler chain selected no token")
        if token == -2:
            raise QCacheError("no token of the vocabulary continues the answer as grammar and logits demand")
        return token
