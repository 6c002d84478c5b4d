"""Byte-level BPE tokenizers (GPT-2 style): tokens, merges and the kind of pre-tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType

from .errors import ConversionError

_LETTERS_TO_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = _ENGLISH + r"\p{N}{1,3}" + _LETTERS_TO_END
_QWEN2 = _ENGLISH + r"\p{N}" + _LETTERS_TO_END
# (regular expression or None for GPT-2's built-in one, ignore_merges) -> llama.cpp's name.
# smaug-bpe splits like llama-bpe, but doesn't look a whole word up before merging
_KINDS = {(_LLAMA3, True): "llama-bpe", (_LLAMA3, False): "smaug-bpe", (_QWEN2, False): "qwen2", (None, False): "gpt-2"}


@dataclass(frozen=True)
class Pieces:
    """A tokenizer's own tokens by id, None where it has none; scores for sentencepiece, merges and `pre` for BPE."""

    tokens: list[str | None]
    types: list[TokenType]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    leading_space: bool = False


def byte_level_pieces(path: Path, fast: Mapping[str, Any]) -> Pieces:
    """Reads the model of a byte-level tokenizer.json.

    Args:
        path: The file, for errors.
        fast: Its content.

    Raises:
        ConversionError: A pre-tokenizer, normalizer or model that llama.cpp has no counterpart of.
    """
    model = bpe_model(path, fast)
    for key, unset in (
        ("dropout", (None, 0, 0.0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("byte_fallback", (None, False)),
    ):
        if model.get(key) not in unset:
            raise ConversionError(
                f"{path}: model.{key} {model.get(key)!r} isn't supported with a byte-level pre-tokenizer"
            )
    normalizer = fast.get("normalizer")
    if normalizer is not None and (not isinstance(normalizer, Mapping) or normalizer.get("type") != "NFC"):
        raise ConversionError(f"{path}: normalizer {_type(normalizer)} isn't supported; supported: none, NFC")
    regex = _split_regex(path, fast.get("pre_tokenizer"))
    ignore_merges = bool(model.get("ignore_merges"))
    if (regex, ignore_merges) not in _KINDS:
        known = ", ".join(_KINDS.values())
        raise ConversionError(
            f"{path}: pre-tokenizer with the pattern {regex!r} and ignore_merges {ignore_merges} is unknown; "
            f"known: those of {known}"
        )
    tokens = tokens_by_id(path, model["vocab"])
    types = [TokenType.UNUSED if token is None else TokenType.NORMAL for token in tokens]
    return Pieces(
        tokens,
        types,
        [0.0] * len(tokens),
        [f"{left} {right}" for left, right in merge_pairs(path, model)],
        _KINDS[regex, ignore_merges],
    )


def bpe_model(path: Path, fast: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model object of a tokenizer.json, which must be a BPE with a vocabulary."""
    model = fast.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        raise ConversionError(f"{path}: model {_type(model)} isn't supported; supported: BPE")
    if not isinstance(model.get("vocab"), Mapping) or not isinstance(model.get("merges"), list):
        raise ConversionError(f"{path}: model has no vocab and merges")
    return model


def tokens_by_id(path: Path, vocab: Mapping[str, Any]) -> list[str | None]:
    """Turns token -> id into a list by id."""
    tokens: dict[int, str] = {}
    for token, index in vocab.items():
        # a hole is allowed, but an id far beyond the count would ask for memory without end
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(vocab) + 2**20:
            raise ConversionError(f"{path}: token {token!r} has the id {index!r}")
        if index in tokens:
            raise ConversionError(f"{path}: tokens {tokens[index]!r} and {token!r} both have id {index}")
        tokens[index] = token
    return [tokens.get(index) for index in range(max(tokens, default=-1) + 1)]


def merge_pairs(path: Path, model: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The merges, best first; stored as `["a", "b"]` or as `"a b"`."""
    pairs: list[tuple[str, str]] = []
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise ConversionError(f"{path}: merge {merge!r} isn't a pair of tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _split_regex(path: Path, pre: Any) -> str | None:
    """The pattern words are split by; None when it is ByteLevel's own, GPT-2's."""
    steps = pre.get("pretokenizers") if pre.get("type") == "Sequence" else [pre]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Mapping) for step in steps):
        raise ConversionError(f"{path}: pre_tokenizer {pre!r} isn't a list of steps")
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        raise ConversionError(
            f"{path}: pre-tokenizer {kinds} isn't supported, with add_prefix_space "
            f"{last.get('add_prefix_space')!r}; supported: a Split and a ByteLevel without prefix space"
        )
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return None
    split = steps[0]
    pattern = split.get("pattern")
    if (
        kinds != ["Split", "ByteLevel"]
        or last.get("use_regex", True)
        or split.get("invert")
        or split.get("behavior") != "Isolated"
        or not isinstance(pattern, Mapping)
        or not isinstance(pattern.get("Regex"), str)
    ):
        raise ConversionError(
            f"{path}: pre-tokenizer {kinds} isn't supported; supported: one isolating Split by a regular expression, "
            "then ByteLevel"
        )
    return pattern["Regex"]


def _type(value: Any) -> str:
    return str(value.get("type")) if isinstance(value, Mapping) else repr(value)
