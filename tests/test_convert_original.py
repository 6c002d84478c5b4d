"""The original LLaVA repository's layout gives the bytes that Hugging Face's layout of the same weights gives."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hf_models import build_llava, edit_json
from mtmd_encoder import encoder
from safetensors.torch import load_file, save_file
from test_vision import cosines, picture
from transformers import CLIPModel, CLIPVisionModel, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ggml_qcache_convert import ConversionError, convert
from ggml_qcache_convert.cli import main

TOWER_FILES = ("preprocessor_config.json",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def original_name(name: str) -> str:
    """The original's name of a tensor in memory of this transformers."""
    name = name.removeprefix("model.")
    if name.startswith("multi_modal_projector"):
        return name.replace("multi_modal_projector.linear_1", "model.mm_projector.0").replace("multi_modal_projector.linear_2", "model.mm_projector.2")
    return name.replace("language_model.", "model.", 1)


def drop_image_token(path: Path) -> None:
    """Takes `<image>` out of a tokenizer: the original's has none."""
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    file.write_text(json.dumps(content))


def split(hf: Path, model: LlavaForConditionalGeneration, folder: Path, trained_tower: bool = False) -> tuple[Path, Path]:
    """Saves a model as the original does.

    Args:
        hf: Its checkpoint in Hugging Face's layout.
        model: The model.
        folder: Where to put the checkpoint and the tower.
        trained_tower: The checkpoint has a tower too, the one outside has other weights.

    Returns:
        The checkpoint and the tower.
    """
    checkpoint, tower = folder / "llava", folder / "clip"
    checkpoint.mkdir(parents=True)
    model.model.vision_tower.save_pretrained(tower)
    for names, target in ((TOWER_FILES, tower), (TOKENIZER_FILES, checkpoint)):
        for name in names:
            shutil.copy(hf / name, target / name)
    tensors = {original_name(name): tensor for name, tensor in model.state_dict().items() if "vision_tower" not in name}
    if trained_tower:
        own = {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in load_file(tower / "model.safetensors").items()}
        tensors |= {name.replace("vision_model.vision_model.", "vision_model."): tensor for name, tensor in own.items()}
        save_file({name: tensor + 1 for name, tensor in load_file(tower / "model.safetensors").items()}, tower / "model.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    text = model.config.text_config
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint, tower


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaForConditionalGeneration]:
    path = tmp_path_factory.mktemp("hf") / "hf"
    built = build_llava(path, n_layer=2)
    drop_image_token(path)
    return path, built


@pytest.fixture(scope="module")
def expected(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    convert(model[0], folder / "m.gguf", folder / "mm.gguf", "q8_0", name="llava")
    return (folder / "m.gguf").read_bytes(), (folder / "mm.gguf").read_bytes()


def converted(folder: Path, checkpoint: Path, tower: Path, **arguments: Any) -> tuple[bytes, bytes]:
    convert(checkpoint, folder / "m.gguf", folder / "mm.gguf", "q8_0", name="llava", vision_tower=tower, **arguments)
    return (folder / "m.gguf").read_bytes(), (folder / "mm.gguf").read_bytes()


@pytest.mark.parametrize("trained_tower", [False, True])
def test_equals_the_hugging_face_layout(tmp_path: Path, model: tuple[Path, Any], expected: tuple[bytes, bytes], trained_tower: bool) -> None:
    checkpoint, tower = split(*model, tmp_path, trained_tower)
    assert converted(tmp_path, checkpoint, tower) == expected
    edit_json(checkpoint / "config.json", model_type="llava_llama")
    assert converted(tmp_path, checkpoint, tower) == expected


def test_a_whole_clip_is_a_tower_too(tmp_path: Path, model: tuple[Path, Any], expected: tuple[bytes, bytes]) -> None:
    """As openai/clip-vit-large-patch14-336 on the Hub: both towers in one pickle, with buffers of integers."""
    checkpoint, tower = split(*model, tmp_path)
    vision = CLIPVisionModel.from_pretrained(tower)
    config = {"model_type": "clip", "vision_config": vision.config.to_dict(), "text_config": {}, "projection_dim": 768}
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in load_file(tower / "model.safetensors").items()}
    tensors |= {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_model.final_layer_norm.bias": torch.ones(3),
        "text_projection.weight": torch.ones(2, 2),
        "visual_projection.weight": torch.ones(2, 2),
        "logit_scale": torch.tensor(4.6),
    }
    assert {name.split(".")[0] for name in tensors} == {name.split(".")[0] for name in CLIPModel(_small_clip()).state_dict()}
    (tower / "model.safetensors").unlink()
    torch.save(tensors, tower / "pytorch_model.bin")
    (tower / "config.json").write_text(json.dumps(config))
    assert converted(tmp_path, checkpoint, tower) == expected


def test_a_lora_of_a_plain_language_model(tmp_path: Path, model: tuple[Path, Any], expected: tuple[bytes, bytes]) -> None:
    """As liuhaotian/llava-v1.5-7b-lora: Vicuna is the base; configuration and projector lie beside the adapter."""
    base, tower = split(*model, tmp_path)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    tensors = torch.load(base / "pytorch_model.bin", weights_only=True)
    projector = {f"base_model.model.{name}": tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    torch.save(projector, adapter / "non_lora_trainables.bin")
    # the base lacks what A and B add
    q = "model.layers.1.self_attn.q_proj"
    torch.manual_seed(0)
    a, b = torch.randn(4, 64) * 0.1, torch.randn(64, 4) * 0.1
    tensors[f"{q}.weight"] = tensors[f"{q}.weight"] - 2 * (b @ a)
    torch.save(tensors, base / "pytorch_model.bin")
    save_file({f"base_model.model.{q}.lora_A.weight": a, f"base_model.model.{q}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}))
    shutil.move(base / "config.json", adapter / "config.json")
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    convert(base, tmp_path / "m.gguf", tmp_path / "mm.gguf", "f32", name="llava", vision_tower=tower, adapters=[adapter])
    convert(model[0], tmp_path / "n.gguf", tmp_path / "nn.gguf", "f32", name="llava")
    assert (tmp_path / "mm.gguf").read_bytes() == (tmp_path / "nn.gguf").read_bytes()
    ours, theirs = (GGUFReader(tmp_path / name) for name in ("m.gguf", "n.gguf"))
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(one.data, other.data, atol=2e-6, err_msg=one.name)


def _small_clip() -> Any:
    from transformers import CLIPConfig

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPConfig(text_config={**small, "vocab_size": 8}, vision_config={**small, "image_size": 8, "patch_size": 8}, projection_dim=2)


def test_a_linear_projector(tmp_path: Path, model: tuple[Path, LlavaForConditionalGeneration]) -> None:
    """mtmd has no projector of one matrix: it is written as one with GELU that comes to the same."""
    hf, llava = model
    checkpoint, tower = split(hf, llava, tmp_path)
    tensors = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    for name in [name for name in tensors if "mm_projector" in name]:
        del tensors[name]
    torch.manual_seed(2)
    weight, bias = torch.randn(64, 32) * 0.2, torch.randn(64) * 0.2
    tensors |= {"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    edit_json(checkpoint / "config.json", mm_projector_type="linear")
    processor = CLIPImageProcessorPil.from_pretrained(tower)
    image = picture(100, 100, 1)
    pixels = torch.from_numpy(np.asarray(processor(images=[image], return_tensors="np")["pixel_values"]))
    with torch.no_grad():
        expected = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:] @ weight.T + bias
    for outtype in ("f32", "q8_0"):
        convert(checkpoint, tmp_path / "m.gguf", tmp_path / "mm.gguf", outtype, vision_tower=tower)
        with encoder(tmp_path / "m.gguf", tmp_path / "mm.gguf", 64) as encode:
            got = encode(image)
        assert cosines(got, expected.numpy()).min() >= 0.999 and np.abs(got - expected.numpy()).max() < 0.05
    edit_json(checkpoint / "config.json", mm_projector_type=None)  # the original's default
    convert(checkpoint, tmp_path / "n.gguf", tmp_path / "nn.gguf", "q8_0", vision_tower=tower)
    assert (tmp_path / "nn.gguf").read_bytes() == (tmp_path / "mm.gguf").read_bytes()


def _without(checkpoint: Path, name: str) -> None:
    tensors = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    del tensors[f"model.{name}"]
    torch.save(tensors, checkpoint / "pytorch_model.bin")


def config(**changes: object) -> Callable[[Path, Path], None]:
    return lambda checkpoint, tower: edit_json(checkpoint / "config.json", **changes)


CASES = {
    "projector": (config(mm_projector_type="mlp3x_gelu"), "config.json: mm_projector_type 'mlp3x_gelu' isn't supported; supported: 'mlp2x_gelu'"),
    "projector-lacks": (lambda checkpoint, tower: _without(checkpoint, "mm_projector.2.bias"), "no tensor 'projector.linear_2.bias'"),
    "resampler": (config(mm_resampler_type="perceiver"), "mm_resampler_type 'perceiver' isn't supported"),
    "anyres": (config(image_aspect_ratio="anyres"), "image_aspect_ratio 'anyres' isn't supported; supported: 'pad', 'square'"),
    "start-end": (config(mm_use_im_start_end=True), "mm_use_im_start_end True isn't supported"),
    "select": (config(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature 'cls_patch' isn't supported"),
    "model-type": (config(model_type="llava_mpt"), "model_type 'llava_mpt' isn't supported; supported: 'llava', 'llava_llama'"),
    "architecture": (config(architectures=["LlavaMptForCausalLM"]), "architectures ['LlavaMptForCausalLM'] isn't supported"),
    "layer": (config(mm_vision_select_layer=-9), "-9 isn't one of the 4 hidden states"),
    "no-tower-config": (lambda checkpoint, tower: (tower / "config.json").unlink(), "clip/config.json: can't be read"),
    "other-tower": (
        lambda checkpoint, tower: edit_json(tower / "config.json", model_type="dinov2"),
        "vision_config.model_type 'dinov2' isn't supported; supported: clip_vision_model",
    ),
    "stray-tensor": (
        lambda checkpoint, tower: save_file({**load_file(tower / "model.safetensors"), "x": torch.ones(1)}, tower / "model.safetensors"),
        "clip/model.safetensors: tensor 'x' belongs to no CLIP vision tower",
    ),
    "no-processor": (lambda checkpoint, tower: (tower / "preprocessor_config.json").unlink(), "clip: has neither preprocessor_config.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_nothing_written(tmp_path: Path, model: tuple[Path, Any], case: str) -> None:
    damage, message = CASES[case]
    checkpoint, tower = split(*model, tmp_path / "in")
    damage(checkpoint, tower)
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(checkpoint, tmp_path / "m.gguf", tmp_path / "mm.gguf", vision_tower=tower)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_command(tmp_path: Path, model: tuple[Path, Any], expected: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, tower = split(*model, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["llava", "--vision-tower", "clip", "--outtype", "q8_0", "--quiet"]) == 0
    assert (Path("llava-q8_0.gguf").read_bytes(), Path("mmproj-llava-f16.gguf").read_bytes()) == expected
    for arguments, message in (
        (["llava"], "the vision tower 'openai/clip-vit-large-patch14-336' isn't in the checkpoint: name its directory"),
        ([str(model[0]), "--vision-tower", "clip"], "the checkpoint has its own vision tower, clip isn't needed"),
        (["llava-q8_0.gguf", "--vision-tower", "clip"], "--vision-tower goes with a checkpoint, not with a GGUF"),
        (["llava", "--vision-tower", "nowhere"], "nowhere/config.json: can't be read"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
