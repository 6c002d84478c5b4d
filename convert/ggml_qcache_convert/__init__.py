"""Converts Hugging Face LLaVA checkpoints to GGUF, with lazy-layer metadata.

`lazy_layers` is importable with the standard library alone: `convert` and what it needs are loaded on first use.
"""

from typing import TYPE_CHECKING

from .errors import ConversionError
from .lazy_layers import dropped_of, lazy_of, leaders_of, parse_layers, spec_of

if TYPE_CHECKING:
    from .conversion import ConversionResult, convert

__all__ = ["ConversionError", "ConversionResult", "convert", "dropped_of", "lazy_of", "leaders_of", "parse_layers", "spec_of"]


def __getattr__(name: str) -> object:
    if name not in ("convert", "ConversionResult"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .conversion import ConversionResult, convert

    return {"ConversionResult": ConversionResult, "convert": convert}[name]
