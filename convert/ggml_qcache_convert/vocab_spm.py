"""Sentencepiece tokenizers: pieces and scores, from tokenizer.model or from a tokenizer.json derived of one.

llama.cpp merges whichever neighbours form the piece with the best score, so it equals a BPE tokenizer.json exactly when
every way to put a piece together is among the merges, grouped by piece. A tokenizer.json made from a sentencepiece model is
like that; one trained as BPE with byte fallback has a single merge per piece and isn't, which is refused rather than
tokenized differently.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2

from .errors import ConversionError
from .vocab_bpe import Pieces, bpe_model, merge_pairs, tokens_by_id

_SPACE = "\u2581"
_BPE = 2  # sentencepiece's TrainerSpec.ModelType
# by sentencepiece's ModelProto.SentencePiece.Type
_TYPES = {
    1: TokenType.NORMAL,
    2: TokenType.UNKNOWN,
    3: TokenType.CONTROL,
    4: TokenType.USER_DEFINED,
    5: TokenType.UNUSED,
    6: TokenType.BYTE,
}


def sentencepiece_pieces(path: Path) -> Pieces:
    """Reads a tokenizer.model.

    Raises:
        ConversionError: The file isn't a sentencepiece model, or one of an unsupported kind.
    """
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ConversionError(f"{path}: isn't a sentencepiece model: {error}") from error
    if not model.pieces:
        raise ConversionError(f"{path}: isn't a sentencepiece model: it has no pieces")
    if model.trainer_spec.model_type != _BPE:
        kind = sentencepiece_model_pb2.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise ConversionError(f"{path}: sentencepiece model of type {kind} isn't supported; supported: BPE")
    if model.normalizer_spec.remove_extra_whitespaces:
        raise ConversionError(f"{path}: sentencepiece's remove_extra_whitespaces isn't supported")
    if model.normalizer_spec.precompiled_charsmap and model.normalizer_spec.name != "identity":
        raise ConversionError(
            f"{path}: sentencepiece's normalization {model.normalizer_spec.name!r} isn't supported; supported: identity"
        )
    return Pieces(
        [piece.piece for piece in model.pieces],
        [_TYPES[piece.type] for piece in model.pieces],
        [piece.score for piece in model.pieces],
        leading_space=model.normalizer_spec.add_dummy_prefix,
    )


def byte_fallback_pieces(path: Path, fast: Mapping[str, Any], spm_path: Path) -> Pieces:
    """Reads the model of a sentencepiece-like tokenizer.json.

    Args:
        path: The file, for errors.
        fast: Its content.
        spm_path: Where a tokenizer.model may lie; if so the scores are taken from it, and it must agree.

    Raises:
        ConversionError: A model that can't be expressed as pieces with scores, or a tokenizer.model with other pieces.
    """
    model = bpe_model(path, fast)
    if not model.get("byte_fallback"):
        raise ConversionError(f"{path}: BPE with neither a byte-level pre-tokenizer nor byte_fallback isn't supported")
    if model.get("dropout") or model.get("ignore_merges"):
        raise ConversionError(
            f"{path}: byte-fallback BPE with dropout {model.get('dropout')!r} and ignore_merges "
            f"{model.get('ignore_merges')!r} isn't supported"
        )
    tokens = tokens_by_id(path, model["vocab"])
    if spm_path.exists():
        pieces = sentencepiece_pieces(spm_path)
        for index, (ours, theirs) in enumerate(zip(tokens, pieces.tokens)):
            if ours != theirs:
                raise ConversionError(f"{path}: token {index} is {ours!r}, in {spm_path.name} it is {theirs!r}")
        return pieces
    added = {record.get("content") for record in fast.get("added_tokens") or [] if isinstance(record, Mapping)}
    scores = _scores(path, model, added)
    unknown = model.get("unk_token")
    types = [_type_of(token, unknown) for token in tokens]
    return Pieces(tokens, types, [0.0 if token is None else scores[token] for token in tokens])


def leading_space(path: Path, fast: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether a sentencepiece-like tokenizer.json puts a space before the text, and by which of Metaspace's schemes.

    Args:
        path: The file, for errors.
        fast: Its content.

    Returns:
        Whether it does; ``first`` or ``always``, None where it does so as llama.cpp does.

    Raises:
        ConversionError: A normalizer or pre-tokenizer other than those of Llama tokenizers.
    """
    normalizer, pre = fast.get("normalizer"), fast.get("pre_tokenizer")
    if (
        isinstance(pre, Mapping)
        and pre.get("type") == "Metaspace"
        and pre.get("replacement", _SPACE) == _SPACE
        and not normalizer
    ):
        # splitting at spaces changes nothing only for pieces with no space inside, which llama.cpp doesn't know
        if pre.get("split", True):
            raise ConversionError(f"{path}: pre-tokenizer Metaspace with split isn't supported; supported: without")
        scheme = pre.get("prepend_scheme", "always")
        if scheme not in ("first", "always", "never"):
            raise ConversionError(f"{path}: Metaspace's prepend_scheme {scheme!r} isn't supported; supported: first, always, never")
        return (False, None) if scheme == "never" else (True, scheme)
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, Mapping) else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None and steps in ([{"type": "Prepend", "prepend": _SPACE}, replace], [replace]):
        return len(steps) == 2, None
    raise ConversionError(
        f"{path}: normalizer {normalizer!r} with pre-tokenizer {pre!r} isn't supported; supported: those of Llama "
        "tokenizers"
    )


def _type_of(token: str | None, unknown: Any) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if token == unknown:
        return TokenType.UNKNOWN
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(path: Path, model: Mapping[str, Any], added: set[Any]) -> dict[str, float]:
    """Scores that make llama.cpp merge in the order of the merges."""
    vocab: Mapping[str, Any] = model["vocab"]
    pairs = merge_pairs(path, model)
    rank: dict[str, int] = {}
    previous = None
    for left, right in pairs:
        piece = left + right
        if piece not in vocab:
            raise ConversionError(
                f"{path}: merge of {left!r} and {right!r} gives {piece!r}, which isn't in the vocabulary"
            )
        if piece in rank and piece != previous:
            raise ConversionError(f"{path}: merges that give {piece!r} lie apart, so no score for it exists")
        rank.setdefault(piece, len(rank))
        previous = piece
    known = set(pairs)
    for piece in vocab:
        if piece in added or _type_of(piece, model.get("unk_token")) != TokenType.NORMAL:
            continue
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                raise ConversionError(
                    f"{path}: {piece!r} could be put together of {pair[0]!r} and {pair[1]!r}, which isn't a merge; "
                    "llama.cpp's sentencepiece tokenizer would. Only a tokenizer.json made from a sentencepiece model "
                    "is supported, or a byte-level one"
                )
    # single characters and bytes come after all merged pieces; nothing reads their scores
    return {piece: -float(rank.get(piece, len(rank))) for piece in vocab}
