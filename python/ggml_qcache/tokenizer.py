"""The tokenizer of llama_cpp, as Hugging Face has it where llama.cpp's rules differ, and with remembered pieces: completions
detokenize their whole text for every new token.
"""

from __future__ import annotations

import ctypes
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import llama_cpp.llama_cpp as llama_c
from llama_cpp import _internals as internals
from llama_cpp.llama_tokenizer import LlamaTokenizer

from .errors import ModelError, UnsupportedError


PREPEND_KEY, NORMALIZER_KEY = "qcache.tokenizer.prepend_scheme", "qcache.tokenizer.normalizer"
_SPACES = (" ", "\u2581")


def load_vocabulary(path: str, verbose: bool) -> tuple[internals.LlamaModel, Any]:
    """Loads the vocabulary and the metadata of a model through llama_cpp.

    Args:
        path: The text GGUF.
        verbose: Let llama.cpp log to stderr.

    Returns:
        The model, and the parameters it was loaded with. It adds no spaces to texts where ``TextRules`` does.

    Raises:
        ModelError: llama.cpp can't read it.
    """
    llama_c.llama_backend_init()
    params = llama_c.llama_model_default_params()
    params.vocab_only = True
    try:
        model = internals.LlamaModel(path_model=path, params=params, verbose=verbose)
        if PREPEND_KEY in model.metadata():
            model.close()
            overrides = (llama_c.llama_model_kv_override * 2)()  # ends with one without a name
            overrides[0].key, overrides[0].tag = b"tokenizer.ggml.add_space_prefix", llama_c.LLAMA_KV_OVERRIDE_TYPE_BOOL
            overrides[0].value.val_bool = False
            params.kv_overrides = overrides
            model = internals.LlamaModel(path_model=path, params=params, verbose=verbose)
    except ValueError as error:
        raise ModelError(f"{path!r}: llama.cpp can't load the vocabulary ({error})") from None
    return model, params


class TextRules:
    """What Hugging Face does to a text before it looks for tokens, where llama.cpp does something else.

    Attributes:
        prepend_scheme: ``first``: a space before the text. ``always``: also after every special token. Neither before a
            space. None: as llama.cpp does it.
    """

    def __init__(self, metadata: Mapping[str, str], vocab: Any) -> None:
        """Reads the rules of a model.

        Args:
            metadata: Keys and values of its GGUF.
            vocab: ``llama_vocab *``.

        Raises:
            UnsupportedError: A rule of a later version.
        """
        self.prepend_scheme = metadata.get(PREPEND_KEY)
        self._normalizer = metadata.get(NORMALIZER_KEY)
        if self.prepend_scheme not in (None, "first", "always") or self._normalizer not in (None, "NFC"):
            raise UnsupportedError(
                f"the tokenizer's {PREPEND_KEY} {self.prepend_scheme!r} or {NORMALIZER_KEY} {self._normalizer!r} is not supported "
                "(first, always; NFC)"
            )
        self._vocab = vocab

    def apply(self, text: str, special: bool = True, at_start: bool = True) -> str:
        """Gives the text that llama.cpp, adding no spaces of its own, makes the right tokens of.

        Args:
            text: Part of a prompt.
            special: Whether special tokens in it are recognised.
            at_start: Whether the prompt begins with it.
        """
        if self.prepend_scheme is None and (self._normalizer is None or unicodedata.is_normalized(self._normalizer, text)):
            return text
        cut = self._special if special else self._user_defined
        # odd ones are tokens
        pieces = [text] if cut is None else cut.split(text)
        for i in range(0, len(pieces), 2):
            if self._normalizer is not None:
                pieces[i] = unicodedata.normalize(self._normalizer, pieces[i])
            first = self.prepend_scheme == "always" or (self.prepend_scheme == "first" and at_start and i == 0)
            if first and pieces[i] and not pieces[i].startswith(_SPACES):
                pieces[i] = " " + pieces[i]
        return "".join(pieces)

    @functools.cached_property
    def _user_defined(self) -> Optional[re.Pattern[str]]:
        """Tokens that llama.cpp cuts every text at."""
        return self._any_of(llama_c.LLAMA_TOKEN_ATTR_USER_DEFINED)

    @functools.cached_property
    def _special(self) -> Optional[re.Pattern[str]]:
        """Tokens that it cuts a text at where special ones are recognised."""
        return self._any_of(
            llama_c.LLAMA_TOKEN_ATTR_USER_DEFINED | llama_c.LLAMA_TOKEN_ATTR_CONTROL | llama_c.LLAMA_TOKEN_ATTR_UNKNOWN
        )

    def _any_of(self, kinds: int) -> Optional[re.Pattern[str]]:
        """A pattern of the tokens of some kinds, the longest first as in llama.cpp; None where there are none."""
        vocab = self._vocab
        ids = range(llama_c.llama_vocab_n_tokens(vocab))
        texts = [llama_c.llama_vocab_get_text(vocab, id) for id in ids if llama_c.llama_vocab_get_attr(vocab, id) & kinds]
        texts.sort(key=len, reverse=True)
        return re.compile(f"({'|'.join(re.escape(text.decode('utf-8', 'replace')) for text in texts)})") if texts else None


class Tokenizer(LlamaTokenizer):
    """Tokenizes through llama.cpp's vocabulary."""

    def __init__(self, llama, rules: TextRules) -> None:
        super().__init__(llama)
        self._rules = rules
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._bos = self._model.token_bos()

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Turns text into token ids.

        Args:
            text: UTF-8.
            add_bos: Add BOS where the vocabulary wants it.
            special: Recognise special tokens.
        """
        prepared = self._rules.apply(text.decode("utf-8", "surrogateescape"), special)
        return super().tokenize(prepared.encode("utf-8", "surrogateescape"), add_bos, special)

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
