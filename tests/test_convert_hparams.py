"""Configurations: the repeated defaults against transformers' classes, and sparse configs as real checkpoints have them."""

import json
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, MistralConfig, Qwen2Config

from ggml_qcache_convert.hparams import Anyres, LlavaParams, RopeScaling, read_hparams


def params_of(path: Path, config: dict[str, object]) -> LlavaParams:
    (path / "config.json").write_text(json.dumps({"architectures": ["LlavaForConditionalGeneration"], **config}))
    return read_hparams(path)


@pytest.mark.parametrize(
    ("kind", "config_class"), [("llama", LlamaConfig), ("mistral", MistralConfig), ("qwen2", Qwen2Config)]
)
def test_text_defaults_are_those_of_transformers(tmp_path: Path, kind: str, config_class: type) -> None:
    text = params_of(tmp_path, {"text_config": {"model_type": kind, "sliding_window": None}}).text
    expected = config_class()
    assert (text.n_embd, text.n_ff, text.n_layer) == (
        expected.hidden_size,
        expected.intermediate_size,
        expected.num_hidden_layers,
    )
    assert (text.n_head, text.n_head_kv) == (expected.num_attention_heads, expected.num_key_value_heads)
    assert (text.n_vocab, text.n_ctx) == (expected.vocab_size, expected.max_position_embeddings)
    assert (text.rms_eps, text.rope_theta) == (expected.rms_norm_eps, expected.rope_parameters["rope_theta"])
    assert text.tied is expected.tie_word_embeddings


@pytest.mark.parametrize(
    ("vision_config", "expected"),
    [(None, LlavaConfig().vision_config), ({"hidden_act": "gelu"}, CLIPVisionConfig(hidden_act="gelu"))],
)
def test_vision_defaults_are_those_of_transformers(
    tmp_path: Path, vision_config: object, expected: CLIPVisionConfig
) -> None:
    vision = params_of(tmp_path, {"vision_config": vision_config}).vision
    assert (vision.n_embd, vision.n_ff, vision.n_layer) == (
        expected.hidden_size,
        expected.intermediate_size,
        expected.num_hidden_layers,
    )
    assert (vision.n_head, vision.image_size, vision.patch_size) == (
        expected.num_attention_heads,
        expected.image_size,
        expected.patch_size,
    )
    assert (vision.act, vision.norm_eps) == (expected.hidden_act, expected.layer_norm_eps)
    assert vision.feature_layers == (expected.num_hidden_layers - 1,)
    assert vision.anyres is None


def test_llava_next_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    params, expected = params_of(tmp_path, {"architectures": ["LlavaNextForConditionalGeneration"]}), LlavaNextConfig()
    assert params.vision.anyres == Anyres("llava_next", tuple(map(tuple, expected.image_grid_pinpoints)), 0)
    tower = expected.vision_config
    assert (params.vision.n_layer, params.vision.image_size, params.vision.siglip) == (tower.num_hidden_layers, tower.image_size, False)
    assert params.vision.feature_layers == (tower.num_hidden_layers + 1 + expected.vision_feature_layer,)
    assert params.text.arch == expected.text_config.model_type == "llama"


@pytest.mark.parametrize("vision_config", [None, {"image_size": 384}])
def test_llava_onevision_defaults_are_those_of_transformers(tmp_path: Path, vision_config: object) -> None:
    params = params_of(tmp_path, {"architectures": [], "model_type": "llava_onevision", "vision_config": vision_config})
    expected = LlavaOnevisionConfig(vision_config=vision_config)
    vision, tower = params.vision, expected.vision_config
    assert vision.anyres == Anyres("llava_onevision", tuple(map(tuple, expected.image_grid_pinpoints)), 9)
    assert (vision.n_embd, vision.n_ff, vision.n_layer, vision.n_head, vision.image_size, vision.patch_size, vision.act, vision.norm_eps) == (
        tower.hidden_size,
        tower.intermediate_size,
        tower.num_hidden_layers,
        tower.num_attention_heads,
        tower.image_size,
        tower.patch_size,
        tower.hidden_act,
        tower.layer_norm_eps,
    )
    assert vision.siglip and vision.feature_layers == (tower.num_hidden_layers + 1 + expected.vision_feature_layer,)
    assert params.text.arch == expected.text_config.model_type == "qwen2"


def test_rope_of_transformers_4_and_5(tmp_path: Path) -> None:
    old = {"text_config": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}}
    new = {"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}}
    for config in (old, new):
        text = params_of(tmp_path, config).text
        assert (text.rope_theta, text.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


def test_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    params = params_of(tmp_path, {"text_config": {"model_type": "mistral"}})
    assert params.text.n_ctx == 4096
    assert "sliding window of 4096" in params.warnings[0]
    params = params_of(tmp_path, {"text_config": {"model_type": "qwen2"}})
    assert params.text.n_ctx == 32768 and params.warnings == ()
