"""JSON files of a checkpoint directory, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from .errors import ConversionError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
        ConversionError: The file is missing, isn't UTF-8 JSON, or isn't an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path}: can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConversionError(f"{path}: isn't valid JSON: {error}") from error
    except RecursionError as error:
        raise ConversionError(f"{path}: is nested too deeply") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_json_if_present(path: Path) -> dict[str, Any]:
    """Reads a JSON object, or gives an empty one when there is no such file."""
    return read_json(path) if path.exists() else {}
