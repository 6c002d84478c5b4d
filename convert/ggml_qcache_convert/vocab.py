"""The vocabulary: which kind of tokenizer a directory has, its tokens with their types, special ids and chat template.

llama.cpp follows Hugging Face's tokenizers except in these points, which none of its GGUF keys can express:
- byte-level BPE: a normalizer (Qwen2's NFC) isn't applied;
- sentencepiece: the leading space is put before the text after *every* special token. Hugging Face does so in legacy
  mode, but only at the very start with `prepend_scheme` "first" (`legacy=false`), and with a Metaspace pre-tokenizer not
  before a space;
- an added token's `lstrip`, `rstrip` and `single_word` are ignored, and with sentencepiece also `normalized`, by which
  Hugging Face finds the token only after a space.
The runtime makes up for the first two by keys of ours (docs/gguf.md); the third gives a warning.

A tokenizer.json is followed to the letter. transformers 4 did so too; 5 puts a LlamaTokenizer's leading spaces by `legacy` in
tokenizer_config.json whatever the file says, so that a checkpoint older than it may be tokenized otherwise there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from .errors import ConversionError
from .jsonfile import read_json, read_json_if_present
from .vocab_bpe import Pieces, byte_level_pieces
from .vocab_spm import byte_fallback_pieces, leading_space, sentencepiece_pieces

PREPEND_KEY, NORMALIZER_KEY = "qcache.tokenizer.prepend_scheme", "qcache.tokenizer.normalizer"


@dataclass(frozen=True)
class AddedToken:
    """A token outside the tokenizer's own model: special ones are control tokens, others are matched in plain text too."""

    id: int
    content: str
    special: bool
    inexact: tuple[str, ...]  # properties llama.cpp doesn't have


@dataclass(frozen=True)
class Vocab:
    """What the `tokenizer.*` keys say."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | tuple[dict[str, str], ...] | None
    prepend_scheme: str | None = None  # Metaspace's, None for the older normalizer
    normalizer: str | None = None


def read_vocab(directory: Path, n_vocab: int, config_ids: Mapping[str, int], warnings: list[str]) -> Vocab:
    """Reads the tokenizer of a directory.

    Args:
        directory: The checkpoint directory.
        n_vocab: Rows of the embedding matrix; ids the tokenizer doesn't use get unused tokens.
        config_ids: Ids of bos, eos, pad and unk that config.json names; the tokenizer's own go first.
        warnings: Gets a remark about each way in which llama.cpp's tokenizer will differ.

    Raises:
        ConversionError: No tokenizer, one of an unsupported kind, one whose files contradict each other, or one with more
            tokens than the model has embeddings.
    """
    config = read_json_if_present(directory / "tokenizer_config.json")
    fast_path, spm_path = directory / "tokenizer.json", directory / "tokenizer.model"
    fast = read_json_if_present(fast_path)
    model, pre, space, scheme, normalizer = "llama", "default", False, None, None
    if fast and _is_byte_level(fast):
        model, pieces = "gpt2", byte_level_pieces(fast_path, fast)
        pre = pieces.pre
        normalizer = _get(fast.get("normalizer"), "type")
    elif fast:
        pieces = byte_fallback_pieces(fast_path, fast, spm_path)
        space, scheme = leading_space(fast_path, fast)
    elif spm_path.exists():
        pieces = sentencepiece_pieces(spm_path)
        space = pieces.leading_space
    else:
        raise ConversionError(f"{directory}: has neither tokenizer.json nor tokenizer.model")

    added = _added_tokens(directory, fast, config, pieces, legacy_space=space and scheme is None)
    tokens, types, scores = _token_list(directory, pieces, added, n_vocab)
    inexact = sorted({(token.content, what) for token in added for what in token.inexact})
    warnings.extend(f"token {content!r} has {what}, which llama.cpp ignores" for content, what in inexact)
    ids = {token: index for index, token in enumerate(tokens)}
    special = _special_ids(directory, config, config_ids, ids, n_vocab)
    add_bos, add_eos = _added_ends(fast, config, special, default_bos=model == "llama")
    return Vocab(
        model,
        pre,
        tuple(tokens),
        tuple(types),
        tuple(scores) if model == "llama" else (),
        tuple(pieces.merges),
        special,
        add_bos,
        add_eos,
        space,
        _chat_template(directory, config),
        scheme,
        normalizer,
    )


def add_vocab_keys(writer: GGUFWriter, vocab: Vocab) -> None:
    """Adds the `tokenizer.*` keys."""
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.model == "llama":
        writer.add_token_scores(vocab.scores)
        writer.add_add_space_prefix(vocab.add_space_prefix)
        if vocab.prepend_scheme is not None:
            writer.add_string(PREPEND_KEY, vocab.prepend_scheme)
    else:
        writer.add_token_merges(vocab.merges)
        if vocab.normalizer is not None:
            writer.add_string(NORMALIZER_KEY, vocab.normalizer)
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
        ("eot", writer.add_eot_token_id),
    ):
        if kind in vocab.special_ids:
            add(vocab.special_ids[kind])
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)
    if vocab.chat_template is not None:
        writer.add_chat_template(vocab.chat_template)


def _is_byte_level(fast: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json spells bytes as characters (GPT-2) rather than falling back to `<0xNN>` (sentencepiece)."""
    pre = fast.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre]) if isinstance(pre, Mapping) else []
    return isinstance(steps, list) and any(
        isinstance(step, Mapping) and step.get("type") == "ByteLevel" for step in steps
    )


def _added_tokens(
    directory: Path, fast: Mapping[str, Any], config: Mapping[str, Any], pieces: Pieces, legacy_space: bool
) -> list[AddedToken]:
    """Added tokens of tokenizer.json; without one those of the slow tokenizer's files."""
    result: list[AddedToken] = []
    records: list[tuple[Any, Any]]
    if fast:
        where = directory / "tokenizer.json"
        records = [(_get(record, "id"), record) for record in _get(fast, "added_tokens") or []]
    elif isinstance(decoder := config.get("added_tokens_decoder"), Mapping):
        where = directory / "tokenizer_config.json"
        records = list(decoder.items())
    else:
        where = directory / "added_tokens.json"
        records = [
            (index, {"content": content, "special": content in _special_contents(config)})
            for content, index in read_json_if_present(where).items()
        ]
    for index, record in records:
        content = _get(record, "content")
        if not isinstance(content, str) or not isinstance(index, (int, str)) or not str(index).isdecimal():
            raise ConversionError(f"{where}: added token {record!r} with id {index!r} has no usable id and content")
        properties = ("lstrip", "rstrip", "single_word", *(("normalized",) if fast and legacy_space else ()))
        inexact = tuple(key for key in properties if record.get(key))
        result.append(AddedToken(int(index), content, bool(record.get("special")), inexact))
    for token in result:
        if token.id < len(pieces.tokens) and pieces.tokens[token.id] not in (None, token.content):
            raise ConversionError(
                f"{where}: added token {token.content!r} has id {token.id}, which is {pieces.tokens[token.id]!r}"
            )
    return result


def _get(value: Any, key: str) -> Any:
    """A key of what should be an object; None when it isn't one."""
    return value.get(key) if isinstance(value, Mapping) else None


def _special_contents(config: Mapping[str, Any]) -> set[str]:
    """Texts of the tokens tokenizer_config.json names as bos, eos and so on."""
    return {content for key, value in config.items() if key.endswith("_token") and (content := _content(value))}


def _content(value: Any) -> str | None:
    """Text of a token that is given as a string or as an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _token_list(
    directory: Path, pieces: Pieces, added: Sequence[AddedToken], n_vocab: int
) -> tuple[list[str], list[TokenType], list[float]]:
    """Lays out every id: the tokenizer's own tokens, added ones over them, unused ones in the rest."""
    n_token = max([len(pieces.tokens), *(token.id + 1 for token in added)])
    if n_token > n_vocab:
        raise ConversionError(f"{directory}: the tokenizer has {n_token} tokens, the model only {n_vocab} embeddings")
    tokens: list[str | None] = [*pieces.tokens, *[None] * (n_vocab - len(pieces.tokens))]
    types = [*pieces.types, *[TokenType.UNUSED] * (n_vocab - len(pieces.types))]
    scores = [*pieces.scores, *[0.0] * (n_vocab - len(pieces.scores))]
    for token in added:
        tokens[token.id] = token.content
        if types[token.id] != TokenType.UNKNOWN:
            types[token.id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    names = [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)]
    # llama.cpp aborts on these
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if name == "":
            raise ConversionError(f"{directory}: token {index} is empty")
        if name in first:
            raise ConversionError(f"{directory}: tokens {first[name]} and {index} are both {name!r}")
        first[name] = index
    return names, types, scores


def _special_ids(
    directory: Path, config: Mapping[str, Any], config_ids: Mapping[str, int], ids: Mapping[str, int], n_vocab: int
) -> dict[str, int]:
    """Ids of bos, eos, unk and pad, and of eot when generation also stops at a token other than eos."""
    specials = read_json_if_present(directory / "special_tokens_map.json")
    result: dict[str, int] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        key = f"{kind}_token"
        content = _content(config.get(key)) or _content(specials.get(key))
        if content is not None:
            if content not in ids:
                raise ConversionError(f"{directory}: {key} {content!r} isn't in the vocabulary")
            result[kind] = ids[content]
        elif key not in config and kind in config_ids:
            if config_ids[kind] >= n_vocab:
                raise ConversionError(
                    f"{directory / 'config.json'}: {key}_id {config_ids[kind]} is out of range, the vocabulary has "
                    f"{n_vocab} tokens"
                )
            result[kind] = config_ids[kind]
    stops = read_json_if_present(directory / "generation_config.json").get("eos_token_id")
    others = [
        stop
        for stop in (stops if isinstance(stops, list) else [stops])
        if isinstance(stop, int) and 0 <= stop < n_vocab and stop != result.get("eos")
    ]
    if others:
        result["eot"] = others[0]
    return result


def _added_ends(
    fast: Mapping[str, Any], config: Mapping[str, Any], special: Mapping[str, int], default_bos: bool
) -> tuple[bool, bool]:
    """Whether encoding puts bos before a text and eos after it.

    A Llama tokenizer goes by tokenizer_config.json; others by the post-processor, and by the configuration when it has
    none.
    """
    template = _template_ends(fast.get("post_processor"))
    llama = str(config.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama"))
    ends: list[bool] = []
    for index, kind in enumerate(("bos", "eos")):
        explicit = config.get(f"add_{kind}_token")
        default = default_bos and kind == "bos" and template is None
        if template is not None and not (llama and isinstance(explicit, bool)):
            value = template[index]
        else:
            value = explicit if isinstance(explicit, bool) else default
        ends.append(value and kind in special)
    return ends[0], ends[1]


def _template_ends(processor: Any) -> tuple[bool, bool] | None:
    """Whether a post-processor's template starts and ends with a special token; None without a template."""
    if not isinstance(processor, Mapping):
        return None
    if processor.get("type") == "Sequence":
        found = [ends for step in processor.get("processors") or [] if (ends := _template_ends(step)) is not None]
        return found[0] if found else None
    single = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(single, list) or not single:
        return None
    return "SpecialToken" in single[0], "SpecialToken" in single[-1]


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | tuple[dict[str, str], ...] | None:
    """The chat template: chat_template.jinja, or the processor's chat_template.json, or the tokenizer's."""
    jinja, processor = directory / "chat_template.jinja", directory / "chat_template.json"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(f"{jinja}: can't be read: {error}") from error
    where, value = directory / "tokenizer_config.json", config.get("chat_template")
    if processor.exists():
        where, value = processor, read_json(processor).get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("template"), str) for one in value
    ):
        return tuple({"name": str(one.get("name", "default")), "template": one["template"]} for one in value)
    raise ConversionError(
        f"{where}: chat_template must be a text or a list of named templates, got {type(value).__name__}"
    )
