"""Writes Hugging Face LLaVA-1.5 checkpoints of real shapes with random weights: what measuring the converter needs, without the download.

Names and shapes are those of llava-hf/llava-1.5-7b-hf: float16 safetensors in shards with an index, CLIP ViT-L/14 at 336 pixels,
two-layer projector. They are taken from the converter's own plan for the config.json written here; a test loads such a checkpoint
into transformers. The tokenizer is a small one of Llama's kind. A shard is written tensor by tensor: memory stays near one chunk.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from ggml_qcache_convert.hparams import LlavaParams, read_hparams
from ggml_qcache_convert.mmproj import vision_tensors
from ggml_qcache_convert.outtypes import OUTTYPES
from ggml_qcache_convert.plan import TensorPicker
from ggml_qcache_convert.text_model import text_tensors
from ggml_qcache_convert.writer import AtomicFiles
from make_model import PRESETS, shrunk
from tqdm import tqdm

LLAVA_1_5 = ("llava-1.5-7b", "llava-1.5-13b")
_STORED = {
    "text.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision.": "vision_tower.vision_model.",
    "projector.": "multi_modal_projector.",
}
_CHUNK = 1 << 22  # values drawn at a time


@dataclass(frozen=True)
class Stored:
    """A float16 tensor to write."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return 2 * math.prod(self.shape)


class _Recorder(TensorPicker):
    """Has every tensor that is asked for, and remembers it."""

    def __init__(self) -> None:
        super().__init__({})
        self.tensors: list[Stored] = []

    def has(self, name: str) -> bool:
        return name == "lm_head.weight"

    def take(self, name: str, shape: tuple[int, ...]) -> Any:
        """Remembers the tensor under its stored name."""
        prefix = next(prefix for prefix in _STORED if name.startswith(prefix))
        self.tensors.append(Stored(_STORED[prefix] + name.removeprefix(prefix), shape))
        return self.tensors[-1]


def make_checkpoint(
    out: Path,
    preset: str = LLAVA_1_5[0],
    *,
    n_layer: int | None = None,
    shard_bytes: int = 5 * 10**9,
    seed: int = 1,
    shrink: int = 1,
    progress: bool = False,
) -> int:
    """Writes a checkpoint. Its files appear together when all are complete.

    Args:
        out: Directory, created if need be.
        preset: One of ``LLAVA_1_5``.
        n_layer: Decoder layers; None: as many as the preset has.
        shard_bytes: Largest size of a shard, unless one tensor alone is larger.
        seed: Seed of the weights.
        shrink: Divides the shapes of both models, for tests.
        progress: Show a progress bar on stderr.

    Returns:
        Bytes of weights.

    Raises:
        ValueError: A preset or number that isn't one.
        OSError: A file can't be written.
    """
    if preset not in LLAVA_1_5:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(LLAVA_1_5)}")
    if n_layer is not None and n_layer < 1:
        raise ValueError(f"a model has at least one layer, got {n_layer}")
    if shard_bytes < 1:
        raise ValueError(f"a shard has at least one byte, got {shard_bytes}")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", _config(preset, n_layer, shrink))
    _write_json(out / "preprocessor_config.json", _processor(336 if shrink == 1 else 56))
    _write_json(out / "tokenizer.json", _tokenizer())
    _write_json(out / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True})
    tensors = _tensors(read_hparams(out))
    shards = _sharded(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    targets = [out / f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    index = out / "model.safetensors.index.json"
    rng = np.random.Generator(np.random.SFC64(seed))
    with (
        AtomicFiles([*targets, index]) as files,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=out.name, disable=not progress) as bar,
    ):
        for target, shard in zip(targets, shards):
            with files.path(target).open("wb") as file:
                _write_shard(file, shard, rng, bar.update)
        weight_map = {tensor.name: target.name for target, shard in zip(targets, shards) for tensor in shard}
        files.path(index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
        files.commit()
    return total


def _config(preset: str, n_layer: int | None, shrink: int) -> dict[str, Any]:
    """As of llava-1.5-7b-hf, with the language model's shapes spelled out."""
    text = shrunk(PRESETS[preset], shrink)
    side = 336 if shrink == 1 else 56
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 3,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "hidden_size": text.n_embd,
            "intermediate_size": text.n_ff,
            "max_position_embeddings": text.n_ctx,
            "num_attention_heads": text.n_head,
            "num_hidden_layers": text.n_layer if n_layer is None else n_layer,
            "num_key_value_heads": text.n_head_kv,
            "rms_norm_eps": text.rms_eps,
            "vocab_size": text.n_vocab,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024 // shrink,
            "image_size": side,
            "intermediate_size": 4096 // shrink,
            "num_attention_heads": max(1, 16 // shrink),
            "num_hidden_layers": 24 if shrink == 1 else 2,
            "patch_size": 14,
        },
    }


def _processor(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _tokenizer() -> dict[str, Any]:
    """Special tokens, bytes and ASCII characters, no merges; the ids from there to the end of the vocabulary are unused."""
    pieces = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": pieces[index], "special": True} for index in range(4)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": []},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(params: LlavaParams) -> list[Stored]:
    """Everything the converter asks a checkpoint of this configuration for."""
    recorder = _Recorder()
    text_tensors(params.text, recorder, OUTTYPES["f16"], {})
    vision_tensors(params.vision, params.text.n_embd, recorder, OUTTYPES["f16"].matrix)
    recorder.take("vision.post_layernorm.weight", (params.vision.n_embd,))
    recorder.take("vision.post_layernorm.bias", (params.vision.n_embd,))
    return recorder.tensors


def _sharded(tensors: Sequence[Stored], shard_bytes: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _write_shard(file: BinaryIO, tensors: Sequence[Stored], rng: np.random.Generator, advance: Callable[[int], object]) -> None:
    """Writes the header and then each tensor's values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors:
        n_values = tensor.nbytes // 2
        for start in range(0, n_values, _CHUNK):
            values = _values(tensor, rng, min(_CHUNK, n_values - start))
            values.tofile(file)
            advance(values.nbytes)


def _values(tensor: Stored, rng: np.random.Generator, n: int) -> npt.NDArray[np.float16]:
    """Random weights: matrices that keep activations of unit size so, norms of about one, biases of little."""
    if len(tensor.shape) == 1:
        return rng.normal(0.0 if tensor.name.endswith(("bias", "embedding")) else 1.0, 0.1, n).astype(np.float16)
    # a table of normal values picked at random: drawing each from the normal distribution is ten times slower
    table = (np.random.default_rng(0).normal(0.0, 1.0, 1 << 16) * math.prod(tensor.shape[1:]) ** -0.5).astype(np.float16)
    return table[rng.integers(0, 1 << 16, n, dtype=np.uint16)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 written, 1 failed.
    """
    parser = argparse.ArgumentParser(description="Write a Hugging Face LLaVA-1.5 checkpoint of real shapes with random weights.")
    parser.add_argument("out", type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--preset", choices=LLAVA_1_5, default=LLAVA_1_5[0], help=f"shapes (default: {LLAVA_1_5[0]})")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers (default: all of the preset)")
    parser.add_argument("--shard-bytes", type=int, metavar="N", default=5 * 10**9, help="largest shard (default: 5 GB)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights (default: 1)")
    args = parser.parse_args(argv)
    try:
        total = make_checkpoint(
            args.out, args.preset, n_layer=args.layers, shard_bytes=args.shard_bytes, seed=args.seed, progress=sys.stderr.isatty()
        )
    except (ValueError, OSError) as error:
        print(f"make_checkpoint: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {total / 2**30:.2f} GiB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
