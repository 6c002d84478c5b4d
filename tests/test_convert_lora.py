"""LoRA adapters merged while converting, against PEFT's own merge of the same adapter."""

import copy
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from ggml_qcache_convert import ConversionError, convert
from ggml_qcache_convert.cli import main

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "all-linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "fc1", "linear_1"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "linear_1": 7},
        "alpha_pattern": {r"language_model.*k_proj": 3},
    },
    "embeddings": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "o_proj"], "fan_in_fan_out": True},
    "modules-to-save": {"r": 4, "target_modules": ["gate_proj"], "modules_to_save": ["multi_modal_projector", "lm_head"]},
    "layers": {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "init_lora_weights": "gaussian"},
}


def add_adapter(model: LlavaForConditionalGeneration, path: Path, seed: int, safe: bool = True, **config: Any) -> LlavaForConditionalGeneration:
    """Saves an adapter with random weights; gives the model merged by PEFT."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(path)
    if not safe:  # as older PEFT saved it
        file = path / "adapter_model.safetensors"
        torch.save(load_file(file), path / "adapter_model.bin")
        file.unlink()
    return adapted.merge_and_unload()


def tensors(*files: Path) -> dict[str, np.ndarray]:
    return {one.name: np.array(one.data, np.float64) for file in files for one in GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaForConditionalGeneration]:
    path = tmp_path_factory.mktemp("base") / "hf"
    return path, build_llava(path, n_layer=2)


def same_as_merged(base: Path, merged: LlavaForConditionalGeneration, adapters: list[Path], folder: Path) -> None:
    """Converts the base with adapters and what PEFT merged, and compares every tensor; some must have changed."""
    shutil.copytree(base, folder / "merged", ignore=shutil.ignore_patterns("*.safetensors"))
    merged.save_pretrained(folder / "merged")
    for name, path, given in (("a", base, adapters), ("b", folder / "merged", []), ("c", base, [])):
        convert(path, folder / f"{name}.gguf", folder / f"{name}-mm.gguf", "f32", adapters=given)
    ours, theirs, before = (tensors(folder / f"{name}.gguf", folder / f"{name}-mm.gguf") for name in "abc")
    assert ours.keys() == theirs.keys() == before.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=0, atol=2e-6, err_msg=name)
    assert any(np.abs(ours[name] - before[name]).max() > 0.01 for name in ours)


@pytest.mark.parametrize("case", CONFIGS)
def test_equals_the_merge_of_peft(tmp_path: Path, base: tuple[Path, LlavaForConditionalGeneration], case: str) -> None:
    path, model = base
    merged = add_adapter(model, tmp_path / "adapter", seed=3, safe=case != "patterns", **CONFIGS[case])
    same_as_merged(path, merged, [tmp_path / "adapter"], tmp_path)


def test_several_are_merged_in_order(tmp_path: Path, base: tuple[Path, LlavaForConditionalGeneration]) -> None:
    path, model = base
    first = add_adapter(model, tmp_path / "one", seed=4, **CONFIGS["modules-to-save"])
    second = add_adapter(first, tmp_path / "two", seed=5, **CONFIGS["all-linear"])
    same_as_merged(path, second, [tmp_path / "one", tmp_path / "two"], tmp_path)
    with pytest.raises(ConversionError, match="takes the place of a tensor that .*two changes already"):
        convert(path, tmp_path / "x.gguf", None, adapters=[tmp_path / "two", tmp_path / "one"])


def test_names_of_older_transformers(tmp_path: Path, base: tuple[Path, LlavaForConditionalGeneration]) -> None:
    """Adapters trained with transformers 4 name modules as its checkpoints did; non-LoRA weights lie in a file of their own."""
    path, model = base
    merged = add_adapter(model, tmp_path / "adapter", seed=3, **CONFIGS["modules-to-save"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {
        name.replace("model.model.language_model.", "model.language_model.model.").replace("model.model.multi_modal", "model.multi_modal"): tensor
        for name, tensor in load_file(file).items()
    }
    others = {name: renamed.pop(name) for name in list(renamed) if "multi_modal" in name}
    save_file(renamed, file)
    torch.save(others, file.with_name("non_lora_trainables.bin"))
    same_as_merged(path, merged, [tmp_path / "adapter"], tmp_path)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "adapter_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = load_file(path / "adapter_model.safetensors")
        change(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path / "adapter_model.safetensors")

    return apply


PREFIX = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"
CASES = {
    "no-config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json: can't be read"),
    "no-weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "adapter: has none of adapter_model.safetensors, adapter_model.bin"),
    "kind": (config(peft_type="LOHA"), "peft_type 'LOHA' isn't supported; supported: LORA"),
    "dora": (config(use_dora=True), "DoRA isn't supported (use_dora is True)"),
    "dora-weights": (weights(lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(64)})), "DoRA isn't supported"),
    "bias": (config(bias="all"), "bias isn't supported (bias is 'all')"),
    "lora-bias": (config(lora_bias=True), "lora_bias isn't supported"),
    "tokens": (config(trainable_token_indices=[1, 2]), "trainable_token_indices isn't supported"),
    "unknown": (config(use_next_years_trick=True), "use_next_years_trick isn't supported (use_next_years_trick is True)"),
    "init": (config(init_lora_weights="pissa"), "init_lora_weights 'pissa' isn't supported: such adapters fit changed base weights"),
    "rank": (config(r=8), "; rank 8 and the checkpoint's [64, 160] need [8, 160] and [64, 8]"),
    "rank-zero": (config(r=0), "rank of 'model.language_model.layers.0.mlp.down_proj' must be a positive integer, got 0"),
    "alpha": (config(lora_alpha="16"), "must be a positive number, got '16'"),
    "pattern": (config(alpha_pattern={"(": 3}), "alpha_pattern '(' isn't a regular expression"),
    "patterns": (config(rank_pattern=[4]), "rank_pattern must be an object, got [4]"),
    "no-partner": (weights(lambda t: t.pop(B)), f"'{A}' has no partner"),
    "elsewhere": (
        weights(lambda t: t.update({key.replace("layers.1", "layers.7"): t.pop(key) for key in (A, B)})),
        "adapts 'model.language_model.layers.7.self_attn.q_proj', which the checkpoint doesn't have",
    ),
    "stray": (weights(lambda t: t.update({f"{PREFIX}.lora_C": torch.ones(3)})), f"'{PREFIX}.lora_C' is neither a LoRA matrix nor a tensor"),
    "dtype": (weights(lambda t: t.update({A: t[A].to(torch.int8)})), f"'{A}' is of type I8; supported: F32"),
    "nan": (weights(lambda t: t[A].fill_(float("nan"))), f"adapter_model.safetensors: tensor '{A}' has 256 NaN or infinite values"),
    "whole-shape": (
        weights(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 64)})),
        "'base_model.model.lm_head.weight' has shape [3, 64], the configuration needs",
    ),
    "truncated": (
        lambda path: (path / "adapter_model.safetensors").write_bytes((path / "adapter_model.safetensors").read_bytes()[:-10]),
        "adapter_model.safetensors: isn't a readable safetensors file",
    ),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: tuple[Path, LlavaForConditionalGeneration]) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    add_adapter(base[1], path, seed=6, **CONFIGS["plain"])
    return path


@pytest.mark.parametrize("case", CASES)
def test_refused_with_nothing_written(tmp_path: Path, base: tuple[Path, Any], adapter: Path, case: str) -> None:
    damage, message = CASES[case]
    shutil.copytree(adapter, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(base[0], tmp_path / "m.gguf", tmp_path / "mm.gguf", adapters=[tmp_path / "adapter"])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_command(tmp_path: Path, base: tuple[Path, Any], adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(base[0]), "--outfile", "m.gguf", "--mmproj", "mm.gguf", "--outtype", "q8_0", "--lora", str(adapter), "--quiet"]) == 0
    convert(base[0], Path("n.gguf"), None, "q8_0", adapters=[adapter])
    assert Path("m.gguf").read_bytes() == Path("n.gguf").read_bytes()
    assert main([str(base[0]), "--lora", str(adapter), "--lora", str(adapter), "--dry-run"]) == 0
    assert "layers.1.self_attn.q_proj.weight + LoRA + LoRA" in capsys.readouterr().out
    assert main(["m.gguf", "--lora", str(adapter)]) == 1
    assert "--lora goes with a checkpoint, not with a GGUF" in capsys.readouterr().err
    assert main([str(base[0]), "--lora", str(tmp_path / "none"), "--outfile", "x.gguf"]) == 1
    assert "none: isn't a directory of a LoRA adapter" in capsys.readouterr().err and not Path("x.gguf").exists()
