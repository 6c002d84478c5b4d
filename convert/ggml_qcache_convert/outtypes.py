"""What ``--outtype`` means: which type each tensor of a text model is stored in, and how values get into it."""

import ctypes
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from .halves import from_float32, to_float32

FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# where rows aren't whole blocks of 256
_SMALLER_BLOCKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
_BLK = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")


@dataclass(frozen=True)
class OutType:
    """Types of the weight matrices.

    Attributes:
        matrix: Of most of them.
        file_type: ``general.file_type``.
        output: Of the output matrix, whose errors the logits feel at once.
        more_bits: Of V and of the MLP's second matrix in half of the layers, as llama.cpp's mixes have them.
    """

    matrix: GGMLQuantizationType
    file_type: LlamaFileType
    output: GGMLQuantizationType | None = None
    more_bits: GGMLQuantizationType | None = None

    def of(self, name: str, shape: tuple[int, ...], n_layer: int, tied: bool) -> GGMLQuantizationType:
        """The type a tensor is stored in.

        Args:
            name: Its GGUF name.
            shape: Its shape, outermost dimension first.
            n_layer: Layers of the model.
            tied: The token embeddings are the output matrix too.
        """
        match = _BLK.fullmatch(name)
        wanted = self.matrix
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            wanted = self.output or self.matrix
        elif match is not None and self.more_bits is not None and _has_more_bits(int(match[1]), n_layer):
            wanted = self.more_bits
        return fitting_type(shape, wanted)


OUTTYPES: dict[str, OutType] = {
    "f32": OutType(GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": OutType(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": OutType(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": OutType(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": OutType(GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": OutType(
        GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q6_K
    ),
    "q5_1": OutType(GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1, GGMLQuantizationType.Q8_0),
    "q5_0": OutType(GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0, GGMLQuantizationType.Q8_0),
    "q4_k_m": OutType(
        GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q6_K
    ),
    "q4_1": OutType(GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1, GGMLQuantizationType.Q8_0),
    "q4_0": OutType(GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0, GGMLQuantizationType.Q8_0),
}


def _has_more_bits(layer: int, n_layer: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def fitting_type(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The wanted type for a matrix, one of smaller blocks where its rows aren't whole blocks, f32 for vectors (ggml expects that)."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    for kind in (wanted, _SMALLER_BLOCKS.get(wanted, wanted)):
        if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return GGMLQuantizationType.F16


def quantised(
    values: npt.NDArray[np.float32], qtype: GGMLQuantizationType, importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[Any]:
    """Values in their stored form, as ggml's own quantiser gives it; by ours where that gives the same bits, which is several times as fast.

    Args:
        values: f32, rows of whole blocks.
        qtype: Any type but those that need an importance matrix, unless there is one.
        importance: Of each input, f32 ``[values.shape[-1]]``; None: all the same.

    Returns:
        Bytes in the last dimension, or f32 and f16 values.

    Raises:
        NotImplementedError: The type can't be written so.
    """
    if qtype == GGMLQuantizationType.F32:
        return np.asarray(values, dtype=np.float32)
    if qtype in FLOATS:
        stored = from_float32(values, qtype.name)
        return stored if stored.dtype == np.float16 else stored.view(np.uint8)
    # loads ggml
    from ggml_qcache import native
    from llama_cpp._ggml import libggml

    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
    result = np.empty(quant_shape_to_byte_shape(rows.shape, qtype), dtype=np.uint8)
    if importance is None and native.quantize(rows, qtype, result):
        return result.reshape(quant_shape_to_byte_shape(values.shape, qtype))
    needs_imatrix = libggml.ggml_quantize_requires_imatrix
    needs_imatrix.restype = ctypes.c_bool
    if importance is None and needs_imatrix(ctypes.c_int(qtype)):
        raise NotImplementedError(f"{qtype.name} is only written with an importance matrix")
    chunk = libggml.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    chunk(
        ctypes.c_int(qtype), rows.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0),
        ctypes.c_int64(rows.shape[0]), ctypes.c_int64(rows.shape[1]), None if weights is None else weights.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    return result.reshape(quant_shape_to_byte_shape(values.shape, qtype))


def dequantised(stored: npt.NDArray[Any], qtype: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Values of what ``quantised`` gives, f32."""
    if qtype in (GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
        return to_float32(stored if stored.dtype == np.float16 else stored.view(np.uint16), qtype.name)
    return np.asarray(dequantize(stored, qtype), dtype=np.float32)
