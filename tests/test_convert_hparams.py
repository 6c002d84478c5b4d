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


# what the released checkpoints' configurations say
RELEASED = {
    "llava-v1.6-mistral-7b": (
        "LlavaNextForConditionalGeneration",
        {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
        ("llama", 4096, 32064, 32768, 8, 1e6),
        (False, 23, 576),
    ),
    "llava-v1.6-vicuna-13b": (
        "LlavaNextForConditionalGeneration",
        {
            "model_type": "llama",
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "max_position_embeddings": 4096,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
        {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
        ("llama", 5120, 32064, 4096, 40, 1e4),
        (False, 23, 576),
    ),
    "llama3-llava-next-8b": (
        "LlavaNextForConditionalGeneration",
        {
            "model_type": "llama",
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "vocab_size": 128320,
        },
        {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
        ("llama", 4096, 128320, 8192, 8, 5e5),
        (False, 23, 576),
    ),
    "llava-onevision-qwen2-0.5b": (
        "LlavaOnevisionForConditionalGeneration",
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 152000,
        },
        {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False},
        ("qwen2", 896, 152000, 32768, 2, 1e6),
        (True, 26, 729),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations(tmp_path: Path, name: str) -> None:
    architecture, text, vision, expected_text, expected_vision = RELEASED[name]
    params = params_of(tmp_path, {"architectures": [architecture], "text_config": text, "vision_config": vision})
    assert (params.text.arch, params.text.n_embd, params.text.n_vocab, params.text.n_ctx, params.text.n_head_kv, params.text.rope_theta) == expected_text
    tower = params.vision
    assert (tower.siglip, *tower.feature_layers, (tower.image_size // tower.patch_size) ** 2) == expected_vision
    assert params.text.tied is (name == "llava-onevision-qwen2-0.5b") and params.warnings == ()


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
