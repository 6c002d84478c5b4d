"""The text GGUF in stock llama.cpp: logits and tokenization against Hugging Face."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hf_models import AWKWARD, CHAT_TEMPLATE, MINI_LLAVA, build_llava, nmse
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from ggml_qcache_convert import convert
from ggml_qcache_convert.make_lazy import make_lazy
from ggml_qcache_convert.outtypes import OUTTYPES


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits of stock llama.cpp for every position."""
    llm = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    llm.eval(ids)
    logits = np.array(llm.scores[: len(ids)])
    llm.close()
    return logits


def hf_logits(model: LlavaForConditionalGeneration, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def llama_tokens(llm: llama_cpp.Llama, text: str) -> list[int]:
    return llm.tokenize(text.encode(), add_bos=True, special=True)


def ids_for(n_vocab: int) -> list[int]:
    """Token ids over the whole vocabulary, without those past the tokenizer's end."""
    return np.random.default_rng(7).integers(3, n_vocab - 10, 24).tolist()


CASES = {
    "llama-mha": {"n_head_kv": 4},
    "llama-gqa": {"n_head_kv": 2},
    "llama-mqa-head-dim": {"n_head_kv": 1, "head_dim": 32},
    "llama-bias": {"bias": True},
    "llama-tied": {"tied": True},
    "llama-old-names": {"names": "old"},
    "llama-new-names": {"names": "new"},
    "llama-sharded": {"sharded": True},
    "llama-sharded-new-names": {"sharded": True, "names": "new"},
    "llama-rope-theta": {"rope": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama-rope-linear": {"rope": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama-rope-llama3": {
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "mistral": {"text": "mistral"},
    "qwen2": {"text": "qwen2", "tokenizer": "qwen2"},
    "qwen2-tied-new-names": {"text": "qwen2", "tokenizer": "qwen2", "tied": True, "names": "new"},
    "llama-bpe": {"tokenizer": "llama-bpe"},
    "llama-rope-yarn": {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}},
    "next-vicuna": {"family": "llava_next"},
    "next-mistral-old-names": {"family": "llava_next", "text": "mistral", "names": "old"},
    "next-llama-3-new-names": {"family": "llava_next", "tokenizer": "llama-bpe", "names": "new", "sharded": True},
    "onevision": {"family": "llava_onevision", "text": "qwen2", "tokenizer": "qwen2"},
    "onevision-tied-old-names": {"family": "llava_onevision", "text": "qwen2", "tokenizer": "qwen2", "tied": True, "names": "old"},
    "onevision-new-names": {"family": "llava_onevision", "text": "qwen2", "tokenizer": "qwen2", "names": "new", "sharded": True},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(tmp_path: Path, case: str) -> None:
    model = build_llava(tmp_path / "hf", **CASES[case])
    result = convert(tmp_path / "hf", tmp_path / "m.gguf", tmp_path / "mm.gguf", "f32")
    ids = ids_for(model.config.text_config.vocab_size)
    assert result.warnings == ()
    assert nmse(llama_logits(tmp_path / "m.gguf", ids), hf_logits(model, ids)) <= 1e-5


@pytest.mark.parametrize(("outtype", "limit"), [("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 1e-2), ("q5_1", 1e-1), ("q5_0", 1e-1), ("q4_1", 3e-1), ("q4_0", 3e-1)])
def test_outtypes(tmp_path: Path, outtype: str, limit: float) -> None:
    model = build_llava(tmp_path / "hf", dtype=torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "m.gguf", None, outtype)
    ids = ids_for(model.config.text_config.vocab_size)
    assert nmse(llama_logits(tmp_path / "m.gguf", ids), hf_logits(model, ids)) <= limit
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.1.ffn_down.weight"] == outtype.upper()
    assert types["token_embd.weight"] == outtype.upper()
    assert types["output.weight"] == ("Q8_0" if outtype.startswith(("q4", "q5")) else outtype.upper())
    assert types["blk.1.attn_norm.weight"] == types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("outtype", ["q4_k_m", "q5_k_m", "q6_k"])
def test_k_quants_are_those_of_llama_cpp(tmp_path: Path, outtype: str) -> None:
    # 17 layers, so that a wrong rule for the layers with more bits shows; rows of 288 values are no whole blocks of 256
    build_llava(tmp_path / "hf", n_layer=17, hidden=256, n_ff=288)
    convert(tmp_path / "hf", tmp_path / "ours.gguf", None, outtype)
    convert(tmp_path / "hf", tmp_path / "f32.gguf", None, "f32")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = OUTTYPES[outtype].file_type, 1
    source, target = str(tmp_path / "f32.gguf").encode(), str(tmp_path / "theirs.gguf").encode()
    assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)) == 0
    make_lazy(tmp_path / "f32.gguf", tmp_path / "again.gguf", outtype=outtype)
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "theirs.gguf").tensors}
    for name in ("ours", "again"):
        reader = GGUFReader(tmp_path / f"{name}.gguf")
        assert reader.fields["general.file_type"].contents() == OUTTYPES[outtype].file_type
        assert {t.name: t.tensor_type.name for t in reader.tensors} == {t.name: t.tensor_type.name for t in theirs.values()}
        assert all(np.array_equal(tensor.data, theirs[tensor.name].data) for tensor in reader.tensors)


def test_rows_that_are_not_whole_blocks_fall_back_to_f16(tmp_path: Path) -> None:
    model = build_llava(tmp_path / "hf", n_ff=168)
    convert(tmp_path / "hf", tmp_path / "m.gguf", None, "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    ids = ids_for(model.config.text_config.vocab_size)
    assert nmse(llama_logits(tmp_path / "m.gguf", ids), hf_logits(model, ids)) <= 1e-2


@pytest.mark.parametrize("kind", ["spm", "spm-json", "llama-bpe", "qwen2"])
def test_tokenization_equals_hugging_face(tmp_path: Path, kind: str) -> None:
    build_llava(tmp_path / "hf", tokenizer=kind, n_layer=1)
    convert(tmp_path / "hf", tmp_path / "m.gguf", None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    llm = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    # an NFC normalizer isn't applied by llama.cpp
    texts = [text for text in AWKWARD if kind != "qwen2" or "\u0301" not in text]
    assert {text: llama_tokens(llm, text) for text in texts} == {text: tokenizer(text).input_ids for text in texts}
    assert llm.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert llm.token_eos() == tokenizer.eos_token_id
    llm.close()


def test_metaspace_tokenizer_in_stock_llama_cpp_differs_only_in_leading_spaces(tmp_path: Path) -> None:
    build_llava(tmp_path / "hf", tokenizer="spm-metaspace", n_layer=1)
    assert convert(tmp_path / "hf", tmp_path / "m.gguf", None).warnings == ()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    llm = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    differing = {text for text in AWKWARD if llama_tokens(llm, text) != tokenizer(text).input_ids}
    assert all(text.startswith((" ", "▁")) or "<image>" in text or "<s>" in text for text in differing), differing
    llm.close()


def test_mini_llava(tmp_path: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(MINI_LLAVA, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MINI_LLAVA)
    convert(MINI_LLAVA, tmp_path / "m.gguf", None, "f32")
    ids = tokenizer("How many red squares are there?").input_ids
    assert nmse(llama_logits(tmp_path / "m.gguf", ids), hf_logits(model, ids)) <= 1e-5
    llm = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    differing = [text for text in AWKWARD if llama_tokens(llm, text) != tokenizer(text).input_ids]
    llm.close()
    assert not differing
