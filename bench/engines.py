"""The two engines behind one interface: prefill once, copy to any number of long sequences, decode step by step.

Both get the same tokens. Every sequence has memory of its own, and a step appends one text token to each.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt
from state_copies import repeated_state

from ggml_qcache.native import TEXT, VISUAL, Context, Model

UBATCH = 512  # rows computed at once, the default of both
_FLASH = {False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED}
_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
KV_TYPES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes a value


@dataclass(frozen=True)
class Prompt:
    """Tokens of one sequence, and which of them stand for parts of an image."""

    tokens: npt.NDArray[np.int32]
    visual: npt.NDArray[np.bool_]


class Session(Protocol):
    """Sequences of one length in one engine."""

    def step(self, tokens: npt.NDArray[np.int32]) -> float:
        """Appends a token to each sequence, logits included; returns the seconds it took."""

    def kv_bytes(self) -> int:
        """KV bytes that a step reads."""

    def close(self) -> None:
        """Frees the memory."""


class Engine(Protocol):
    """A model, a way to run it, and a prefilled sequence."""

    name: str
    setting: str
    lazy: str | None
    kv: str

    def prefill(self, prompt: Prompt) -> tuple[float, npt.NDArray[np.float32]]:
        """Computes a prompt and keeps its KV; returns the seconds it took and the logits of the last token."""

    def session(self, n_tokens: int, n_seq: int, n_steps: int) -> Session:
        """Sequences of ``n_tokens`` made of the prefilled one, with room for steps."""


#
# ggml-qcache
#


class QcacheEngine:
    """ggml-qcache in one lazy mode."""

    name = "ggml-qcache"

    def __init__(self, model: Model, lazy: str, leader: Sequence[int], kv: str, n_threads: int) -> None:
        """Prepares the engine.

        Args:
            model: Loaded weights.
            lazy: ``none``, ``visual`` or ``global``.
            leader: Leader of each layer, for the lazy modes.
            kv: Type of K and V.
            n_threads: Threads of prefill and decode.
        """
        self.lazy, self.kv, self.setting = lazy, kv, f"lazy {lazy}, {kv}"
        mode = {"lazy_mode": "off"} if lazy == "none" else {"lazy_mode": lazy, "lazy_leader": leader}
        self._model = model
        self._params: dict[str, Any] = {
            **mode, "type_k": kv, "type_v": kv, "n_threads": n_threads, "n_threads_batch": n_threads, "n_ubatch": UBATCH,
        }  # fmt: skip
        self._state = b""
        self._block_bytes = (0, 0)
        self.kernel = ""  # known after the first prefill

    def prefill(self, prompt: Prompt) -> tuple[float, npt.NDArray[np.float32]]:
        with Context(self._model, n_ctx=len(prompt.tokens), **self._params) as context:
            start = time.perf_counter()
            context.decode(prompt.tokens, modality=np.where(prompt.visual, VISUAL, TEXT))
            seconds = time.perf_counter() - start
            self.kernel = context.attn_name
            usage = context.kv_usage()
            self._block_bytes = usage["bytes_block_text"], usage["bytes_block_visual"]
            self._state = context.state_get()
            return seconds, context.logits()

    def session(self, n_tokens: int, n_seq: int, n_steps: int) -> Session:
        context = Context(self._model, n_ctx=n_tokens + n_steps, n_seq_max=n_seq, **self._params)
        context.state_set(repeated_state(self._state, self._block_bytes, n_tokens, n_seq))
        return _QcacheSession(context, n_seq)


class _QcacheSession:
    def __init__(self, context: Context, n_seq: int) -> None:
        self._context = context
        self._ids = np.arange(n_seq, dtype=np.int32)

    def step(self, tokens: npt.NDArray[np.int32]) -> float:
        start = time.perf_counter()
        self._context.decode(tokens, seq_id=self._ids, logits=True)
        return time.perf_counter() - start

    def kv_bytes(self) -> int:
        return self._context.kv_usage()["bytes"]

    def close(self) -> None:
        self._context.close()


#
# llama.cpp
#


class LlamaCppModel:
    """Weights loaded by libllama, its defaults (memory map, repacking) as they are."""

    def __init__(self, path: Path, n_gpu_layers: int) -> None:
        """Loads a model.

        Args:
            path: GGUF file.
            n_gpu_layers: As libllama takes it; 0: none.

        Raises:
            RuntimeError: libllama refuses the file.
        """
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeError(f"{path}: llama.cpp can't load it")
        self.n_layer = llama_cpp.llama_model_n_layer(self.handle)
        self.n_kv = (
            llama_cpp.llama_model_n_head_kv(self.handle)
            * llama_cpp.llama_model_n_embd(self.handle)
            // llama_cpp.llama_model_n_head(self.handle)
        )
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.handle))

    def close(self) -> None:
        """Frees the weights."""
        llama_cpp.llama_model_free(self.handle)


class LlamaCppEngine:
    """llama.cpp with one setting of flash attention and KV types."""

    name = "llama.cpp"
    lazy = None

    def __init__(self, model: LlamaCppModel, flash: bool, type_k: str, type_v: str, n_threads: int) -> None:
        """Prepares the engine; parameters as ``llama_context_params``."""
        self.kv = type_k if type_k == type_v else f"{type_k}/{type_v}"
        self.setting = f"flash attention {'on' if flash else 'off'}, {self.kv}"
        self._model, self._n_threads = model, n_threads
        self._params = {"flash_attn_type": _FLASH[flash], "type_k": _TYPES[type_k], "type_v": _TYPES[type_v]}
        self._token_bytes = model.n_layer * model.n_kv * (KV_TYPES[type_k] + KV_TYPES[type_v])
        self._state: Any = None
        self._n_prefilled = 0

    def prefill(self, prompt: Prompt) -> tuple[float, npt.NDArray[np.float32]]:
        n = self._n_prefilled = len(prompt.tokens)
        context = self._context(n, 1, unified=True)
        start = time.perf_counter()
        _decode(context, prompt.tokens, np.arange(n), np.zeros(n, np.int32), logits=[n - 1])
        seconds = time.perf_counter() - start
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, n - 1), (self._model.n_vocab,)).copy()
        self._state = _sequence_state(context)
        llama_cpp.llama_free(context)
        return seconds, logits

    def session(self, n_tokens: int, n_seq: int, n_steps: int) -> Session:
        state = self._state if n_tokens == self._n_prefilled else self._repeated(n_tokens)
        context = self._context(n_tokens + n_steps, n_seq, unified=False)
        state = _for_streams(state, n_seq)
        for seq_id in range(n_seq):
            _set_sequence_state(context, state, seq_id)
        return _LlamaCppSession(context, n_tokens, n_seq, self._token_bytes)

    def _context(self, n_ctx: int, n_seq: int, unified: bool) -> Any:
        """A context with room for ``n_ctx`` tokens in each sequence; not unified, each has a cache of its own."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_seq * -(-n_ctx // 256) * 256  # llama.cpp attends to whole 256s of cells
        params.n_seq_max, params.kv_unified = n_seq, unified
        params.n_batch, params.n_ubatch = max(UBATCH, n_ctx), UBATCH
        params.n_threads = params.n_threads_batch = self._n_threads
        for name, value in self._params.items():
            setattr(params, name, value)
        context = llama_cpp.llama_init_from_model(self._model.handle, params)
        if not context:
            raise RuntimeError(f"llama.cpp can't make a context: {self.setting}, n_ctx {params.n_ctx}")
        return context

    def _repeated(self, n_tokens: int) -> Any:
        """The state of a sequence of any length: the prefilled one, moved along and appended as often as need be."""
        context = self._context(n_tokens + self._n_prefilled, 2, unified=True)
        memory = llama_cpp.llama_get_memory(context)
        for start in range(0, n_tokens, self._n_prefilled):
            _set_sequence_state(context, self._state, 1)
            llama_cpp.llama_memory_seq_rm(memory, 1, n_tokens - start, -1)
            llama_cpp.llama_memory_seq_add(memory, 1, 0, -1, start)
            llama_cpp.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1)
        state = _sequence_state(context)
        llama_cpp.llama_free(context)
        return state


class _LlamaCppSession:
    def __init__(self, context: Any, n_tokens: int, n_seq: int, token_bytes: float) -> None:
        self._context, self._pos, self._n_seq, self._token_bytes = context, n_tokens, n_seq, token_bytes
        self._ids = np.arange(n_seq, dtype=np.int32)

    def step(self, tokens: npt.NDArray[np.int32]) -> float:
        pos = np.full(self._n_seq, self._pos)
        start = time.perf_counter()
        _decode(self._context, tokens, pos, self._ids, logits=range(self._n_seq))
        self._pos += 1
        return time.perf_counter() - start

    def kv_bytes(self) -> int:
        return int(self._n_seq * self._pos * self._token_bytes)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)


def _decode(
    context: Any, tokens: npt.NDArray[np.int32], pos: npt.NDArray[Any], seq_id: npt.NDArray[Any], logits: Sequence[int]
) -> None:
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i in range(len(tokens)):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = tokens[i], pos[i], 1, seq_id[i], 0
    for i in logits:
        batch.logits[i] = 1
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_synchronize(context)
    llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {status}")


def _sequence_state(context: Any) -> Any:
    """The KV of sequence 0, as ctypes has it."""
    size = llama_cpp.llama_state_seq_get_size(context, 0)
    state = (ctypes.c_uint8 * size)()
    if llama_cpp.llama_state_seq_get_data(context, state, size, 0) != size:
        raise RuntimeError("llama_state_seq_get_data failed")
    return state


def _for_streams(state: Any, n_stream: int) -> Any:
    """The state of a sequence for a context in which each sequence has its own cache.

    llama.cpp counts those caches (the third word) and lists their cells one after the other: here all others are empty.
    """
    result = (ctypes.c_uint8 * (len(state) + 4 * (n_stream - 1)))()
    ctypes.memmove(result, state, len(state))
    words = np.frombuffer(result, np.uint32)
    if words[2] != 1:
        raise RuntimeError(f"a sequence state of llama.cpp begins with {words[:4]}, expected one cache in the third word")
    words[2] = n_stream
    return result


def _set_sequence_state(context: Any, state: Any, seq_id: int) -> None:
    if llama_cpp.llama_state_seq_set_data(context, state, len(state), seq_id) == 0:
        raise RuntimeError(f"llama_state_seq_set_data of {len(state)} bytes to sequence {seq_id} failed")
