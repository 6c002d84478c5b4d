"""The tokenizer of llama_cpp with remembered pieces: completions detokenize their whole text for every new token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Optional

import llama_cpp.llama_cpp as llama_c
from llama_cpp.llama_tokenizer import LlamaTokenizer


class Tokenizer(LlamaTokenizer):
    """Tokenizes through llama.cpp's vocabulary."""

    def __init__(self, llama) -> None:
        super().__init__(llama)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._bos = self._model.token_bos()

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Optional[Sequence[int]] = None, special: bool = False
    ) -> bytes:
        """Joins the text of tokens.

        Args:
            tokens: Token ids; negative ones stand for visual tokens and have no text.
            prev_tokens: Not used.
            special: Give the text of special tokens too.
        """
        pieces = self._pieces
        output = b"".join(
            [pieces.get((token, special)) or self._piece(token, special) for token in tokens if token >= 0]
        )
        # llama.cpp gives sentencepiece's leading space as a space
        if len(tokens) > 0 and tokens[0] == self._bos and output[:1] == b" ":
            return output[1:]
        return output

    def _piece(self, token: int, special: bool) -> bytes:
        """Asks llama.cpp for the text of a token."""
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            n_bytes = llama_c.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if n_bytes >= 0:
                break
            size = -n_bytes
        return self._pieces.setdefault((token, special), buffer.raw[:n_bytes])
