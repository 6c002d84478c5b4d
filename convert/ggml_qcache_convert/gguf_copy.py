"""Copies a text GGUF with other lazy-layer keys, tensor by tensor: weights of any type stay as they are."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor

from .calibration import Corrections
from .chunks import in_chunks
from .errors import ConversionError
from .imatrix import Imatrix, add_imatrix_keys, importance_of
from .lazy_keys import ATTENTION
from .lazy_layers import LAZY_KEYS
from .outtypes import OutType, dequantised, quantised
from .writer import stored_bytes, stored_layout

_ATTENTION = re.compile(rf"blk\.(\d+)\.({'|'.join(ATTENTION)})\.(?:weight|bias)")
_VIS_BIAS = re.compile(r"blk\.\d+\.attn_vis_bias\.weight")


def open_text_gguf(path: Path) -> GGUFReader:
    """Opens a text GGUF, its tensors mapped.

    Raises:
        ConversionError: Damaged, or no text model.
        OSError: It can't be opened.
    """
    try:
        reader = GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # the reader runs into whatever a damaged file leads it to
        raise ConversionError(f"{path}: isn't GGUF, is truncated or damaged ({error})") from error
    if not isinstance(n_layers(reader), int):
        raise ConversionError(f"{path}: {architecture(reader)!r} isn't a text model: it has no block count")
    return reader


def architecture(reader: GGUFReader) -> str | None:
    """``general.architecture``."""
    field = reader.get_field("general.architecture")
    return None if field is None else field.contents()


def n_layers(reader: GGUFReader) -> int | None:
    """Decoder layers; None for a file that has none."""
    field = reader.get_field(f"{architecture(reader)}.block_count")
    return None if field is None else field.contents()


def plan_copy(
    reader: GGUFReader, left_out: Mapping[int, Sequence[str]], outtype: OutType | None = None
) -> list[tuple[ReaderTensor, tuple[int, ...], GGMLQuantizationType]]:
    """Plans the tensors of a copy.

    Args:
        reader: The source.
        left_out: Tensors of the attention that are left out, by layer, as ``lazy_keys.left_out``.
        outtype: Types of the weight matrices; None: as they are.

    Returns:
        The tensors that are kept, with their shapes (outermost dimension first) and new types.

    Raises:
        ConversionError: The source lacks tensors of a layer that is to keep them.
    """
    kept = []
    for tensor in reader.tensors:
        match = _ATTENTION.fullmatch(tensor.name)
        if (match is None or match[2] not in left_out.get(int(match[1]), ())) and _VIS_BIAS.fullmatch(tensor.name) is None:
            kept.append(tensor)
    names = {tensor.name for tensor in kept}
    for layer in range(n_layers(reader)):
        needed = (f"blk.{layer}.{name}.weight" for name in ATTENTION if name not in left_out.get(layer, ()))
        if missing := [name for name in needed if name not in names]:
            raise ConversionError(
                f"the GGUF has no {missing[0]}: layer {layer} was lazy in global mode, or dropped, when it was converted; "
                "convert from the checkpoint, or from a file made with --keep-qk"
            )
    n_layer, tied = n_layers(reader), "output.weight" not in names
    plan = []
    for tensor in kept:
        shape, qtype = _shape(tensor), tensor.tensor_type
        if outtype is not None and len(shape) == 2 and tensor.name.endswith(".weight"):
            qtype = outtype.of(tensor.name, shape, n_layer, tied)
        plan.append((tensor, shape, qtype))
    return plan


def copy_with_keys(
    reader: GGUFReader,
    target: Path,
    add_keys: Callable[[GGUFWriter], None],
    left_out: Mapping[int, Sequence[str]],
    advance: Callable[[int], object],
    corrections: Corrections | None = None,
    outtype: OutType | None = None,
    imatrix: Imatrix | None = None,
) -> None:
    """Writes a copy without the source's keys of lazy layers and biases on visual keys.

    Args:
        reader: The source.
        target: File to create.
        add_keys: Adds the new ones.
        left_out: Tensors of the attention that are left out, by layer, as ``lazy_keys.left_out``.
        advance: Called with the bytes copied since the last call.
        corrections: New weights, and the biases on visual keys.
        outtype: Types of the weight matrices; None: as they are.
        imatrix: Importance of the inputs of matrices that are quantised anew.

    Raises:
        ConversionError: The source lacks tensors of a layer that is to keep them; the importance matrix is of another model.
        OSError: The file can't be written.
    """
    plan = plan_copy(reader, left_out, outtype)
    writer = GGUFWriter(None, architecture(reader))
    writer.kv_data[0].clear()
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", *LAZY_KEYS)):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    add_keys(writer)
    if (alignment := reader.get_field("general.alignment")) is not None:
        writer.data_alignment = alignment.contents()
    replaced = {} if corrections is None else corrections.weights
    if outtype is not None:
        writer.kv_data[0].pop("general.file_type", None)
        writer.add_file_type(outtype.file_type)
    biases = _vis_biases(corrections)
    importance = {}
    if imatrix is not None:
        importance = importance_of(imatrix, ((tensor.name, shape, qtype) for tensor, shape, qtype in plan))
        add_imatrix_keys(writer, imatrix)
    for tensor, shape, qtype in plan:
        stored, dtype = stored_layout(shape, qtype)
        writer.add_tensor_info(tensor.name, stored, dtype, stored_bytes(shape, qtype), qtype)
    for name, values in biases.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, GGMLQuantizationType.F32)
    try:
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, _, qtype in plan:
            writer.write_tensor_data(_stored(tensor, qtype, replaced.get(tensor.name), importance.get(tensor.name)))
            advance(tensor.data.nbytes)
        for values in biases.values():
            writer.write_tensor_data(values)
        writer.flush()
    finally:
        writer.close()


def _vis_biases(corrections: Corrections | None) -> dict[str, np.ndarray]:
    """Tensors of the layers that have a bias."""
    if corrections is None or corrections.vis_bias is None:
        return {}
    return {f"blk.{layer}.attn_vis_bias.weight": row for layer, row in enumerate(corrections.vis_bias) if row.any()}


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Outermost dimension first, without those of 1 that ggml adds."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _stored(
    tensor: ReaderTensor, qtype: GGMLQuantizationType, new: np.ndarray | None, importance: np.ndarray | None
) -> np.ndarray:
    """A tensor's bytes: its own, or new values, or its own in another type. Holds chunks of it as floats, never all of it."""
    if new is not None:  # its inputs may be others, and in another order
        return quantised(new, qtype)
    if qtype == tensor.tensor_type:
        return np.asarray(tensor.data)
    shape, dtype = stored_layout(_shape(tensor), qtype)
    result = np.empty(shape, dtype)

    def convert(start: int, stop: int) -> None:
        values = dequantised(tensor.data[start:stop], tensor.tensor_type)
        if not np.isfinite(values).all():
            raise ConversionError(f"tensor {tensor.name!r} of the GGUF has {int((~np.isfinite(values)).sum())} NaN or infinite values")
        result[start:stop] = quantised(values, qtype, importance)

    for _ in in_chunks(len(result), int(tensor.shape[0]), convert):
        pass
    return result
