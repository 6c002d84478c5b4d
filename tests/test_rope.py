"""Scaled rotary embeddings: the core's logits against libllama on the same file, and against Hugging Face in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from core_helpers import BOUNDS, CoreModel, assert_close, decode, make_context, make_prompt, rewrite_gguf
from gguf import GGUFReader, GGUFValueType
from hf_models import build_llava, edit_json, nmse
from test_logits import libllama_logits, reference

from ggml_qcache.native import Model
from ggml_qcache_convert import convert, leaders_of
from ggml_qcache_convert.hparams import read_hparams

N_LAYER = 4
LEADER = leaders_of([2], N_LAYER)
QWEN2 = {"text": "qwen2", "tokenizer": "qwen2"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# with heads of 32 and a base of 100 the original context of 32 tokens leaves some frequencies alone, divides some, mixes the rest
CASES = {
    "linear": ({}, {"rope_type": "linear", "factor": 4.0}),
    "linear-qwen2": (QWEN2, {"rope_type": "linear", "factor": 2.5}),
    "llama3": ({}, LLAMA3),
    "yarn": ({}, YARN),
    "yarn-qwen2": (QWEN2, YARN),
    "yarn-attention-factor": ({}, {**YARN, "attention_factor": 1.3}),
    "yarn-mscale": ({}, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4}),
    "yarn-below-one": ({}, {**YARN, "factor": 0.5}),
    "dynamic": ({}, {"rope_type": "dynamic", "factor": 4.0}),
}


def model_of(folder: Path, case: str) -> CoreModel:
    shape, rope = CASES[case]
    hf = build_llava(folder / "hf", n_layer=N_LAYER, hidden=128, n_head=4, n_head_kv=2, rope={**rope, "rope_theta": 100.0}, **shape).double()
    convert(folder / "hf", folder / "m.gguf", None, "f32")
    return CoreModel(hf, folder / "hf", folder / "m.gguf", Model(folder / "m.gguf"))


@pytest.mark.parametrize("case", CASES)
def test_scaled_positions(tmp_path: Path, case: str) -> None:
    model = model_of(tmp_path, case)
    with model.native:
        prompt = make_prompt(model.native, "t100")  # past the original context of those that have one
        off = decode(make_context(model.native), prompt)
        assert nmse(off, libllama_logits(model.path, prompt.tokens)) <= BOUNDS["libllama f32"]
        assert_close(off, reference(model, prompt, LEADER, "off"), "reference f16")
        mixed = make_prompt(model.native, "t9 v60 t30")
        lazy = decode(make_context(model.native, lazy_mode="visual", lazy_leader=LEADER), mixed)
        assert_close(lazy, reference(model, mixed, LEADER, "visual"), "reference f16")
    if case == "dynamic":
        return
    # the scaling matters: without it the same weights give something else
    plain = {f"{model.hf.config.text_config.model_type}.rope.scaling.type": (GGUFValueType.STRING, "none")}
    rewrite_gguf(model.path, tmp_path / "plain.gguf", plain, {"rope_freqs.weight": None} if case == "llama3" else None)
    with Model(tmp_path / "plain.gguf") as native:
        assert nmse(decode(make_context(native), prompt), off) > 1e-3


def test_dynamic_keeps_the_context_it_is_exact_in(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    build_llava(tmp_path / "hf", n_layer=1, rope=rope)
    result = convert(tmp_path / "hf", tmp_path / "m.gguf", None, "f32")
    (warning,) = result.warnings
    assert "dynamic" in warning and "512 tokens" in warning
    assert GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 512


def test_yarn_context(tmp_path: Path) -> None:
    build_llava(tmp_path, n_layer=1, rope={**YARN, "rope_theta": 100.0})
    for longest, rope, expected in (
        (32, {"factor": 4.0}, (128, 4.0, 32)),  # the one before scaling
        (128, {"factor": 4.0, "original_max_position_embeddings": 32}, (128, 4.0, 32)),
        (128, {"original_max_position_embeddings": 32}, (128, 4.0, 32)),
    ):
        yarn = {"type": "yarn", **rope}
        edit_json(tmp_path / "config.json", text_config__max_position_embeddings=longest, text_config__rope_parameters=yarn)
        text = read_hparams(tmp_path).text
        assert (text.n_ctx, text.rope_scaling.factor, text.rope_scaling.original_context) == expected
    # a sliding window bounds the scaled context too
    edit_json(tmp_path / "config.json", text_config__model_type="mistral", text_config__sliding_window=100)
    assert read_hparams(tmp_path).text.n_ctx == 100


def test_rope_frequencies_of_a_file_are_those_of_hugging_face(tmp_path: Path) -> None:
    """Divisors of Llama 3's frequencies, exactly."""
    model = build_llava(tmp_path / "hf", n_layer=1, rope={**LLAMA3, "rope_theta": 10000.0})
    convert(tmp_path / "hf", tmp_path / "m.gguf", None, "f32")
    factors = next(tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "rope_freqs.weight")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert np.allclose(plain.numpy() / factors, model.model.language_model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
