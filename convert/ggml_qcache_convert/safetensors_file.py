"""Which tensor lies where in a safetensors file.

The library validates the header (sizes, overlaps, length). It gives no offsets, so the header is parsed once more for them.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .tensor_entry import TensorEntry


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Lists the tensors of a file by name.

    Raises:
        ConversionError: Not a safetensors file, truncated or damaged.
    """
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path}: isn't a readable safetensors file: {error}") from error
    return {
        name: TensorEntry(name, path, one["dtype"], tuple(one["shape"]), 8 + n_header + one["data_offsets"][0])
        for name, one in header.items()
        if name != "__metadata__"
    }
