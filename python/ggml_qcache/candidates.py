"""Logits as llama.cpp's samplers take them."""

from __future__ import annotations

import ctypes

import llama_cpp.llama_cpp as llama_c
import numpy as np
import numpy.typing as npt

from . import native


class Candidates:
    """One candidate for each token of a vocabulary, in a loop of C: llama_cpp's own takes NumPy three strided ones, for every token.

    Attributes:
        candidates: The ``llama_token_data_array``.
    """

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self._data = (llama_c.llama_token_data * n_vocab)()
        assert ctypes.sizeof(self._data) == n_vocab * native.ffi.sizeof("struct candidate")
        self._pointer = native.ffi.from_buffer("struct candidate[]", self._data)
        data = ctypes.cast(self._data, llama_c.llama_token_data_p)
        self.candidates = llama_c.llama_token_data_array(data=data, size=n_vocab)

    def load(self, logits: npt.NDArray[np.float32]) -> None:
        """Takes ``[n_vocab]`` logits, none selected yet."""
        native.lib.fill_candidates(self._pointer, native.ffi.from_buffer("float[]", logits), self._n_vocab)
        self.candidates.size = self._n_vocab
        self.candidates.sorted = False
        self.candidates.selected = -1
