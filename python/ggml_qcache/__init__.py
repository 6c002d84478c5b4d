"""Runs LLaVA-like models with lazy attention and a Q Cache."""

from .errors import (
    ContextFullError,
    FileError,
    InternalError,
    InvalidArgumentError,
    ModelError,
    NoBlocksError,
    OutOfMemoryError,
    QCacheError,
    StateError,
    UnsupportedError,
    VersionError,
)
from .lazy import LazyInfo
from .llama import Llama
from .native import VERSION as __version__
from .native import check_ggml_version

check_ggml_version()

__all__ = [
    "ContextFullError",
    "FileError",
    "InternalError",
    "InvalidArgumentError",
    "LazyInfo",
    "Llama",
    "ModelError",
    "NoBlocksError",
    "OutOfMemoryError",
    "QCacheError",
    "StateError",
    "UnsupportedError",
    "VersionError",
    "__version__",
]
