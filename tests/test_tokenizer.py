"""The runtime's tokenizer against Hugging Face's, on thousands of awkward strings, through the real conversion."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from awkward import awkward_strings
from core_helpers import rewrite_gguf
from gguf import GGUFValueType
from hf_models import AWKWARD, build_llava, edit_json, save_tokenizer
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ggml_qcache import Llama
from ggml_qcache.chat import MediaPrompt
from ggml_qcache.errors import UnsupportedError
from ggml_qcache.images import ImageLoader
from ggml_qcache.validation import validate_file
from ggml_qcache_convert import convert
from ggml_qcache_convert.make_lazy import make_lazy

KINDS = ["spm", "spm-json", "spm-metaspace", "spm-metaspace-always", "llama-bpe", "qwen2"]
SPECIAL = ("<s>", "</s>", "<image>", "<pad>", "<obj>", "<unk>")


@contextlib.contextmanager
def converted(folder: Path, kind: str, **arguments: object):
    """The tokenizer of a tiny checkpoint, by transformers, and a `Llama` of its conversion."""
    base = kind.removesuffix("-always")
    build_llava(folder / "hf", tokenizer=base, n_layer=1)
    if base != kind:
        edit_json(folder / "hf" / "tokenizer.json", pre_tokenizer__prepend_scheme="always")
    result = convert(folder / "hf", folder / "m.gguf", folder / "mm.gguf")
    assert result.warnings == ()
    with Llama(str(folder / "m.gguf"), mmproj_path=str(folder / "mm.gguf"), n_ctx=256, n_threads=1, **arguments) as llm:
        yield AutoTokenizer.from_pretrained(folder / "hf"), llm


def differing(llm: Llama, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, tuple[list[int], list[int]]]:
    """The texts with other tokens here than there."""
    pairs = {text: (llm.tokenize(text.encode(), True, True), tokenizer(text).input_ids) for text in texts}
    return {text: pair for text, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_hugging_face(tmp_path: Path, kind: str) -> None:
    with converted(tmp_path, kind) as (tokenizer, llm):
        special = [token for token in SPECIAL if token in tokenizer.get_vocab()]
        assert differing(llm, tokenizer, [*AWKWARD, *awkward_strings(special)]) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_with_an_image_equals_hugging_face(tmp_path: Path, kind: str) -> None:
    """The text around an image is cut there as a special token cuts it."""
    image = ImageLoader().load(Image.new("RGB", (60, 60)))
    with converted(tmp_path, kind) as (tokenizer, llm):
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        for before, after in (("USER: ", "\nWhat?"), ("", " What?"), ("a", "e\u0301"), ("<s>", "What?"), (" ", "</s> x")):
            parts = [part for part in (before, image, after) if part != ""]
            ids = np.array(llm.tokenize(MediaPrompt(parts)))
            (start,) = [start for start, _ in llm._images]
            ids[start] = image_id
            assert ids[ids >= 0].tolist() == tokenizer(f"{before}<image>{after}").input_ids, (before, after)


def test_a_lazy_copy_keeps_the_rules(tmp_path: Path) -> None:
    """Lazy layers are another matter: neither do the tokenizer's keys make a file lazy, nor are they lost with other ones."""
    with converted(tmp_path, "spm-metaspace") as (tokenizer, _):
        assert validate_file(tmp_path / "m.gguf") == []
        make_lazy(tmp_path / "m.gguf", tmp_path / "copy.gguf")
        with Llama(str(tmp_path / "copy.gguf"), n_ctx=64, n_threads=1) as llm:
            assert differing(llm, tokenizer, AWKWARD) == {}


def test_a_rule_of_a_later_version_is_refused(tmp_path: Path) -> None:
    with converted(tmp_path, "qwen2"):
        rule = {"qcache.tokenizer.normalizer": (GGUFValueType.STRING, "NFKC")}
        rewrite_gguf(tmp_path / "m.gguf", tmp_path / "later.gguf", rule)
        with pytest.raises(UnsupportedError, match="normalizer 'NFKC' is not supported"):
            Llama(str(tmp_path / "later.gguf"), n_ctx=64)


def test_special_tokens_as_text(tmp_path: Path) -> None:
    """Without `special` they are words, and a scheme's space goes where the text alone says."""
    with converted(tmp_path, "spm-metaspace-always") as (tokenizer, llm):
        for text in ("a</s>b", "</s> x", " <s>"):
            ids = llm.tokenize(text.encode(), False, False)
            assert tokenizer.convert_tokens_to_ids("</s>") not in ids and tokenizer.convert_tokens_to_ids("<s>") not in ids
            assert llm.detokenize(ids).decode().strip() == text.strip()


def test_invalid_utf_8_is_left_to_llama_cpp(tmp_path: Path) -> None:
    with converted(tmp_path, "qwen2") as (_, llm):
        assert llm.tokenize(b"a\xff\xfeb", False, False) == llm._model.tokenize(b"a\xff\xfeb", False, False)


@pytest.mark.parametrize("kind", ["spm", "llama-bpe", "qwen2"])
def test_fine_tunes_with_more_tokens_and_padded_embeddings(tmp_path: Path, kind: str) -> None:
    """Tokens added after training, special or not, and embeddings resized to a multiple of 64."""
    model = build_llava(tmp_path / "hf", tokenizer=kind, n_layer=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.add_tokens([AddedToken("<box>", normalized=False), AddedToken("[act=1]", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<im_start>", "<im_end>"]})
    tokenizer.save_pretrained(tmp_path / "hf")
    n_vocab = model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64).weight.shape[0]
    model.save_pretrained(tmp_path / "hf")
    assert n_vocab % 64 == 0 and n_vocab > len(tokenizer)
    assert convert(tmp_path / "hf", tmp_path / "m.gguf", None, "f32").warnings == ()
    with Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1) as llm:
        assert llm.n_vocab() == n_vocab
        texts = ["<box>1,2</box>", "a [act=1] b", "<im_start>user\nhi<im_end>\n", " <box><box> ", "<image><im_end>"]
        known = tokenizer.get_vocab()
        special = [token for token in (*SPECIAL, "<box>", "[act=1]", "<im_start>", "<im_end>") if token in known]
        assert differing(llm, tokenizer, [*texts, *awkward_strings(special, 300)]) == {}
        end = tokenizer.convert_tokens_to_ids("<im_end>")
        assert llm.detokenize([end]) == b"" and llm.detokenize([end], special=True) == b"<im_end>"


def test_normalized_tokens_give_a_warning(tmp_path: Path) -> None:
    """In Hugging Face's older sentencepiece tokenizers such a token is only found after a space."""
    build_llava(tmp_path / "hf", tokenizer="spm", n_layer=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.add_tokens([AddedToken("<norm>", normalized=True)])
    tokenizer.save_pretrained(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", text_config__vocab_size=len(tokenizer))
    model = build_llava(tmp_path / "other", tokenizer="spm", n_layer=1)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "hf")
    result = convert(tmp_path / "hf", tmp_path / "m.gguf", None)
    assert result.warnings == ("token '<norm>' has normalized, which llama.cpp ignores",)
    with Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1) as llm:
        assert list(differing(llm, tokenizer, ["a<norm>b"])) == ["a<norm>b"]
