"""Writes GGUF files of real shapes with random weights: what a benchmark needs of a model, without the download.

Timing depends on shapes and types, not on values, as long as these stay finite and ordinary. So quantised matrices are not
quantised: their blocks are random bits with scales set to give the weights a sensible spread, which takes seconds where
quantising billions of weights in numpy would take hours. Each block's scales have a random sign, since a block's values are
not centred (four bits are -8 to 7) and the common offset would drown everything else after a few layers.

The keys, tensors and their order are the converter's own, so both llama.cpp and ggml-qcache load the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from tqdm import tqdm

from ggml_qcache_convert.hparams import TextParams
from ggml_qcache_convert.plan import OutputTensor, TensorPicker
from ggml_qcache_convert.outtypes import OutType
from ggml_qcache_convert.text_model import add_text_keys, text_tensors
from ggml_qcache_convert.vocab import Vocab, add_vocab_keys
from ggml_qcache_convert.writer import AtomicFiles, stored_layout

_CHUNK_BYTES = 1 << 24

_LLAMA = TextParams(
    arch="llama", n_vocab=32064, n_ctx=4096, n_embd=4096, n_ff=11008, n_layer=32, n_head=32, n_head_kv=32, head_dim=128,
    rms_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, o_bias=False, mlp_bias=False, tied=False,
)  # fmt: skip
_QWEN2 = dataclasses.replace(
    _LLAMA, arch="qwen2", n_vocab=152064, n_ctx=32768, n_embd=3584, n_ff=18944, n_layer=28, n_head=28, n_head_kv=4,
    rms_eps=1e-6, rope_theta=1e6, qkv_bias=True,
)  # fmt: skip
PRESETS: dict[str, TextParams] = {
    "llava-1.5-7b": _LLAMA,
    "llava-1.5-13b": dataclasses.replace(_LLAMA, n_embd=5120, n_ff=13824, n_layer=40, n_head=40, n_head_kv=40),
    "llava-next-mistral-7b": dataclasses.replace(_LLAMA, n_ctx=32768, n_ff=14336, n_head_kv=8, rope_theta=1e6),
    "llava-onevision-0.5b": dataclasses.replace(
        _QWEN2, n_vocab=151936, n_embd=896, n_ff=4864, n_layer=24, n_head=14, n_head_kv=2, head_dim=64, tied=True
    ),
    "llava-onevision-7b": _QWEN2,
}


@dataclasses.dataclass(frozen=True)
class WeightType:
    """How the weights of a type are made.

    Attributes:
        qtype: ggml's type.
        file_type: ``general.file_type``.
        scales: Offsets of the f16 scales in a block, and their ratio to the first; none for plain floats. Minima are set so
            that a block's values are centred.
    """

    qtype: GGMLQuantizationType
    file_type: LlamaFileType
    scales: tuple[tuple[int, float], ...] = ()


TYPES: dict[str, WeightType] = {
    "f32": WeightType(GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": WeightType(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": WeightType(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": WeightType(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, ((0, 1.0),)),
    "q5_0": WeightType(GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0, ((0, 1.0),)),
    "q5_1": WeightType(GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1, ((0, 1.0), (2, -15.5))),
    "q4_0": WeightType(GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0, ((0, 1.0),)),
    "q4_1": WeightType(GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1, ((0, 1.0), (2, -7.5))),
    "q4_k": WeightType(GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, ((0, 1.0), (2, 7.5))),
    "q5_k": WeightType(GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_S, ((0, 1.0), (2, 15.5))),
    "q6_k": WeightType(GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K, ((208, 1.0),)),
}
_SCALES = {kind.qtype: kind.scales for kind in TYPES.values()}


def make_model(
    preset: str,
    out: Path,
    *,
    n_layer: int | None = None,
    weight_type: str = "q4_0",
    seed: int = 1,
    shrink: int = 1,
    progress: bool = False,
) -> TextParams:
    """Writes a model. The file appears when it is complete.

    Args:
        preset: A key of ``PRESETS``.
        out: File to write.
        n_layer: Layers; None: as many as the preset has.
        weight_type: A key of ``TYPES``. Vectors are f32; rows that aren't whole blocks are of a type with smaller ones.
        seed: Seed of the weights.
        shrink: Divides KV heads, the MLP and the vocabulary, for tests: head size and GQA group stay.
        progress: Show a progress bar on stderr.

    Returns:
        The shapes written.

    Raises:
        ValueError: A preset, type or number that isn't one.
        OSError: The file can't be written.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    if weight_type not in TYPES:
        raise ValueError(f"type {weight_type!r} is not one of {', '.join(TYPES)}")
    params = shrunk(PRESETS[preset], shrink)
    params = dataclasses.replace(params, n_layer=params.n_layer if n_layer is None else n_layer)
    if params.n_layer < 1:
        raise ValueError(f"a model has at least one layer, got {params.n_layer}")
    kind = TYPES[weight_type]
    output = GGMLQuantizationType.Q8_0 if kind.qtype == GGMLQuantizationType.Q4_0 else None
    plan = text_tensors(params, _NamesOnly(params.tied), OutType(kind.qtype, kind.file_type, output), left_out={})
    rng = np.random.Generator(np.random.SFC64(seed))

    writer = GGUFWriter(None, params.arch)
    add_text_keys(writer, params, f"{preset} with {params.n_layer} layers of random weights", kind.file_type)
    add_vocab_keys(writer, dummy_vocab(params.n_vocab))
    sizes = {tensor.name: _nbytes(tensor) for tensor in plan}
    for tensor in plan:
        shape, dtype = stored_layout(tensor.shape, tensor.qtype)
        writer.add_tensor_info(tensor.name, shape, dtype, sizes[tensor.name], raw_dtype=tensor.qtype)
    total = sum(sizes.values())
    with (
        AtomicFiles([out]) as files,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=out.name, disable=not progress) as bar,
    ):
        try:
            writer.write_header_to_file(files.path(out))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in plan:
                writer.write_tensor_data(_values(tensor, rng, bar.update))
            writer.flush()
        finally:
            writer.close()
        files.commit()
    return params


def shrunk(params: TextParams, divisor: int) -> TextParams:
    """The same architecture with fewer heads, a smaller MLP and a smaller vocabulary.

    Raises:
        ValueError: A divisor below 1.
    """
    if divisor < 1:
        raise ValueError(f"a model shrinks by 1 or more, got {divisor}")
    if divisor == 1:
        return params
    n_head_kv = max(1, params.n_head_kv // divisor)
    n_head = n_head_kv * (params.n_head // params.n_head_kv)
    return dataclasses.replace(
        params,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd=n_head * params.head_dim,
        n_ff=math.ceil(params.n_ff / divisor / 256) * 256,
        n_vocab=max(512, params.n_vocab // divisor),
    )


def dummy_vocab(n_vocab: int) -> Vocab:
    """A sentencepiece vocabulary that llama.cpp loads: special tokens, bytes, and made-up words. It serves qwen2 as well."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    names += [f"\u2581w{index}" for index in range(len(names), n_vocab)]
    types += [TokenType.NORMAL] * (n_vocab - len(types))
    return Vocab(
        model="llama", pre="default", tokens=tuple(names), types=tuple(types), scores=tuple(-float(i) for i in range(n_vocab)),
        merges=(), special_ids={"bos": 1, "eos": 2, "unk": 0}, add_bos=True, add_eos=False, add_space_prefix=True,
        chat_template=None,
    )  # fmt: skip


class _NamesOnly(TensorPicker):
    """Has every tensor that is asked for: no checkpoint stands behind it."""

    def __init__(self, tied: bool) -> None:
        super().__init__({})
        self._tied = tied

    def has(self, name: str) -> bool:
        return not (self._tied and name == "lm_head.weight")

    def take(self, name: str, shape: tuple[int, ...]) -> Any:
        """The plan's source is its name here: values are drawn, not read."""
        return name


def _nbytes(tensor: OutputTensor) -> int:
    shape, dtype = stored_layout(tensor.shape, tensor.qtype)
    return math.prod(shape) * dtype.itemsize


def _values(tensor: OutputTensor, rng: np.random.Generator, advance: Callable[[int], object]) -> npt.NDArray[Any]:
    """Random content of one tensor: the largest piece of memory held."""
    shape, dtype = stored_layout(tensor.shape, tensor.qtype)
    if len(tensor.shape) == 1:
        # norms scale by about one, biases shift by little
        around = 0.0 if tensor.name.endswith(".bias") else 1.0
        values = rng.normal(around, 0.1, shape).astype(dtype)
        advance(values.nbytes)
        return values
    # activations of unit size stay so; the rows of the embedding are activations themselves
    spread = 1.0 if tensor.name == "token_embd.weight" else tensor.shape[-1] ** -0.5
    result = np.empty(_nbytes(tensor), np.uint8)
    draw = _block_drawer(tensor.qtype, spread)
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.qtype]
    step = _CHUNK_BYTES // block_bytes * block_bytes
    for start in range(0, result.size, step):
        piece = result[start : start + step]
        draw(rng, piece)
        advance(piece.size)
    return result.view(dtype).reshape(shape)


def _block_drawer(
    qtype: GGMLQuantizationType, spread: float
) -> Callable[[np.random.Generator, npt.NDArray[np.uint8]], None]:
    """A function that fills bytes with random blocks of a type.

    Args:
        qtype: Type of the blocks.
        spread: Standard deviation of the weights.
    """
    _, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    scales = _SCALES[qtype]
    if not scales:
        # a table of normal values picked at random: drawing each from the normal distribution is ten times slower
        normal = np.random.default_rng(0).normal(0.0, spread, 1 << 16).astype(np.float32)
        table = gguf.quantize(normal.reshape(1, -1), qtype).reshape(-1).view(np.uint8).reshape(1 << 16, block_bytes)

        def from_table(rng: np.random.Generator, piece: npt.NDArray[np.uint8]) -> None:
            piece.reshape(-1, block_bytes)[:] = table[rng.integers(0, 1 << 16, piece.size // block_bytes, dtype=np.uint16)]

        return from_table

    sample = np.random.default_rng(0).integers(0, 256, (512, block_bytes), dtype=np.uint8)
    _set_scales(sample, scales, np.ones(len(sample)))
    unit = float(np.std(gguf.dequantize(sample, qtype)))

    def random_bits(rng: np.random.Generator, piece: npt.NDArray[np.uint8]) -> None:
        piece.view(np.uint8)[:] = rng.integers(0, 256, piece.size, dtype=np.uint8)
        blocks = piece.reshape(-1, block_bytes)
        _set_scales(blocks, scales, rng.choice([-spread / unit, spread / unit], len(blocks)))

    return random_bits


def _set_scales(blocks: npt.NDArray[np.uint8], scales: Iterable[tuple[int, float]], values: npt.NDArray[np.float64]) -> None:
    for offset, ratio in scales:
        blocks[:, offset : offset + 2] = (ratio * values).astype(np.float16).view(np.uint8).reshape(-1, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 written, 1 failed.
    """
    parser = argparse.ArgumentParser(description="Write a GGUF of real shapes with random weights.")
    parser.add_argument("--preset", choices=list(PRESETS), default="llava-1.5-7b", help="shapes (default: llava-1.5-7b)")
    parser.add_argument("--layers", type=int, metavar="N", help="layers (default: all of the preset)")
    parser.add_argument("--type", choices=list(TYPES), default="q4_0", help="type of the matrices (default: q4_0)")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="GGUF to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights (default: 1)")
    args = parser.parse_args(argv)
    try:
        params = make_model(
            args.preset, args.out, n_layer=args.layers, weight_type=args.type, seed=args.seed, progress=sys.stderr.isatty()
        )
    except (ValueError, OSError) as error:
        print(f"make_model: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {params.arch}, {params.n_layer} layers, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
