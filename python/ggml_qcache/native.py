"""Thin classes over the handles of ``qcache.h``.

Loading order matters: llama_cpp brings the ggml libraries, libqcache then resolves against the same ones, and their
version is checked before anything else is called.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from . import errors
from ._native import ffi, lib

_ERRORS: dict[int, type[errors.QCacheError]] = {
    lib.QCACHE_STATUS_NO_BLOCKS: errors.NoBlocksError,
    lib.QCACHE_STATUS_CONTEXT_FULL: errors.ContextFullError,
    lib.QCACHE_STATUS_INVALID_ARGUMENT: errors.InvalidArgumentError,
    lib.QCACHE_STATUS_FILE: errors.FileError,
    lib.QCACHE_STATUS_INVALID_MODEL: errors.ModelError,
    lib.QCACHE_STATUS_UNSUPPORTED: errors.UnsupportedError,
    lib.QCACHE_STATUS_OUT_OF_MEMORY: errors.OutOfMemoryError,
    lib.QCACHE_STATUS_INVALID_STATE: errors.StateError,
    lib.QCACHE_STATUS_VERSION: errors.VersionError,
    lib.QCACHE_STATUS_INTERNAL: errors.InternalError,
}

LAZY_MODES: dict[str, int] = {
    "off": lib.QCACHE_LAZY_MODE_OFF,
    "global": lib.QCACHE_LAZY_MODE_GLOBAL,
    "visual": lib.QCACHE_LAZY_MODE_VISUAL,
}
_LAZY_MODE_NAMES = {value: name for name, value in LAZY_MODES.items()}

ATTN_IMPLS: dict[str, int] = {
    "auto": lib.QCACHE_ATTN_IMPL_AUTO,
    "scalar": lib.QCACHE_ATTN_IMPL_SCALAR,
    "composed": lib.QCACHE_ATTN_IMPL_COMPOSED,
}
SCORE_CACHES: dict[str, int] = {
    "auto": lib.QCACHE_SCORE_CACHE_AUTO,
    "off": lib.QCACHE_SCORE_CACHE_OFF,
    "on": lib.QCACHE_SCORE_CACHE_ON,
}
KV_TYPES: dict[str, int] = {"f16": 1, "q8_0": 8, "q4_0": 2}  # names and numbers of ggml_type

CAPTURES: dict[str, int] = {
    "scores": lib.QCACHE_CAPTURE_SCORES,
    "probs": lib.QCACHE_CAPTURE_PROBS,
    "attn": lib.QCACHE_CAPTURE_ATTN,
    "hidden": lib.QCACHE_CAPTURE_HIDDEN,
}

TEXT: int = lib.QCACHE_MODALITY_TEXT
VISUAL: int = lib.QCACHE_MODALITY_VISUAL

VERSION: str = ffi.string(lib.qcache_version()).decode()


def check(status: int) -> None:
    """Raises the exception of a failing status.

    Args:
        status: What a function of ``qcache.h`` returned.

    Raises:
        QCacheError: The subclass of the status, with the text of ``qcache_last_error``.
    """
    if status != lib.QCACHE_STATUS_SUCCESS:
        raise _ERRORS[status](ffi.string(lib.qcache_last_error()).decode("utf-8", errors="replace"))


def check_ggml_version() -> None:
    """Compares the loaded ggml with the one that libqcache was built for.

    Raises:
        ImportError: They differ; the text names both.
    """
    libggml.ggml_version.restype = ctypes.c_char_p
    try:
        check(lib.qcache_check_ggml_version(libggml.ggml_version()))
    except errors.VersionError as error:
        raise ImportError(f"ggml_qcache can't use the installed llama-cpp-python: {error}") from None


def choice(name: str, value: str | int, choices: dict[str, int]) -> int:
    """Looks up an option given by name or by its number in the C API.

    Args:
        name: Name of the option, for the error text.
        value: A key or a value of ``choices``.
        choices: What is allowed.

    Raises:
        ValueError: ``value`` is neither.
    """
    if isinstance(value, str) and value in choices:
        return choices[value]
    if not isinstance(value, (str, bool)) and value in choices.values():
        return int(value)
    raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def float_buffer(array: npt.NDArray[np.float32]) -> Any:
    """An array as C sees it, for what is called once a token: making it costs more than such a call. It keeps the array alive.

    Raises:
        ValueError: The array is read-only or not contiguous.
    """
    return ffi.from_buffer("float[]", array, require_writable=True)


def quantize(values: npt.NDArray[np.float32], qtype: int, blocks: npt.NDArray[np.uint8]) -> bool:
    """Quantises to q8_0, q4_K, q5_K or q6_K, to the bits of ggml's own quantiser without an importance matrix.

    Args:
        values: f32, contiguous, finite; rows of whole blocks.
        qtype: ggml's number of the type.
        blocks: Where they go, contiguous.

    Returns:
        False, and nothing is written, where the type, this CPU or this ggml has no fast way: ggml's own is left.

    Raises:
        ValueError: ``blocks`` hasn't the size of the blocks, or ``values`` are no whole blocks or not f32.
    """
    if values.dtype != np.float32:
        raise ValueError(f"values to quantise are float32, got {values.dtype}")
    source, target = ffi.from_buffer("float[]", values), ffi.from_buffer("uint8_t[]", blocks, require_writable=True)
    status = lib.qcache_quantize(qtype, source, target, values.size, blocks.nbytes)
    if status == lib.QCACHE_STATUS_UNSUPPORTED:
        return False
    check(status)
    return True


class MtmdCorrection:
    """``qcache_mtmd_eval_callback`` with its state, for one libmtmd context; must outlive it.

    Attributes:
        callback: Address for ``mtmd_context_params.cb_eval``.
        user_data: Address for ``mtmd_context_params.cb_eval_user_data``.
    """

    def __init__(self) -> None:
        self._state = ffi.new("struct qcache_mtmd_state *")
        self.callback = int(ffi.cast("intptr_t", ffi.addressof(lib, "qcache_mtmd_eval_callback")))
        self.user_data = int(ffi.cast("intptr_t", self._state))

    @property
    def n_corrected(self) -> int:
        """Inputs of vision graphs corrected so far."""
        return self._state.n_corrected


class ModelInfo(NamedTuple):
    """What a model file says of itself (``qcache_model_info``); sizes in bytes."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    n_params: int
    n_bytes: int
    n_bytes_extra: int
    n_bytes_gpu: int
    n_gpu_layers: int
    gpu: str | None
    lazy_mode: str
    lazy_leader: tuple[int, ...]


class Model:
    """The weights of a GGUF file, read-only and shareable between contexts."""

    def __init__(
        self, path: str | os.PathLike[str], *, use_extra_bufts: bool = True, n_gpu_layers: int = 0, main_gpu: int = 0
    ) -> None:
        """Loads a model.

        Args:
            path: GGUF file.
            use_extra_bufts: Pack quantised weights for this CPU, by ourselves or where ggml offers it.
            n_gpu_layers: Last layers to compute on a GPU, -1: all; fewer where that would tear a Lazy Block.
            main_gpu: Which of ggml's GPUs.

        Raises:
            FileError, ModelError, UnsupportedError, InvalidArgumentError, OutOfMemoryError: As ``qcache_model_init``.
        """
        self.path = os.fspath(path)
        params = lib.qcache_model_default_params()
        params.use_extra_bufts = use_extra_bufts
        params.n_gpu_layers = n_gpu_layers
        params.main_gpu = main_gpu
        out = ffi.new("qcache_model_t **")
        check(lib.qcache_model_init(os.fsencode(self.path), params, out))
        self._handle = out[0]
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._free = weakref.finalize(self, lib.qcache_model_free, self._handle)
        info = lib.qcache_model_get_info(self._handle)
        self.info = ModelInfo(
            architecture=ffi.string(info.architecture).decode(),
            n_layer=info.n_layer,
            n_embd=info.n_embd,
            n_head=info.n_head,
            n_head_kv=info.n_head_kv,
            head_dim=info.head_dim,
            n_vocab=info.n_vocab,
            n_ctx_train=info.n_ctx_train,
            n_params=info.n_params,
            n_bytes=info.n_bytes,
            n_bytes_extra=info.n_bytes_extra,
            n_bytes_gpu=info.n_bytes_gpu,
            n_gpu_layers=info.n_gpu_layers,
            gpu=ffi.string(info.gpu).decode() if info.gpu else None,
            lazy_mode=_LAZY_MODE_NAMES[info.lazy_mode],
            lazy_leader=tuple(ffi.unpack(info.lazy_leader, info.n_layer)),
        )

    @property
    def handle(self) -> Any:
        """The ``qcache_model_t *``."""
        if self._handle is None:
            raise ValueError(f"the model {self.path!r} is closed")
        return self._handle

    def set_weight(self, name: str, values: npt.ArrayLike) -> None:
        """Replaces a weight of the file, rounded to its type. What contexts already hold was computed with the old one.

        Args:
            name: Name in the GGUF.
            values: As many f32 as it has, in numpy's order of dimensions, the reverse of ggml's.

        Raises:
            InvalidArgumentError: No such weight, another number of values, or NaN or infinity among them.
            UnsupportedError: A type that is only written with an importance matrix.
        """
        array = np.ascontiguousarray(values, dtype=np.float32)
        check(lib.qcache_model_set_weight(self.handle, name.encode(), ffi.from_buffer("float[]", array), array.size))

    def close(self) -> None:
        """Frees the contexts still open on the model, then the model. Closing twice is fine."""
        for context in list(self._contexts):
            context.close()
        self._handle = None
        self._free()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Context:
    """KV cache, sequences and logits of one computation on a model. For one thread at a time."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_threads: int = 0,
        n_threads_batch: int = 0,
        type_k: str | int = "f16",
        type_v: str | int = "f16",
        block_tokens: int = 32,
        kv_bytes_max: int = 0,
        lazy_mode: str | None = None,
        lazy_leader: Sequence[int] | None = None,
        vis_bias: npt.ArrayLike | None = None,
        layer_first: int = 0,
        n_layers: int = 0,
        attn_impl: str = "auto",
        score_cache: str = "auto",
        v_skip: float = 0.0,
    ) -> None:
        """Creates a context.

        Args:
            model: The model; it is kept alive.
            n_ctx: Most tokens of one sequence, 0: as the model was trained.
            n_ubatch: Most rows computed at once.
            n_seq_max: Sequence ids are 0 to ``n_seq_max - 1``.
            n_threads: Threads to decode, 0: all cores.
            n_threads_batch: Threads to prefill, 0: all cores.
            type_k: Type of the K cache, ``"f16"``, ``"q8_0"`` or ``"q4_0"``, or its ``ggml_type``.
            type_v: Type of the V cache, likewise.
            block_tokens: Tokens of a KV block, 16, 32 or 64.
            kv_bytes_max: Limit on KV bytes, 0: none.
            lazy_mode: ``"off"``, ``"global"`` or ``"visual"``; None: as the file says.
            lazy_leader: ``[n_layer]`` leaders, -1 for a layer without attention, with ``"global"`` or ``"visual"``; None: the
                file's.
            vis_bias: ``[n_layer, n_head]`` f32, what lazy layers add to the logits of visual keys in rows of text, with
                ``"visual"``; None: the file's.
            layer_first: First layer that is computed; above 0 rows are embeddings, the residual stream before it.
            n_layers: Layers that are computed, 0: to the last. Without the last there are no logits, but what
                ``captured`` gives.
            attn_impl: ``"auto"``, ``"scalar"`` or ``"composed"``.
            score_cache: ``"auto"``, ``"off"`` or ``"on"``.
            v_skip: Share of a row's attention, from 0 to under 1, that lazy layers may leave out when they decode: V of the least
                attended keys isn't read, and their output is off by at most ``v_skip`` times the largest ``|v|``.

        Raises:
            ValueError: A name or number that isn't one of those above.
            InvalidArgumentError, UnsupportedError, OutOfMemoryError: As ``qcache_context_init``.
        """
        params = lib.qcache_context_default_params()
        numbers = {
            "n_ctx": n_ctx,
            "n_ubatch": n_ubatch,
            "n_seq_max": n_seq_max,
            "n_threads": n_threads,
            "n_threads_batch": n_threads_batch,
            "n_block_tokens": block_tokens,
            "kv_bytes_max": kv_bytes_max,
            "layer_first": layer_first,
            "n_layers": n_layers,
        }
        for name, value in numbers.items():
            try:
                setattr(params, name, value)
            except OverflowError:
                raise ValueError(f"{name}={value} is out of range") from None
        params.type_k = choice("type_k", type_k, KV_TYPES)
        params.type_v = choice("type_v", type_v, KV_TYPES)
        if lazy_mode is None:
            params.lazy_mode = lib.QCACHE_LAZY_MODE_FILE
        else:
            params.lazy_mode = choice("lazy_mode", lazy_mode, LAZY_MODES)
        if lazy_leader is not None:
            leaders = ffi.new("int32_t[]", list(lazy_leader))
            params.lazy_leader = leaders
            params.n_lazy_leader = len(leaders)
        if vis_bias is not None:
            offsets = np.ascontiguousarray(vis_bias, dtype=np.float32)
            params.vis_bias = ffi.from_buffer("float[]", offsets)
            params.n_vis_bias = offsets.size
        params.attn_impl = choice("attn_impl", attn_impl, ATTN_IMPLS)
        params.score_cache = choice("score_cache", score_cache, SCORE_CACHES)
        if not 0 <= v_skip < 1:
            raise ValueError(f"v_skip={v_skip} is not a share of the attention, from 0 to under 1")
        params.v_skip = v_skip

        out = ffi.new("qcache_context_t **")
        check(lib.qcache_context_init(model.handle, params, out))
        self._handle = out[0]
        self._free = weakref.finalize(self, _free_context, self._handle, model)
        self.model = model
        model._contexts.add(self)
        self.n_ctx: int = lib.qcache_n_ctx(self._handle)
        self.n_seq_max = n_seq_max
        self.attn_name: str = ffi.string(lib.qcache_attn_name(self._handle)).decode()
        leader = ffi.new("int32_t[]", model.info.n_layer)
        self.lazy_mode: str = _LAZY_MODE_NAMES[lib.qcache_get_lazy(self._handle, leader)]
        self.lazy_leader: tuple[int, ...] = tuple(leader)
        self._n_vocab = model.info.n_vocab

    @property
    def handle(self) -> Any:
        """The ``qcache_context_t *``."""
        if self._handle is None:
            raise ValueError(f"the context on {self.model.path!r} is closed")
        return self._handle

    def close(self) -> None:
        """Frees the context. Closing twice is fine."""
        self._handle = None
        self._free()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def next_token(self, token: int, n_past: int, logits: Any, row: int = 0) -> None:
        """Appends a text token to the first tokens of sequence 0, whose others are forgotten; the fast way to generate.

        Args:
            token: Token id.
            n_past: How many tokens stay before it.
            logits: ``float_buffer`` of ``[n_rows, n_vocab]``: where to copy its logits to.
            row: Which row.

        Raises:
            ValueError: ``logits`` has no such row.
            QCacheError: As ``decode``, and where the context has no logits, without the model's last layers.
        """
        if not 0 <= row < len(logits) // self._n_vocab:
            raise ValueError(f"row {row} of {self._n_vocab} values isn't among the {len(logits)} given")
        check(lib.next_token(self.handle, token, n_past, logits, row, self._n_vocab))

    def decode(
        self,
        tokens: npt.ArrayLike | None = None,
        embeddings: npt.ArrayLike | None = None,
        *,
        seq_id: npt.ArrayLike | None = None,
        modality: npt.ArrayLike | None = None,
        logits: npt.ArrayLike | None = None,
        pos: npt.ArrayLike | None = None,
    ) -> None:
        """Appends rows to their sequences and computes them.

        Args:
            tokens: ``[n]`` token ids; -1 where the row comes from ``embeddings``. None: every row does.
            embeddings: ``[n, n_embd]`` f32; rows with a token are ignored. None: every row is a token.
            seq_id: ``[n]`` or one id for all; None: 0.
            modality: ``[n]`` or one of ``TEXT``, ``VISUAL`` for all; None: tokens are text, embeddings are visual.
            logits: ``[n]``, true where the row's logits are kept, or one value for all; None: the last row's.
            pos: ``[n]`` position of each row for RoPE, whatever its place in its sequence; None: that place.

        Raises:
            ValueError: Shapes that don't belong together, or no rows.
            QCacheError: As ``qcache_decode``; nothing was appended and earlier logits are gone.
        """
        if tokens is None and embeddings is None:
            raise ValueError("decode needs tokens or embeddings")
        n_embd = self.model.info.n_embd
        n_rows = np.shape(tokens if tokens is not None else embeddings)[0]
        batch = ffi.new("struct qcache_batch *")
        batch.n_tokens = n_rows
        keep = []  # what the pointers of the batch point to

        def pointer(name: str, ctype: str, values: npt.ArrayLike | None, dtype: type, shape: tuple[int, ...]) -> Any:
            if values is None:
                return ffi.NULL
            array = np.asarray(values, dtype=dtype)
            if array.ndim == 0:
                array = np.full(shape, array)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
            keep.append(np.ascontiguousarray(array))
            return ffi.from_buffer(ctype, keep[-1])

        batch.token = pointer("tokens", "int32_t[]", tokens, np.int32, (n_rows,))
        batch.embd = pointer("embeddings", "float[]", embeddings, np.float32, (n_rows, n_embd))
        batch.seq_id = pointer("seq_id", "int32_t[]", seq_id, np.int32, (n_rows,))
        batch.modality = pointer("modality", "int8_t[]", modality, np.int8, (n_rows,))
        batch.logits = pointer("logits", "int8_t[]", logits, np.int8, (n_rows,))
        batch.pos = pointer("pos", "int32_t[]", pos, np.int32, (n_rows,))
        check(lib.qcache_decode(self.handle, batch[0]))

    def logits(self, row: int = -1, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Copies the logits of a row of the last batch.

        Args:
            row: Row of the batch; negative counts from the end of the rows that have logits.
            out: ``[n_vocab]`` f32, contiguous: where to copy to. None: a new array.

        Returns:
            ``[n_vocab]`` f32.

        Raises:
            ValueError: The row has no logits.
        """
        pointer = lib.qcache_get_logits_ith(self.handle, row)
        if pointer == ffi.NULL:
            raise ValueError(f"row {row} has no logits: {ffi.string(lib.qcache_last_error()).decode()}")
        if out is None:
            out = np.empty(self._n_vocab, dtype=np.float32)
        elif out.nbytes != 4 * self._n_vocab:
            raise ValueError(f"out has {out.nbytes} bytes, a row of logits {4 * self._n_vocab}")
        ffi.memmove(out, pointer, out.nbytes)
        return out

    def capture_start(self, *what: str) -> None:
        """Keeps what every layer computes for the rows that have logits, from the next decode on.

        Args:
            *what: ``"scores"``, the logits of the attention; ``"probs"``, their softmax; ``"attn"``, the attention
                output before W_o; ``"hidden"``, the residual stream after the layer.

        Raises:
            ValueError: Nothing, or something else.
        """
        check(lib.qcache_capture_start(self.handle, sum({choice("what", name, CAPTURES) for name in what})))

    def capture_stop(self) -> None:
        """Ends the capture and frees what it holds."""
        lib.qcache_capture_stop(self.handle)

    def captured(self, what: str, layer: int, row: int = -1) -> npt.NDArray[np.float32]:
        """Copies what a layer computed for a row of the last batch.

        Args:
            what: One of what ``capture_start`` was asked for.
            layer: The layer.
            row: Row of the batch; negative counts from the end of the rows that have logits.

        Returns:
            f32; ``"scores"`` and ``"probs"`` ``[n_head, n_keys]`` with the keys of positions 0 to the row's,
            ``"attn"`` ``[n_head, head_dim]``, ``"hidden"`` ``[n_embd]``.

        Raises:
            ValueError: Not captured, a layer or row that the last batch doesn't have, or a layer without attention, which has
                ``"hidden"`` alone.
        """
        n_values = ffi.new("int32_t *")
        pointer = lib.qcache_get_captured_ith(self.handle, choice("what", what, CAPTURES), layer, row, n_values)
        if pointer == ffi.NULL:
            raise ValueError(f"{what} of layer {layer}, row {row}: {ffi.string(lib.qcache_last_error()).decode()}")
        out = np.empty(n_values[0], dtype=np.float32)
        ffi.memmove(out, pointer, out.nbytes)
        return out if what == "hidden" else out.reshape(self.model.info.n_head, -1)

    def seq_v(self, layer: int, seq_id: int = 0) -> npt.NDArray[np.float32]:
        """Copies the V that a layer keeps of a sequence.

        Returns:
            ``[n_head_kv, seq_len, head_dim]`` f32.

        Raises:
            InvalidArgumentError: A layer or sequence out of range, or a layer without attention.
        """
        info = self.model.info
        out = np.empty((info.n_head_kv, max(0, self.seq_len(seq_id)), info.head_dim), dtype=np.float32)
        check(lib.qcache_seq_get_v(self.handle, seq_id, layer, ffi.from_buffer("float[]", out), out.size))
        return out

    def set_n_threads(self, n_threads: int, n_threads_batch: int) -> None:
        """Sets the threads to decode and to prefill with, 0: all cores."""
        lib.qcache_set_n_threads(self.handle, n_threads, n_threads_batch)

    def seq_len(self, seq_id: int = 0) -> int:
        """Tokens of a sequence, -1 for an id out of range."""
        return lib.qcache_seq_len(self.handle, seq_id)

    def seq_rm(self, seq_id: int, p0: int, p1: int = -1) -> None:
        """Removes positions ``p0`` to ``p1 - 1``, a tail; ``p1 < 0``: to the end; ``seq_id`` -1: every sequence.

        Raises:
            InvalidArgumentError: Not a tail, or an id out of range.
        """
        check(lib.qcache_seq_rm(self.handle, seq_id, p0, p1))

    def seq_cp(self, src: int, dst: int, p1: int = -1) -> None:
        """Makes ``dst`` hold the first ``p1`` tokens of ``src``, all for ``p1 < 0``; blocks are shared.

        Raises:
            InvalidArgumentError: An id or ``p1`` out of range.
        """
        check(lib.qcache_seq_cp(self.handle, src, dst, p1))

    def clear(self) -> None:
        """Removes every sequence and frees every KV block."""
        lib.qcache_clear(self.handle)

    def kv_usage(self) -> dict[str, int]:
        """What the KV cache holds: the fields of ``struct qcache_kv_usage``, sizes in bytes."""
        usage = lib.qcache_get_kv_usage(self.handle)
        return {name: getattr(usage, name) for name, _ in ffi.typeof("struct qcache_kv_usage").fields}

    def state_get(self) -> bytes:
        """Saves every sequence with its K and V."""
        size = lib.qcache_state_size(self.handle)
        data = bytearray(size)
        check(lib.qcache_state_get(self.handle, ffi.from_buffer("uint8_t[]", data), size))
        return bytes(data)

    def state_set(self, data: bytes) -> None:
        """Restores what ``state_get`` gave.

        Raises:
            StateError: Damaged, or of another model or configuration; the context holds what it held.
            NoBlocksError, OutOfMemoryError: Likewise.
        """
        check(lib.qcache_state_set(self.handle, ffi.from_buffer("uint8_t[]", data), len(data)))

    def state_save_file(self, path: str | os.PathLike[str]) -> None:
        """Saves to a file, atomically.

        Raises:
            FileError: It can't be written.
        """
        check(lib.qcache_state_save_file(self.handle, os.fsencode(path)))

    def state_load_file(self, path: str | os.PathLike[str]) -> None:
        """Restores what ``state_save_file`` wrote.

        Raises:
            FileError: It can't be read.
            StateError, NoBlocksError, OutOfMemoryError: As ``state_set``.
        """
        check(lib.qcache_state_load_file(self.handle, os.fsencode(path)))


def _free_context(handle: Any, _model: Model) -> None:
    """Frees a context; the argument keeps its model alive until then."""
    lib.qcache_context_free(handle)
