"""What the tests of the C++ core share: error bounds, prompts, models, and GGUF files changed in one place."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hf_models import build_llava, nmse
from ref_torch import TextModel
from transformers import LlavaForConditionalGeneration

from ggml_qcache.native import Context, Model
from ggml_qcache_convert import convert

# Largest NMSE of logits, one table for all tests of the core: of the worst row, or for libllama of all rows together.
BOUNDS = {
    # the same file in libllama, whose own attention rounds Q to f16. With quantised weights a rounding of an activation falls
    # the other way here and there: that the core is no further from the truth than libllama is a test of its own
    "libllama f32": 1e-5,
    "libllama f16": 1e-5,
    "libllama q8_0": 5e-3,
    "libllama q4_0": 5e-3,
    # PyTorch with K and V rounded as the cache rounds them
    "reference f16": 1e-6,
    "reference q8_0": 1e-4,
    "reference q4_0": 5e-3,
    # what quantised K and V cost against f16 ones
    "q8_0 KV": 1e-2,
    "q4_0 KV": 1.0,
    # the same rows computed in another order: chunks, steps, kernels
    "rounding": 1e-6,
}

N_LAYER = 8
SHAPES = {
    "llama-mha-64": {"n_head": 2, "n_head_kv": 2, "head_dim": 64},
    "llama-gqa-32": {"n_head": 4, "n_head_kv": 2, "head_dim": 32},
    "llama-gqa-80": {"n_head": 4, "n_head_kv": 1, "head_dim": 80},
    "qwen2-gqa-64": {"text": "qwen2", "tokenizer": "qwen2", "hidden": 256, "n_head": 4, "n_head_kv": 2},
}


@dataclass(frozen=True)
class Prompt:
    """Rows of one sequence.

    Attributes:
        tokens: ``[n]``, -1 where the row is an embedding.
        embeddings: ``[n, n_embd]`` f32, zero where the row is a token.
        visual: ``[n]`` bool.
    """

    tokens: np.ndarray
    embeddings: np.ndarray
    visual: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Prompt":
        return Prompt(self.tokens[rows], self.embeddings[rows], self.visual[rows])

    def __add__(self, other: "Prompt") -> "Prompt":
        return Prompt(*(np.concatenate(pair) for pair in zip(self.fields(), other.fields())))

    def fields(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three arrays, in order."""
        return self.tokens, self.embeddings, self.visual


def make_prompt(model: Model, pattern: str, seed: int = 11) -> Prompt:
    """A random prompt.

    Args:
        model: Gives vocabulary and width.
        pattern: Runs of rows such as ``t7 v20 t5``: text tokens and visual embeddings; ``e`` for text given as embeddings,
            ``w`` for visual rows given as tokens.
        seed: Seed of tokens and embeddings.
    """
    rng = np.random.default_rng(seed)
    runs = [(run[0], int(run[1:])) for run in pattern.split()]
    kinds = np.repeat([kind for kind, _ in runs], [n for _, n in runs])
    n, is_token = len(kinds), np.isin(kinds, ["t", "w"])
    tokens = np.where(is_token, rng.integers(3, model.info.n_vocab - 10, n), -1).astype(np.int32)
    embeddings = np.where(is_token[:, None], 0, rng.normal(0, 0.3, (n, model.info.n_embd))).astype(np.float32)
    return Prompt(tokens, embeddings, np.isin(kinds, ["v", "w"]))


def quantised(model: LlavaForConditionalGeneration, outtype: str) -> LlavaForConditionalGeneration:
    """A copy of a model whose text matrices went through a GGUF type, as the converter's do."""
    kind = GGMLQuantizationType[outtype.upper()]

    def rounded(weight: torch.Tensor, to: GGMLQuantizationType) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.float().numpy(), to), to)).to(weight.dtype)

    copied = copy.deepcopy(model)
    text = TextModel.of(copied)
    with torch.no_grad():
        for module in text.decoder.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                module.weight.copy_(rounded(module.weight, kind))
        output_kind = GGMLQuantizationType.Q8_0 if kind == GGMLQuantizationType.Q4_0 else kind
        text.lm_head.weight.copy_(rounded(text.lm_head.weight, output_kind))
    return copied


def decode(context: Context, prompt: Prompt, seq_id: int = 0) -> np.ndarray:
    """Appends a prompt in one batch; returns the logits of its rows, ``[n, n_vocab]``."""
    context.decode(prompt.tokens, prompt.embeddings, seq_id=seq_id, modality=prompt.visual, logits=True)
    return rows_of_logits(context, len(prompt))


def decode_in_parts(context: Context, prompt: Prompt, sizes: Sequence[int], seq_id: int = 0) -> np.ndarray:
    """Appends a prompt in batches of the given sizes, repeated as need be; returns the logits of all rows."""
    logits, done = [], 0
    for size in itertools.cycle(sizes):
        logits.append(decode(context, prompt[done : done + size], seq_id))
        done += size
        if done >= len(prompt):
            return np.concatenate(logits)


def rows_of_logits(context: Context, n_rows: int) -> np.ndarray:
    """Logits of the rows of the last batch, which all have them, ``[n_rows, n_vocab]``."""
    return np.stack([context.logits(row) for row in range(n_rows)])


def make_context(model: Model, **params: object) -> Context:
    """A context on one thread; parameters as ``Context``."""
    return Context(model, **{"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, **params})


def worst_nmse(got: np.ndarray, expected: np.ndarray) -> float:
    """NMSE of the row that is furthest off, NaN when any value is."""
    assert got.shape == expected.shape
    return float(np.max([nmse(a, b) for a, b in zip(got, expected)]))


def assert_close(got: np.ndarray, expected: np.ndarray, bound: str) -> None:
    """Every row within a bound of ``BOUNDS``; the measured value is printed."""
    error = worst_nmse(got, expected)
    print(f"NMSE {error:.2e}, bound {BOUNDS[bound]:.0e} ({bound})")
    assert error <= BOUNDS[bound]


@dataclass(frozen=True)
class CoreModel:
    """A random model three times: in PyTorch (float64), as a GGUF file, and loaded.

    Attributes:
        hf: The LLaVA whose text model it is.
        checkpoint: Its directory.
        path: f32 GGUF without lazy keys.
        native: The loaded file.
    """

    hf: LlavaForConditionalGeneration
    checkpoint: Path
    path: Path
    native: Model

    def embeddings(self, prompt: Prompt) -> torch.Tensor:
        """Input rows of the decoder, ``[n, n_embd]``."""
        tokens = torch.from_numpy(prompt.tokens).long()
        with torch.no_grad():
            looked_up = TextModel.of(self.hf).decoder.embed_tokens(tokens.clamp(min=0))
        return torch.where(tokens[:, None] >= 0, looked_up, torch.from_numpy(prompt.embeddings).to(looked_up.dtype))


class CoreModels:
    """The models of ``SHAPES``, each built when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, CoreModel] = {}

    def __getitem__(self, shape: str) -> CoreModel:
        if shape not in self._models:
            checkpoint, path = self._folder / shape, self._folder / f"{shape}.gguf"
            hf = build_llava(checkpoint, n_layer=N_LAYER, seed=20 + len(self._models), **SHAPES[shape]).double()
            convert(checkpoint, path, None, "f32")
            self._models[shape] = CoreModel(hf, checkpoint, path, Model(path))
        return self._models[shape]


def rewrite_gguf(
    source: Path,
    target: Path,
    keys: Mapping[str, tuple[GGUFValueType, object] | None] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Copies a GGUF with keys and tensors added, replaced or left out.

    Args:
        source: File to read.
        target: File to write.
        keys: New values by name, an array's type being that of its values' numpy dtype; None leaves a key out.
        tensors: New tensors by name, as numpy has them (ggml's dimensions reversed); None leaves a tensor out.

    Returns:
        The target.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch="")
    writer.kv_data[0].clear()
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, value in (keys or {}).items():
        writer.kv_data[0].pop(name, None)
        if value is not None:
            sub_type = getattr(GGUFValueType, np.asarray(value[1]).dtype.name.upper()) if value[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, list(value[1]) if sub_type else value[1], value[0], sub_type)
    changed = dict(tensors or {})
    for tensor in reader.tensors:
        if tensor.name not in changed:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        elif (array := changed.pop(tensor.name)) is not None:
            writer.add_tensor(tensor.name, array)
    for name, array in changed.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
