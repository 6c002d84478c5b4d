"""The vocabulary reader: every place a tokenizer's parts can be stored in."""

import json
import random
from pathlib import Path

import llama_cpp
import pytest
from gguf import TokenType
from hf_models import AWKWARD, CHAT_TEMPLATE, CORPUS, build_llava, edit_json, save_tokenizer
from transformers import AutoTokenizer

from ggml_qcache_convert import convert
from ggml_qcache_convert.vocab import Vocab, read_vocab

NORMAL, CONTROL, USER = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED


def read(path: Path, n_vocab: int = 600) -> Vocab:
    warnings: list[str] = []
    vocab = read_vocab(path, n_vocab, {}, warnings)
    assert warnings == []
    return vocab


def test_random_text(tmp_path: Path) -> None:
    """Random strings over letters, spaces, marks and special tokens, with each kind of tokenizer."""
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    alphabet = [
        *"".join(CORPUS),
        " ",
        "\n",
        "\t",
        "  ",
        "é",
        "ß",
        "中",
        "😀",
        "123",
        "'s",
        "<image>",
        "</s>",
        "<obj>",
        "\u200d",
        "\u00a0",
        "ç",
    ]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(300)]
    for kind in ("spm", "spm-json", "llama-bpe", "qwen2"):
        build_llava(tmp_path / kind, tokenizer=kind, n_layer=1)
        convert(tmp_path / kind, tmp_path / "m.gguf", None)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        llm = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
        for text in texts:
            assert llm.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, (kind, text)
        llm.close()


def test_token_types(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "spm-json")
    vocab = read(tmp_path)
    types = dict(zip(vocab.tokens, vocab.types))
    assert types["<unk>"] == TokenType.UNKNOWN
    assert types["<s>"] == types["</s>"] == types["<image>"] == types["<pad>"] == CONTROL
    assert types["<obj>"] == USER
    assert types["<0x0A>"] == TokenType.BYTE
    assert types["▁the"] == types["e"] == NORMAL
    assert vocab.tokens[599] == "[PAD599]" and vocab.types[599] == TokenType.UNUSED
    assert len(vocab.tokens) == len(vocab.types) == len(vocab.scores) == 600


def test_scores_from_merges_order_pieces_as_sentencepiece_does(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "both", "spm")
    save_tokenizer(tmp_path / "json", "spm-json")
    both, only = read(tmp_path / "both"), read(tmp_path / "json")
    assert both.tokens == only.tokens and both.types == only.types
    merged = [i for i, token in enumerate(both.tokens) if both.types[i] == NORMAL and len(token) > 1]
    assert sorted(merged, key=lambda i: -both.scores[i]) == sorted(merged, key=lambda i: -only.scores[i])


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder"])
def test_sentencepiece_model_alone(tmp_path: Path, where: str) -> None:
    save_tokenizer(tmp_path, "spm")
    expected = read(tmp_path)
    added = {
        record["content"]: record for record in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    }
    (tmp_path / "tokenizer.json").unlink()
    if where == "added_tokens.json":
        (tmp_path / where).write_text(
            json.dumps({token: added[token]["id"] for token in ("<image>", "<pad>", "<obj>")})
        )
        edit_json(tmp_path / "tokenizer_config.json", image_token="<image>")
    else:
        records = {str(r["id"]): {"content": r["content"], "special": r["special"]} for r in added.values()}
        edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=records)
    assert read(tmp_path) == expected


def test_chat_template_places(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "spm-json")
    assert read(tmp_path).chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()
    assert read(tmp_path).chat_template is None
    edit_json(tmp_path / "tokenizer_config.json", chat_template="from the tokenizer")
    assert read(tmp_path).chat_template == "from the tokenizer"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    assert read(tmp_path).chat_template == tuple(named)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from the processor"}')
    assert read(tmp_path).chat_template == "from the processor"


def test_special_ids(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "llama-bpe")
    ids = {token: index for index, token in enumerate(read(tmp_path).tokens)}
    assert read(tmp_path).special_ids == {"bos": ids["<s>"], "eos": ids["</s>"], "pad": ids["<pad>"]}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["</s>"], ids["<obj>"]]}))
    assert read(tmp_path).special_ids["eot"] == ids["<obj>"]
    edit_json(tmp_path / "tokenizer_config.json", pad_token=None, eos_token={"content": "<obj>"})
    assert "pad" not in read(tmp_path).special_ids and read(tmp_path).special_ids["eos"] == ids["<obj>"]
    assert read_vocab(tmp_path, 600, {"pad": 9}, []).special_ids["pad"] == 9


@pytest.mark.parametrize("kind", ["spm-json", "llama-bpe", "qwen2"])
def test_bos_follows_the_post_processor(tmp_path: Path, kind: str) -> None:
    save_tokenizer(tmp_path, kind)
    assert (read(tmp_path).add_bos, read(tmp_path).add_eos) == (kind != "qwen2", False)
    edit_json(tmp_path / "tokenizer.json", post_processor=None)
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<s>", add_bos_token=False, add_eos_token=True)
    assert (read(tmp_path).add_bos, read(tmp_path).add_eos) == (False, True)


def test_added_token_properties_that_are_lost_give_a_warning(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "spm-json")
    records = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    records[-1]["lstrip"] = True
    edit_json(tmp_path / "tokenizer.json", added_tokens=records)
    warnings: list[str] = []
    read_vocab(tmp_path, 600, {}, warnings)
    assert warnings == ["token '<obj>' has lstrip, which llama.cpp ignores"]


def test_smaug_is_llama_bpe_without_the_word_lookup(tmp_path: Path) -> None:
    build_llava(tmp_path / "hf", tokenizer="llama-bpe", n_layer=1)
    edit_json(tmp_path / "hf" / "tokenizer.json", model__ignore_merges=False)
    convert(tmp_path / "hf", tmp_path / "m.gguf", None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    llm = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    assert llm.metadata["tokenizer.ggml.pre"] == "smaug-bpe"
    for text in AWKWARD:
        assert llm.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids
    llm.close()
