"""Which tensor lies where in a file of `torch.save`, such as `pytorch_model.bin`.

torch unpickles the names, types and shapes with `weights_only=True`, which runs no code, under a mode in which tensors have
no data. It tells where in the file each storage lies; the data itself is then read like that of any other file. A memory map
(`mmap=True`) would count the whole model as resident.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConversionError
from .tensor_entry import TensorEntry

if TYPE_CHECKING:
    import torch

_NEEDED = (2, 7)  # the first that tells the offsets; weights_only is safe from 2.6 on (CVE-2025-32434)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def read_torch_header(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file by name. No weights are read, no code in it is run.

    Raises:
        ConversionError: torch is missing or too old; the file is damaged, of an old format, holds code or anything else than
            tensors by name, or a tensor whose values don't lie row by row.
    """
    torch = _torch(path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    records = _records(path)
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|(?:class|function) (\w+(?:\.\w+)+)", str(error))
        if found is None:
            raise _unreadable(path, error) from error
        raise ConversionError(
            f"{path}: refused, the pickle in it loads {found[1] or found[2]}, which isn't a part of tensors and could run code"
        ) from error
    except Exception as error:  # torch and its unpickler run into whatever a damaged file leads them to
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    return {name: _entry(path, name, tensor, records) for name, tensor in content.items()}


def _unreadable(path: Path, error: Exception) -> ConversionError:
    return ConversionError(f"{path}: isn't a readable PyTorch file: {' '.join(str(error).split())[:200]}")


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path}: reading PyTorch's .bin files needs torch: pip install 'ggml-qcache[torch]' (or torch alone)"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _NEEDED:
        needed = ".".join(map(str, _NEEDED))
        raise ConversionError(f"{path}: reading PyTorch's .bin files needs torch {needed} or later, installed is {torch.__version__}")
    return torch


def _records(path: Path) -> dict[int, int]:
    """Size of each member of the archive by where its content starts."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            order = next((archive.read(member) for member in members if member.filename.endswith("/byteorder") and member.file_size < 16), b"little")
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ConversionError(
            f"{path}: isn't a readable PyTorch file: {error}; one in the format of before torch 1.6 must be loaded and saved again"
        ) from error
    if order != b"little":
        raise ConversionError(f"{path}: its byte order is {order!r}, supported is little-endian")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ConversionError(f"{path}: {member.filename!r} in it is compressed, which torch.save never does")
    records = {}
    with path.open("rb") as file:
        for member in members:
            # the directory doesn't tell how long a member's own header is: 30 bytes, a name and torch's padding
            file.seek(member.header_offset)
            header = file.read(30)
            start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            records[start] = member.file_size
    return records


def _entry(path: Path, name: Any, tensor: "torch.Tensor", records: dict[int, int]) -> TensorEntry:
    """Where a tensor's bytes are, once it is known that they are inside its archive member."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise ConversionError(f"{path}: {name!r} is a {type(tensor).__name__}, expected tensors by name")
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConversionError(f"{path}: tensor {name!r} is sparse or quantised ({tensor.layout}, {dtype}), which isn't supported")
    if not tensor.is_contiguous():
        raise ConversionError(
            f"{path}: tensor {name!r} of shape {list(shape)} isn't stored row by row but with strides {list(tensor.stride())}; "
            "save its .contiguous()"
        )
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)  # documented in torch's notes on serialization
    # torch reckons it from how torch.save lays a file out
    if start not in records:
        raise ConversionError(f"{path}: the data of tensor {name!r} isn't where torch.save puts it; load the file and save it again")
    first = tensor.storage_offset() * tensor.element_size()
    nbytes = tensor.numel() * tensor.element_size()
    if first + nbytes > records[start]:
        raise ConversionError(
            f"{path}: tensor {name!r} of shape {list(shape)} needs {first + nbytes} bytes, its storage in the file has {records[start]}"
        )
    return TensorEntry(name, path, _DTYPES.get(dtype, dtype), shape, start + first)
