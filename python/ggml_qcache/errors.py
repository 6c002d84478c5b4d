"""Exceptions: one per failing status of ``qcache.h``, below ``QCacheError``.

A wrong argument is a plain ``ValueError`` before anything is called. The text always names the values that failed, and
the object that raised stays usable.
"""

from __future__ import annotations


class QCacheError(RuntimeError):
    """What the native library or a model file made impossible."""


class NoBlocksError(QCacheError):
    """The KV cache reached ``kv_bytes_max``; nothing was appended."""


class ContextFullError(QCacheError):
    """A sequence would grow past ``n_ctx``; nothing was appended."""


class InvalidArgumentError(QCacheError, ValueError):
    """The native library refused an argument."""


class FileError(QCacheError):
    """A file can't be opened, read or written."""


class ModelError(QCacheError):
    """A file that isn't GGUF, is truncated, or has a key or tensor that is missing or wrong."""


class UnsupportedError(QCacheError):
    """Valid, but nothing that this version runs."""


class OutOfMemoryError(QCacheError):
    """The system gave no memory."""


class StateError(QCacheError):
    """A saved state that is damaged or belongs to another model or configuration."""


class VersionError(QCacheError):
    """The ggml found at run time isn't the one built against."""


class InternalError(QCacheError):
    """A bug in ggml-qcache; please report it."""
