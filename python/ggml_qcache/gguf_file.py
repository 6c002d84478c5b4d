"""Reads what a GGUF file says of itself, without loading weights."""

from __future__ import annotations

import os
from typing import Any

from gguf import GGUFReader

from .errors import FileError, ModelError


def read_gguf(path: str | os.PathLike[str]) -> GGUFReader:
    """Opens a GGUF file, its tensors mapped.

    Raises:
        FileError: There is no such file, or it can't be opened.
        ModelError: Not GGUF, truncated or damaged.
    """
    try:
        return GGUFReader(path)
    except OSError as error:
        raise FileError(f"{os.fspath(path)!r}: {error.strerror or error}") from None
    except Exception as error:  # the reader runs into whatever a damaged file leads it to
        size = os.path.getsize(path)
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{os.fspath(path)!r} is not GGUF, truncated or damaged ({size} bytes; {reason})") from error


def value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """Gives the value of a key, or the default where the file hasn't got it."""
    field = reader.get_field(key)
    return default if field is None else field.contents()
