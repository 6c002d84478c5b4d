"""Everything the converter refuses: one error with the file, the tensor or key and the values, nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hf_models import PATTERNS, build_llava, edit_json
from safetensors.torch import load_file, save_file

from ggml_qcache_convert import ConversionError, convert
from ggml_qcache_convert.cli import main
from ggml_qcache_convert.make_lazy import make_lazy


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    build_llava(folder / "spm", n_layer=2)
    build_llava(folder / "json", n_layer=2, tokenizer="spm-json")
    build_llava(folder / "bpe", n_layer=2, tokenizer="llama-bpe")
    build_llava(folder / "qwen2", n_layer=2, text="qwen2", tokenizer="qwen2")
    build_llava(folder / "sharded", n_layer=2, sharded=True)
    build_llava(folder / "next", "llava_next", n_layer=2)
    build_llava(folder / "onevision", "llava_onevision", n_layer=2, text="qwen2", tokenizer="qwen2")
    return {path.name: path for path in folder.iterdir()}


def config(**changes: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", **changes)


def file_json(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / name, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "model.safetensors"
        content = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(content)
        save_file(content, file)

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def remove_a_shard(path: Path) -> None:
    sorted(path.glob("model-*.safetensors"))[2].unlink()


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def huge_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


def fill(name: str, index: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def change(content: dict[str, torch.Tensor]) -> None:
        content[name][index] = value

    return tensors(change)


def shard_map(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(content["weight_map"])
        file.write_text(json.dumps(content))

    return apply


def second_token_twice(path: Path) -> None:
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["again"] = 1
    file.write_text(json.dumps(content))


def drop_a_merge(path: Path) -> None:
    """A piece of several letters keeps all its merges but one, as after training with the BPE trainer."""
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    joined = ["".join(merge) for merge in merges]
    del merges[next(i for i, piece in enumerate(joined) if joined.count(piece) > 1)]
    file.write_text(json.dumps(content))


def swap_merges(path: Path) -> None:
    """The merges of one piece no longer stand together."""
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    joined = ["".join(merge) for merge in merges]
    merges.append(merges.pop(next(i for i, piece in enumerate(joined) if joined.count(piece) > 1)))
    file.write_text(json.dumps(content))


def set_pattern(pattern: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "tokenizer.json"
        content = json.loads(file.read_text())
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        file.write_text(json.dumps(content))

    return apply


def smaller_vocabulary(path: Path) -> None:
    tensors(lambda t: t.update({n: t[n][:100].clone() for n in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")}))(path)
    config(text_config__vocab_size=100)(path)


Q = "language_model.model.layers.1.self_attn.q_proj.weight"
CASES = {
    # configuration
    "no-config": ("spm", remove("config.json"), "config.json: can't be read: No such file"),
    "config-not-json": ("spm", write("config.json", b"{"), "config.json: isn't valid JSON"),
    "config-not-object": ("spm", write("config.json", b"[]"), "config.json: holds a list, expected an object"),
    "config-not-utf8": ("spm", write("config.json", b"\xff\xfe"), "config.json: isn't valid JSON"),
    "architecture": (
        "spm",
        config(architectures=["LlavaNextVideoForConditionalGeneration"]),
        "'LlavaNextVideoForConditionalGeneration' isn't",
    ),
    "architecture-mrope": (
        "spm",
        config(architectures=["Qwen2VLForConditionalGeneration"], model_type="qwen2_vl"),
        "'Qwen2VLForConditionalGeneration' isn't supported; supported: LlavaForConditionalGeneration, LlavaNext",
    ),
    "text-model": (
        "spm",
        config(text_config__model_type="gemma"),
        "text_config.model_type 'gemma' isn't supported; supported: llama",
    ),
    "vision-model": (
        "spm",
        config(vision_config__model_type="pixtral"),
        "'pixtral' isn't supported; supported: clip_vision_model, siglip_vision_model",
    ),
    "pinpoints-tiles": ("next", config(image_grid_pinpoints=[[56, 100]]), "[56, 100] isn't made of 1 to 256 of the tower's images of 56"),
    "pinpoints-huge": ("next", config(image_grid_pinpoints=[[56, 56 * 257]]), "isn't made of 1 to 256"),
    "pinpoints-pair": ("next", config(image_grid_pinpoints=[[56, 56, 56]]), "[56, 56, 56] isn't a height and a width"),
    "pinpoints-text": ("next", config(image_grid_pinpoints="(1x1),...,(6x6)"), "must be a list of sizes, got '(1x1),...,(6x6)'"),
    "pinpoints-processor": (
        "next",
        file_json("preprocessor_config.json", image_grid_pinpoints=[[56, 112]]),
        "image_grid_pinpoints [[56, 112]] differ from those of config.json",
    ),
    "no-newline": ("next", tensors(lambda t: t.pop("image_newline")), "no tensor 'image_newline' of shape [64]"),
    "newline-in-llava": (
        "spm",
        tensors(lambda t: t.update(image_newline=torch.zeros(64))),
        "1 tensors that this kind of model doesn't have: 'image_newline'",
    ),
    "aspect-ratio": ("onevision", config(vision_aspect_ratio="pad"), "vision_aspect_ratio 'pad' isn't supported; supported: anyres_max_N"),
    "siglip-class-token": (
        "onevision",
        config(vision_feature_select_strategy="default"),
        "'default' isn't supported; supported: full (SigLIP has no class token",
    ),
    "projector-act": ("spm", config(projector_hidden_act="relu"), "projector_hidden_act 'relu' isn't supported"),
    "vision-act": ("spm", config(vision_config__hidden_act="relu"), "vision_config.hidden_act 'relu' isn't supported"),
    "text-act": ("spm", config(text_config__hidden_act="gelu"), "text_config.hidden_act 'gelu' isn't supported"),
    "select-strategy": (
        "spm",
        config(vision_feature_select_strategy="full"),
        "vision_feature_select_strategy 'full' isn't supported",
    ),
    "feature-layer": (
        "spm",
        config(vision_feature_layer=-9),
        "vision_feature_layer -9: -9 isn't one of the 4 hidden states",
    ),
    "feature-layers": ("spm", config(vision_feature_layer=[-1, -2]), "vision_feature_layer [-1, -2] isn't supported"),
    "rope-longrope": (
        "spm",
        config(text_config__rope_parameters=None, text_config__rope_scaling={"type": "longrope", "factor": 2.0}),
        "rope_type 'longrope' isn't supported; supported: default, linear, dynamic, yarn, llama3",
    ),
    "rope-yarn-beta": (
        "spm",
        config(text_config__rope_parameters={"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}),
        "beta_fast 16 isn't supported; supported: 32",
    ),
    "rope-yarn-truncate": (
        "spm",
        config(text_config__rope_parameters={"rope_type": "yarn", "factor": 2.0, "truncate": False}),
        "truncate False isn't supported",
    ),
    "rope-mrope": (
        "qwen2",
        config(text_config__rope_parameters=None, text_config__rope_scaling={"type": "default", "mrope_section": [2, 3, 3]}),
        "mrope_section [2, 3, 3] isn't supported; supported: positions with one axis (this is M-RoPE)",
    ),
    "rope-llama3-qwen2": (
        "qwen2",
        config(text_config__rope_parameters={"rope_type": "llama3", "factor": 2.0}),
        "'llama3' isn't supported",
    ),
    "rope-factor": (
        "spm",
        config(text_config__rope_parameters={"rope_type": "linear", "factor": 0}),
        "factor must be a positive number",
    ),
    "partial-rotary": (
        "spm",
        config(text_config__partial_rotary_factor=0.5),
        "partial_rotary_factor 0.5 isn't supported",
    ),
    "quantised": (
        "spm",
        config(quantization_config={"quant_method": "awq"}),
        "weights quantised by 'awq' aren't supported",
    ),
    "hidden-size": (
        "spm",
        config(text_config__hidden_size="64"),
        "text_config.hidden_size must be a positive integer, got '64'",
    ),
    "layers-negative": (
        "spm",
        config(text_config__num_hidden_layers=-2),
        "num_hidden_layers must be a positive integer, got -2",
    ),
    "eps": ("spm", config(text_config__rms_norm_eps=0), "rms_norm_eps must be a positive number, got 0"),
    "heads": (
        "spm",
        config(text_config__num_key_value_heads=3),
        "num_attention_heads 4 isn't a multiple of num_key_value_heads 3",
    ),
    "flag": ("spm", config(text_config__attention_bias="yes"), "attention_bias must be true or false, got 'yes'"),
    "section": ("spm", config(text_config=[1]), "text_config must be an object, got [1]"),
    # weights
    "no-weights": (
        "spm",
        remove("model.safetensors"),
        "has no weights: neither model.safetensors nor model.safetensors.index.json, pytorch_model.bin nor",
    ),
    "not-a-pickle": (
        "spm",
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "pytorch_model.bin: isn't a readable PyTorch file",
    ),
    "truncated": ("spm", truncate, "model.safetensors: isn't a readable safetensors file"),
    "huge-header": ("spm", huge_header, "model.safetensors: isn't a readable safetensors file"),
    "not-safetensors": (
        "spm",
        write("model.safetensors", b"no"),
        "model.safetensors: isn't a readable safetensors file",
    ),
    "missing-tensor": (
        "spm",
        tensors(lambda t: t.pop(Q)),
        "no tensor 'text.layers.1.self_attn.q_proj.weight' of shape [64, 64]",
    ),
    "missing-output": ("spm", tensors(lambda t: t.pop("language_model.lm_head.weight")), "no tensor 'lm_head.weight'"),
    "extra-tensor": (
        "spm",
        tensors(lambda t: t.update(image_newline=torch.zeros(64))),
        "1 tensors that this kind of model doesn't have: 'image_newline'",
    ),
    "two-names": (
        "spm",
        tensors(lambda t: t.update({"model." + Q.replace(".model", "", 1): t[Q].clone()})),
        "the same tensor under two",
    ),
    "shape": (
        "spm",
        tensors(lambda t: t.update({Q: torch.zeros(64, 32)})),
        f"'{Q}' has shape [64, 32], the configuration needs [64, 64]",
    ),
    "dtype": (
        "spm",
        tensors(lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int8)})),
        f"'{Q}' is of type I8; supported: F32",
    ),
    "nan": ("spm", fill(Q, (3, 7), float("nan")), f"'{Q}' has 1 NaN or infinite values, the first at [3, 7]"),
    "inf": (
        "spm",
        fill("vision_tower.pre_layrnorm.bias", (5,), float("inf")),
        "pre_layrnorm.bias' has 1 NaN or infinite values, the first",
    ),
    "f16-range": ("spm", fill(Q, (0, 0), 1e6), f"'{Q}' has values up to 1e+06, over f16's range; use --outtype bf16"),
    "missing-shard": ("sharded", remove_a_shard, "shards are missing: model-00003-of-"),
    "shard-path": (
        "sharded",
        shard_map(lambda m: m.update({Q: "../other/model.safetensors"})),
        f"'{Q}' points to '../other/model.safetens",
    ),
    "shard-absolute": (
        "sharded",
        shard_map(lambda m: m.update({Q: "/etc/passwd"})),
        f"'{Q}' points to '/etc/passwd', which isn't",
    ),
    "shard-lacks": ("sharded", shard_map(lambda m: m.update(extra=m[Q])), "'extra' isn't in model-"),
    "index-empty": (
        "sharded",
        write("model.safetensors.index.json", b"{}"),
        "model.safetensors.index.json: has no weight_map",
    ),
    # tokenizer
    "no-tokenizer": ("json", remove("tokenizer.json"), "has neither tokenizer.json nor tokenizer.model"),
    "tokenizer-model-broken": (
        "spm",
        write("tokenizer.model", b"\x0a\xff\xff"),
        "tokenizer.model: isn't a sentencepiece model",
    ),
    "tokenizer-model-empty": (
        "spm",
        write("tokenizer.model", b""),
        "tokenizer.model: isn't a sentencepiece model: it has no pieces",
    ),
    "unigram": (
        "json",
        file_json("tokenizer.json", model__type="Unigram"),
        "model Unigram isn't supported; supported: BPE",
    ),
    "no-fallback": (
        "json",
        file_json("tokenizer.json", model__byte_fallback=False),
        "neither a byte-level pre-tokenizer nor byte_fallback",
    ),
    "normalizer": (
        "json",
        file_json("tokenizer.json", normalizer={"type": "Lowercase"}),
        "normalizer {'type': 'Lowercase'} with pre-token",
    ),
    "merge-missing": ("json", drop_a_merge, "which isn't a merge; llama.cpp's sentencepiece tokenizer would"),
    "merges-apart": ("json", swap_merges, "lie apart, so no score for it exists"),
    "id-twice": ("json", second_token_twice, "both have id 1"),
    "pre-tokenizer": (
        "bpe",
        set_pattern(r"\w+|\s+"),
        r"pre-tokenizer with the pattern '\\w+|\\s+' and ignore_merges True is unknown",
    ),
    "ignore-merges": (
        "bpe",
        set_pattern(PATTERNS["qwen2"]),
        "ignore_merges True is unknown; known: those of llama-bpe",
    ),
    "bpe-normalizer": (
        "bpe",
        file_json("tokenizer.json", normalizer={"type": "NFKC"}),
        "normalizer NFKC isn't supported",
    ),
    "merge-malformed": (
        "bpe",
        file_json("tokenizer.json", model__merges=[["a"]]),
        "merge ['a'] isn't a pair of tokens",
    ),
    "too-many-tokens": ("spm", smaller_vocabulary, "tokens, the model only 100 embeddings"),
    "huge-vocabulary": (
        "spm",
        config(text_config__vocab_size=2**31 - 1),
        "embed_tokens.weight' has shape [566, 64], the configuration needs [2147483647, 64]",
    ),
    "huge-depth": (
        "spm",
        config(text_config__num_hidden_layers=2**31 - 1),
        "no tensor 'text.layers.2.input_layernorm.weight' of shape [64]",
    ),
    "bos-unknown": (
        "spm",
        file_json("tokenizer_config.json", bos_token="<start>"),
        "bos_token '<start>' isn't in the vocabulary",
    ),
    "chat-template": (
        "spm",
        lambda path: (
            (path / "chat_template.jinja").unlink(),
            (path / "chat_template.json").write_text('{"chat_template": 7}'),
        ),
        "chat_template must be",
    ),
    # image processor
    "no-processor": (
        "spm",
        remove("preprocessor_config.json"),
        "neither preprocessor_config.json nor processor_config.json",
    ),
    "image-mean": (
        "spm",
        file_json("preprocessor_config.json", image_mean=[0.5]),
        "image_mean must be three numbers, got [0.5]",
    ),
    "image-std": (
        "spm",
        file_json("preprocessor_config.json", image_std=[0.5, 0, 1]),
        "image_std must be three positive numbers",
    ),
    "crop-size": (
        "spm",
        file_json("preprocessor_config.json", crop_size={"height": 28, "width": 28}),
        "differs from the tower's image_size",
    ),
    "rescale": ("spm", file_json("preprocessor_config.json", do_rescale=False), "do_rescale False"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_nothing_written(tmp_path: Path, checkpoints: dict[str, Path], case: str) -> None:
    base, damage, message = CASES[case]
    shutil.copytree(checkpoints[base], tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(tmp_path / "hf", tmp_path / "m.gguf", tmp_path / "mm.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outtype": "q4_k"}, "outtype 'q4_k' isn't one of f32, f16, bf16, q8_0, q6_k, q5_k_m"),
        ({"lazy_mode": "text"}, "lazy_mode 'text' isn't one of visual, global"),
        ({"lazy_layers": "0-1"}, "layer 0 can't be lazy"),
        ({"lazy_layers": [2]}, "lazy layer 2 is out of range"),
        ({"outfile": "missing/m.gguf"}, "its directory"),
        ({"outfile": "hf"}, "is a directory"),
        ({"outfile": "mm.gguf"}, "can't be both the text model and the mmproj"),
        ({"outfile": "hf/model.safetensors"}, "is part of the checkpoint itself"),
        ({"directory": "nowhere"}, "nowhere: no such file or directory"),
        ({"directory": "hf/config.json"}, "config.json: isn't a directory"),
    ],
)
def test_arguments(tmp_path: Path, checkpoints: dict[str, Path], arguments: dict[str, object], message: str) -> None:
    shutil.copytree(checkpoints["spm"], tmp_path / "hf")
    paths = {"directory": "hf", "outfile": "m.gguf", "mmproj": "mm.gguf"}
    given = {key: tmp_path / str(arguments.get(key, name)) for key, name in paths.items()}
    rest = {key: value for key, value in arguments.items() if key not in paths}
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(**given, **rest)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_command_says_what_it_refuses(
    tmp_path: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoints["spm"], tmp_path / "hf")
    fill(Q, (3, 7), np.nan)(tmp_path / "hf")
    status = main(
        [str(tmp_path / "hf"), "--outfile", str(tmp_path / "m.gguf"), "--mmproj", str(tmp_path / "mm.gguf"), "--quiet"]
    )
    output = capsys.readouterr()
    assert status == 1 and output.out == ""
    assert output.err.startswith("convert_to_gguf: error: ") and output.err.count("\n") == 1 and Q in output.err


def test_a_gguf_with_nan_is_not_quantised(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    convert(checkpoints["spm"], tmp_path / "m.gguf", None, "f32")
    file = GGUFReader(tmp_path / "m.gguf", "r+")
    next(tensor for tensor in file.tensors if tensor.name == "blk.1.attn_q.weight").data[3, 7] = np.nan
    del file
    with pytest.raises(ConversionError, match="'blk.1.attn_q.weight' of the GGUF has 1 NaN or infinite values"):
        make_lazy(tmp_path / "m.gguf", tmp_path / "n.gguf", outtype="q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
