"""``Llama``: the interface of ``llama_cpp.Llama`` on the lazy-attention decoder.

The base class keeps what it does well: completions, chat, sampling chains, grammars, log-probabilities, caches. Its
model is loaded for the vocabulary alone and its context is never made; what it would have computed, ours computes.
The attributes set in ``__init__`` are those that the base's methods read in llama-cpp-python 0.3.36, the version
that is pinned for its ABI anyway.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Optional, Union

import llama_cpp.llama_cpp as llama_c
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals as internals
from llama_cpp import llama as base
from llama_cpp import llama_chat_format
from llama_cpp._logger import set_verbose

from . import native
from .base_context import BaseContext, Closed
from .candidates import NOT_APPENDED, Candidates, Generation
from .chat import LLAVA_TEMPLATE, ChatTemplate, MediaPrompt, has_images
from .errors import ModelError, QCacheError, UnsupportedError
from .images import MAX_BYTES, MAX_PIXELS, ImageLoader
from .lazy import LazyInfo, resolve_lazy
from .tokenizer import TextRules, Tokenizer, load_vocabulary
from .vision import ImageChunk, Vision


class Llama(base.Llama):
    """A language model with lazy attention, and with an mmproj file one that sees images."""

    _stack: Optional[contextlib.ExitStack] = None

    def __init__(
        self,
        model_path: str,
        *,
        mmproj_path: Optional[str] = None,
        lazy_layers: Union[str, Sequence[int], None] = "auto",
        lazy_mode: Optional[str] = None,
        n_gpu_layers: int = 0,
        main_gpu: int = 0,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_threads: Optional[int] = None,
        n_threads_batch: Optional[int] = None,
        seed: int = llama_c.LLAMA_DEFAULT_SEED,
        type_k: Union[str, int, None] = None,
        type_v: Union[str, int, None] = None,
        kv_bytes_max: int = 0,
        block_tokens: int = 32,
        attn_impl: str = "auto",
        score_cache: str = "auto",
        v_skip: float = 0.0,
        logits_all: bool = False,
        last_n_tokens_size: int = 64,
        chat_format: Optional[str] = None,
        chat_handler: Optional[llama_chat_format.LlamaChatCompletionHandler] = None,
        tokenizer: Optional[base.BaseLlamaTokenizer] = None,
        spm_infill: bool = False,
        allow_http: bool = False,
        max_image_bytes: int = MAX_BYTES,
        max_image_pixels: int = MAX_PIXELS,
        verbose: bool = False,
        **base_arguments: Any,
    ) -> None:
        """Loads a model.

        Args:
            model_path: Text GGUF.
            mmproj_path: Vision GGUF (mmproj) of the same model; None: no images.
            lazy_layers: ``"auto"``: as the file says. ``"none"``, None or ``[]``: every layer full. Otherwise layers,
                as ``"5-7,9-15"`` or a list; the leader of a lazy layer is the nearest full layer before it. After ``drop:``,
                as in ``"5-7,drop:9-11"``, layers lose their attention altogether.
            lazy_mode: ``"visual"``: visual tokens share query and key with the leader. ``"global"``: every token does.
                None: the file's mode, or ``"visual"`` where it has none.
            n_gpu_layers: Last layers to compute on a GPU, with the output matrix; -1: all. Fewer where that would tear a
                Lazy Block of the file: ``device_report()`` tells. Unless 0, images are encoded on the first GPU.
            main_gpu: Which of ggml's GPUs. One that there are no kernels for computes attention as ``attn_impl="composed"`` does.
            n_ctx: Most tokens of prompt and answer, 0: as the model was trained.
            n_batch: Most prompt tokens evaluated by one call of the native library.
            n_ubatch: Most prompt tokens computed at once.
            n_seq_max: Sequences of ``native_context``. This class uses sequence 0; calibration needs others beside it.
            n_threads: Threads to generate with, None: all cores.
            n_threads_batch: Threads to evaluate prompts with, None: all cores.
            seed: Seed of the samplers.
            type_k: Type of the K cache, ``"f16"`` (default), ``"q8_0"`` or ``"q4_0"``, or its ``ggml_type``.
            type_v: Type of the V cache, likewise.
            kv_bytes_max: Limit on the bytes of the KV cache, 0: none. It grows with use either way.
            block_tokens: Tokens of a KV block, 16, 32 or 64.
            attn_impl: ``"auto"``: the best kernel of this CPU or GPU. ``"scalar"``: the reference, on the CPU alone.
                ``"composed"``: ggml's operations alone.
            score_cache: ``"auto"``, ``"off"`` or ``"on"``: whether lazy layers reuse the leader's logits.
            v_skip: Share of the attention, 0 to under 1, that lazy layers may leave out when they generate: V of the least
                attended tokens isn't read. ``kv_cache_usage()`` tells how much of it was on the CPU. It needs our own kernels
                (``attn_impl="auto"``) and a score cache.
            logits_all: Keep the logits of every token; needed for log-probabilities.
            last_n_tokens_size: Tokens that repetition penalties look back on.
            chat_format: A named format of llama_cpp, instead of the file's chat template. It places no images.
            chat_handler: A chat handler, instead of either.
            tokenizer: Replaces the model's own.
            spm_infill: Order of infill prompts, as in llama_cpp.
            allow_http: Fetch images from ``http(s)://`` URLs.
            max_image_bytes: Most bytes of an encoded image.
            max_image_pixels: Most pixels of an image.
            verbose: Log to stderr.
            **base_arguments: Further arguments of ``llama_cpp.Llama``, at their defaults: nothing here would use them.

        Raises:
            ValueError: An argument out of range, a missing file, or lazy layers that break the rules.
            TypeError: An unknown argument.
            QCacheError: A file that can't be loaded or doesn't fit; the subclass and the text say why.
        """
        self._arguments = {name: given for name, given in locals().items() if name not in ("self", "__class__")}
        self._arguments.update(self._arguments.pop("base_arguments"))
        _check_base_arguments(base_arguments)
        for name, path in (("model_path", model_path), ("mmproj_path", mmproj_path)):
            if path is not None and not os.path.isfile(path):
                raise ValueError(f"{name}: there is no file {os.fspath(path)!r}")
        if n_batch < 1 or n_ubatch < 1:
            raise ValueError(f"n_batch={n_batch} and n_ubatch={n_ubatch} must be positive")

        self.verbose = verbose
        set_verbose(verbose)
        self.model_path = os.fspath(model_path)
        self._stack = contextlib.ExitStack()
        try:
            self._load_weights(
                lazy_layers,
                lazy_mode,
                n_gpu_layers,
                main_gpu,
                n_ctx=n_ctx,
                n_ubatch=min(n_batch, n_ubatch),
                n_seq_max=n_seq_max,
                n_threads=n_threads or 0,
                n_threads_batch=n_threads_batch or 0,
                type_k="f16" if type_k is None else type_k,
                type_v="f16" if type_v is None else type_v,
                kv_bytes_max=kv_bytes_max,
                block_tokens=block_tokens,
                attn_impl=attn_impl,
                score_cache=score_cache,
                v_skip=v_skip,
            )
            self._load_vocabulary(tokenizer)
            self._n_ctx = self._context.n_ctx
            self._n_vocab = self._model.n_vocab()
            if self._n_vocab != self._native_model.info.n_vocab:
                raise ModelError(
                    f"{self.model_path!r}: the tokenizer has {self._n_vocab} tokens, the output layer "
                    f"{self._native_model.info.n_vocab} rows"
                )
            self.n_batch = min(self._n_ctx, n_batch)
            self.n_threads = n_threads or _n_cores()
            self.n_threads_batch = n_threads_batch or _n_cores()
            self._vision: Optional[Vision] = None
            if mmproj_path is not None:
                self._vision = Vision(
                    os.fspath(mmproj_path),
                    self._model.model,
                    model_path=self.model_path,
                    n_embd=self._native_model.info.n_embd,
                    n_threads=self.n_threads_batch,
                    use_gpu=n_gpu_layers != 0,
                    verbose=verbose,
                )
                self._stack.callback(self._vision.close)
            self._init_state(seed, logits_all, last_n_tokens_size, spm_infill)
            loader = ImageLoader(allow_http, max_image_bytes, max_image_pixels) if mmproj_path is not None else None
            self._init_chat(chat_format, chat_handler, loader)
        except BaseException:
            self.close()
            raise
        if verbose:
            print(f"{self.model_path}: {self.device_report()}", file=sys.stderr)

    def _load_weights(
        self, lazy_layers: Any, lazy_mode: Optional[str], n_gpu_layers: int, main_gpu: int, **context_arguments: Any
    ) -> None:
        """Loads the model and makes its context."""
        self._native_model = native.Model(self.model_path, n_gpu_layers=n_gpu_layers, main_gpu=main_gpu)
        self._stack.callback(self._native_model.close)
        mode, leaders = resolve_lazy(lazy_layers, lazy_mode, self._native_model.info)
        self._context = native.Context(self._native_model, lazy_mode=mode, lazy_leader=leaders, **context_arguments)
        self._stack.callback(self._context.close)
        self._ctx = BaseContext(self._context)
        self.lazy = LazyInfo(self._context.lazy_mode, self._context.lazy_leader)

    def _load_vocabulary(self, tokenizer: Optional[base.BaseLlamaTokenizer]) -> None:
        """Loads tokenizer and metadata through llama_cpp."""
        self._model, self.model_params = load_vocabulary(self.model_path, self.verbose)
        self._stack.callback(self._model.close)
        self.metadata = self._model.metadata()
        self._text_rules = TextRules(self.metadata, self._model.vocab)
        self.tokenizer_ = tokenizer or Tokenizer(self, self._text_rules)

    def _init_state(self, seed: int, logits_all: bool, last_n_tokens_size: int, spm_infill: bool) -> None:
        """Sets what the base's methods read while they generate."""
        self._seed = seed or llama_c.LLAMA_DEFAULT_SEED
        self._logits_all = logits_all
        self.last_n_tokens_size = last_n_tokens_size
        self.spm_infill = spm_infill
        self.cache: Optional[base.BaseLlamaCache] = None
        self.draft_model = None
        self._sampler: Optional[internals.LlamaSampler] = None
        self._candidates = Candidates(self._n_vocab)
        self._token_nl, self._token_eos = self.token_nl(), self.token_eos()
        self.n_tokens = 0
        self._requires_eval = True
        # ids of what is in the KV cache; negative ones stand for visual tokens
        self.input_ids: npt.NDArray[np.intc] = np.zeros(self._n_ctx, dtype=np.intc)
        # logits of every token, or of the last one alone
        self.scores: npt.NDArray[np.single] = np.zeros((self._n_ctx if logits_all else 1, self._n_vocab), dtype=np.single)
        self._scores_buffer = native.float_buffer(self.scores)
        # where the images of the current prompt are: first position, piece
        self._images: list[tuple[int, ImageChunk]] = []
        self._reset_timings()

    def _init_chat(self, chat_format: Optional[str], chat_handler: Any, loader: Optional[ImageLoader]) -> None:
        """Makes a chat handler of each template in the file, and picks the one to use."""
        self.chat_handler = chat_handler
        templates = {
            key.removeprefix("tokenizer."): template
            for key, template in self.metadata.items()
            if key.startswith("tokenizer.chat_template.")
        }
        default = self.metadata.get("tokenizer.chat_template") or (LLAVA_TEMPLATE if self._vision else None)
        if default is not None:
            templates["chat_template.default"] = default
        bos, eos = self.token_bos(), self.token_eos()
        self._chat_handlers = {
            name: llama_chat_format.chat_formatter_to_chat_completion_handler(
                ChatTemplate(
                    template,
                    bos_token=self._model.token_get_text(bos) if bos >= 0 else "",
                    eos_token=self._model.token_get_text(eos) if eos >= 0 else "",
                    eos_token_id=eos,
                    adds_bos=bos >= 0 and self._model.add_bos_token(),
                    loader=loader,
                )
            )
            for name, template in templates.items()
        }
        self.chat_format = chat_format
        if chat_format is None and chat_handler is None:
            self.chat_format = "chat_template.default" if default is not None else "llama-2"

    # what is loaded

    @property
    def ctx(self) -> Any:
        """The base's ``llama_context *``, which doesn't exist."""
        return self._ctx.ctx

    @property
    def context_params(self) -> Any:
        """The parameters of that context; neither exists."""
        return self._ctx.ctx

    @property
    def native_model(self) -> native.Model:
        """The loaded weights, for contexts of one's own; they close with this object."""
        return self._native_model

    @property
    def native_context(self) -> native.Context:
        """The KV cache and sequences; what is evaluated lies in sequence 0. It closes with this object."""
        return self._context

    def n_embd(self) -> int:
        """Width of the embeddings."""
        return self._native_model.info.n_embd

    def kv_cache_usage(self) -> dict[str, Any]:
        """What the KV cache holds now, sizes in bytes.

        Returns:
            ``bytes`` in use; ``bytes_if_full``, what the same tokens would take with every layer full; ``bytes_max``,
            the limit (0: none); ``blocks``, ``blocks_text``, ``blocks_visual``; ``block_tokens`` in a block;
            ``bytes_block_text``, ``bytes_block_visual``, ``bytes_block_full`` of one block; ``text_tokens``,
            ``visual_tokens``; ``lazy_layers`` and ``dropped_layers``, how many; ``lazy_mode``; ``v_rows`` that lazy layers
            came by with ``v_skip``, and ``v_rows_skipped`` of them, since the model was loaded.
        """
        usage = self._context.kv_usage()
        return {
            "bytes": usage["bytes"],
            "bytes_if_full": usage["bytes_if_full"],
            "bytes_max": usage["bytes_max"],
            "blocks": usage["n_blocks"],
            "blocks_text": usage["n_blocks_text"],
            "blocks_visual": usage["n_blocks_visual"],
            "block_tokens": usage["n_block_tokens"],
            "bytes_block_text": usage["bytes_block_text"],
            "bytes_block_visual": usage["bytes_block_visual"],
            "bytes_block_full": usage["bytes_block_full"],
            "text_tokens": usage["n_tokens_text"],
            "visual_tokens": usage["n_tokens_visual"],
            "lazy_layers": usage["n_lazy_layers"],
            "dropped_layers": usage["n_dropped_layers"],
            "v_rows": usage["n_v_rows"],
            "v_rows_skipped": usage["n_v_rows_skipped"],
            "lazy_mode": self.lazy.mode,
        }

    def device_report(self) -> dict[str, Any]:
        """Where weights, KV cache and attention are, and what attention runs on; sizes in bytes."""
        info = self._native_model.info
        n_cpu_layers = info.n_layer - info.n_gpu_layers
        parts = [f"CPU (layers 0-{n_cpu_layers - 1})"] if 0 < n_cpu_layers < info.n_layer else ["CPU"] if n_cpu_layers else []
        if info.gpu is not None:
            parts.append(f"{info.gpu} (layers {n_cpu_layers}-{info.n_layer - 1})" if n_cpu_layers else info.gpu)
        where = ", ".join(parts)
        return {
            "weights": where,
            "kv": where,
            "attention": f"{where}: {self._context.attn_name}",
            "gpu_layers": info.n_gpu_layers,
            "weight_bytes": info.n_bytes,
            "weight_bytes_repacked": info.n_bytes_extra,
            "weight_bytes_gpu": info.n_bytes_gpu,
            "vision": None if self._vision is None else "GPU where llama.cpp has one" if self._vision.use_gpu else "CPU",
        }

    def close(self) -> None:
        """Frees everything. Closing twice is fine; any other use afterwards is a ``ValueError``."""
        if self._stack is None:
            return
        stack, self._stack = self._stack, None
        self._sampler = None
        self._images = []
        stack.close()
        self._model = self._ctx = self.tokenizer_ = Closed(self.model_path)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # prompts

    def tokenize(self, text: Union[bytes, MediaPrompt], add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokenizes text, or a prompt with images that the chat template made.

        Args:
            text: UTF-8, or text and images.
            add_bos: Add BOS where the vocabulary wants it.
            special: Recognise special tokens; with images they always are.

        Returns:
            Token ids, negative ones for visual tokens.

        Raises:
            ValueError: An image can't be preprocessed, or the prompt has ``n_ctx`` tokens or more.
        """
        if not isinstance(text, MediaPrompt):
            return super().tokenize(text, add_bos, special)
        ids: list[int] = []
        images: list[tuple[int, ImageChunk]] = []
        parts = [
            self._text_rules.apply(part, at_start=i == 0) if isinstance(part, str) else part for i, part in enumerate(text.parts)
        ]
        for chunk in self._vision.tokenize(parts, add_bos):
            if isinstance(chunk, ImageChunk):
                images.append((len(ids), chunk))
                ids += chunk.ids.tolist()
            else:
                ids += chunk
        self._check_prompt(len(ids))
        self._images = images
        return ids

    @functools.wraps(base.Llama.create_chat_completion)
    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        if has_images(messages) and self.chat_handler is None and self.chat_format not in self._chat_handlers:
            raise ValueError(f"chat_format={self.chat_format!r} places no images: leave it out to use the chat template")
        return super().create_chat_completion(messages, *args, **kwargs)

    def _create_completion(self, prompt: Any, suffix: Optional[str] = None, **kwargs: Any) -> Iterator[Any]:
        """Checks a prompt at once, then completes it when the result is iterated."""
        if isinstance(prompt, str):
            n_tokens = len(self.tokenize(prompt.encode("utf-8"), True, suffix is None))
            if suffix is not None:  # with the tokens that mark prefix, suffix and middle
                n_tokens += 3 + len(self.tokenize(suffix.encode("utf-8"), False, False))
        else:
            n_tokens = len(prompt)
        self._check_prompt(n_tokens)
        return self._completion(super()._create_completion(prompt=prompt, suffix=suffix, **kwargs), self._images)

    def _completion(self, chunks: Iterator[Any], images: list[tuple[int, ImageChunk]]) -> Iterator[Any]:
        """Runs a completion with the images of its own prompt: another may have been tokenized since."""
        self._images = images
        try:
            yield from chunks
        finally:
            self._sampler = None  # a grammar or processors are not kept

    def _check_prompt(self, n_tokens: int) -> None:
        """Refuses a prompt that leaves no room for an answer, before anything is computed."""
        if n_tokens >= self._n_ctx:
            raise ValueError(f"the prompt of {n_tokens} tokens and an answer don't fit n_ctx={self._n_ctx}")

    # evaluation

    @functools.wraps(base.Llama.generate)
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        self._reset_timings()
        steps = super().generate(tokens, *args, **kwargs)
        watched = any(kwargs.get(name) is not None for name in ("logits_processor", "stopping_criteria"))
        if args or watched or self._logits_all or self.draft_model is not None:
            return steps  # each token is looked at in Python
        return self._generate(steps)

    def _generate(self, steps: Iterator[int]) -> Generator[int, Optional[Sequence[int]], None]:
        """Goes on from the first token of a generation of the base class, whose loop takes twice the time for each.

        Tokens that are sent follow the one just given.
        """
        token = next(steps)
        sampler = self._sampler
        generation = Generation(sampler, self._candidates, self._scores_buffer, self.input_ids)
        context, timings, clock = self._context, self.last_timings, time.perf_counter
        while True:
            more = yield token
            if more is not None:
                self.eval([token, *more])
                self._sampler = sampler
                token = self.sample()
                continue
            started, n_past = clock(), self.n_tokens
            if n_past >= self._n_ctx:
                raise self._no_room(1)
            self._requires_eval = True
            chosen = native.lib.generate_token(context.handle, generation.state, token, n_past)
            if chosen != NOT_APPENDED:
                self.n_tokens = n_past + 1
                self._requires_eval = False
                timings["decode_tokens"] += 1
                timings["decode_ms"] += 1e3 * (clock() - started)
            if chosen < 0:
                generation.fail(chosen)
            token = chosen

    def reset(self) -> None:
        """Forgets every token and frees the KV cache."""
        self.n_tokens = 0
        self._requires_eval = True
        self._context.clear()

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens to what has been evaluated.

        Args:
            tokens: Token ids; the negative ones that ``tokenize`` gave for the images of the current prompt.

        Raises:
            ValueError: More tokens than ``n_ctx`` leaves room for, or an id that is no token: nothing is evaluated.
            NoBlocksError: The KV cache reached ``kv_bytes_max``. What was evaluated before stays, and ``n_tokens``
                tells how much; so with the other subclasses of ``QCacheError``.
        """
        n_new = len(tokens)
        if self.n_tokens + n_new > self._n_ctx:
            raise self._no_room(n_new)
        timings = self.last_timings
        started, image_ms = time.perf_counter(), timings["image_ms"]
        if n_new == 1 and tokens[0] >= 0:
            self._eval_token(tokens[0])
        else:
            if self._context.seq_len() > self.n_tokens:
                self._context.seq_rm(0, self.n_tokens)
            if n_new == 0:
                return
            ids = np.asarray(tokens, dtype=np.int64)
            unknown = ids[ids >= self._n_vocab]
            if len(unknown) > 0:
                raise ValueError(f"token {unknown[0]} is out of range, the vocabulary has {self._n_vocab}")
            for first in range(0, n_new, self.n_batch):
                self._eval_batch(ids[first : first + self.n_batch].astype(np.int32))
        elapsed = 1e3 * (time.perf_counter() - started) - (timings["image_ms"] - image_ms)
        tokens_key, ms_key = ("decode_tokens", "decode_ms") if timings["prefill_tokens"] else ("prefill_tokens", "prefill_ms")
        timings[tokens_key] += n_new
        timings[ms_key] += elapsed

    def _no_room(self, n_new: int) -> ValueError:
        return ValueError(f"{self.n_tokens} + {n_new} tokens don't fit n_ctx={self._n_ctx}")

    def _eval_token(self, token: int) -> None:
        """Evaluates one text token; this is what a generated token costs."""
        self._requires_eval = True
        n_past = self.n_tokens
        self._context.next_token(token, n_past, self._scores_buffer, n_past if self._logits_all else 0)
        self.input_ids[n_past] = token
        self.n_tokens = n_past + 1
        self._requires_eval = False

    def _eval_batch(self, ids: npt.NDArray[np.int32]) -> None:
        """Evaluates text and visual tokens together."""
        n_past, n_new = self.n_tokens, len(ids)
        visual = ids < 0
        embeddings = self._visual_embeddings(ids, n_past) if visual.any() else None
        self._requires_eval = True
        self._context.decode(
            np.where(visual, -1, ids), embeddings, modality=visual, logits=1 if self._logits_all else None
        )
        if self._logits_all:
            for row in range(n_new):
                self._context.logits(row, self.scores[n_past + row])
        else:
            self._context.logits(-1, self.scores[0])
        self.input_ids[n_past : n_past + n_new] = ids
        self.n_tokens += n_new
        self._requires_eval = False

    def _visual_embeddings(self, ids: npt.NDArray[np.int32], n_past: int) -> npt.NDArray[np.float32]:
        """Encodes the images that lie in a batch.

        Returns:
            ``[n, n_embd]``; rows of text tokens hold anything.
        """
        started = time.perf_counter()
        rows = np.empty((len(ids), self._native_model.info.n_embd), dtype=np.float32)
        missing = ids < 0
        for start, chunk in self._images:
            first, last = max(start, n_past), min(start + chunk.n_tokens, n_past + len(ids))
            here, there = slice(first - n_past, last - n_past), slice(first - start, last - start)
            if first < last and np.array_equal(ids[here], chunk.ids[there]):
                rows[here] = self._vision.encode(chunk)[there]
                missing[here] = False
        if missing.any():
            raise ValueError(f"token {ids[missing][0]} is neither in the vocabulary nor of an image of this prompt")
        self.last_timings["image_ms"] += 1e3 * (time.perf_counter() - started)
        return rows

    def evaluated_rows(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """What is in the KV cache, as rows of the decoder; its images must be those of the current prompt.

        Returns:
            ``[n]`` token ids, negative ones for visual tokens; ``[n, n_embd]`` embeddings of visual tokens, where rows
            of other tokens hold anything.

        Raises:
            ValueError: A visual token of another prompt.
        """
        ids = self.input_ids[: self.n_tokens].astype(np.int32)
        return ids, self._visual_embeddings(ids, 0)

    def continuation_logits(self, n_past: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits before each token of a continuation of what was evaluated. Nothing is held afterwards, as after ``reset``.

        Args:
            n_past: Tokens of what was evaluated that come before the continuation; the last of them is one of text.
            tokens: ``[n]`` tokens of the continuation, at least one.

        Returns:
            ``[n, n_vocab]`` f32.

        Raises:
            ValueError: ``n_past`` out of range or after a visual token, or no tokens.
            QCacheError: The continuation doesn't fit.
        """
        if not 0 < n_past <= self.n_tokens or self.input_ids[n_past - 1] < 0 or not len(tokens):
            raise ValueError(
                f"{len(tokens)} tokens after {n_past} of {self.n_tokens}: there must be some, after a token of text that was evaluated"
            )
        self._context.seq_rm(0, n_past - 1)
        last = int(self.input_ids[n_past - 1])
        try:
            self._context.decode([last, *tokens[:-1]], logits=True)
            return np.stack([self._context.logits(row) for row in range(len(tokens))])
        finally:
            self.reset()

    def sample(self, *args: Any, idx: Optional[int] = None, **sampling: Any) -> int:
        """Samples a token from the logits of an evaluated one.

        Args:
            *args: Sampling parameters of ``llama_cpp.Llama.sample``, in its order.
            idx: Position of the token whose logits are used, with ``logits_all``; None: the last.
            **sampling: Sampling parameters by name.

        Raises:
            ValueError: Nothing was evaluated, or not since a state was loaded, or not so many tokens.
            QCacheError: The grammar allows no token that the vocabulary has.
        """
        if self._requires_eval:
            raise ValueError("there are no logits to sample from: evaluate a token first")
        started = time.perf_counter()
        sampler = self._sampler or self._init_sampler(*args, **sampling)
        row = 0
        if self._logits_all:
            row = self.n_tokens - 1 if idx is None else idx
            if not 0 <= row < self.n_tokens:
                raise ValueError(f"idx={idx} isn't the position of one of the {self.n_tokens} tokens evaluated")
        token = self._candidates.sample(sampler.sampler, self._scores_buffer, row)
        self.last_timings["decode_ms"] += 1e3 * (time.perf_counter() - started)
        return token

    def _reset_timings(self) -> None:
        """Starts the measurement of a generation.

        ``last_timings``: ``image_ms`` in the vision encoder, ``prefill_tokens`` and ``prefill_ms`` of the prompt as
        far as it wasn't in the KV cache, ``decode_tokens`` and ``decode_ms`` of the answer, samplers included.
        """
        self.last_timings: dict[str, float] = {
            "image_ms": 0.0,
            "prefill_tokens": 0,
            "prefill_ms": 0.0,
            "decode_tokens": 0,
            "decode_ms": 0.0,
        }

    # states

    def save_state(self) -> base.LlamaState:
        """Copies what has been evaluated."""
        data = self._context.state_get()
        return base.LlamaState(
            input_ids=self.input_ids[: self.n_tokens].copy(),
            scores=self._scores.copy(),
            n_tokens=self.n_tokens,
            llama_state=data,
            llama_state_size=len(data),
            seed=self._seed,
        )

    def load_state(self, state: base.LlamaState) -> None:
        """Continues from a saved state; a token has to be evaluated before one is sampled.

        Raises:
            ValueError: More tokens than ``n_ctx``.
            StateError: Damaged, or of another model or configuration. This object holds what it held.
        """
        if state.n_tokens > self._n_ctx:
            raise ValueError(f"the state has {state.n_tokens} tokens, more than n_ctx={self._n_ctx}")
        self._context.state_set(state.llama_state)
        self.n_tokens = state.n_tokens
        self.input_ids[: self.n_tokens] = state.input_ids[: self.n_tokens]
        rows = min(len(self.scores), len(state.scores))
        self.scores[:rows] = state.scores[:rows]
        self._requires_eval = True
        self._seed = state.seed

    def __getstate__(self) -> dict[str, Any]:
        return self._arguments

    # what the base can do and this can't

    def embed(self, *_args: Any, **_kwargs: Any) -> Any:
        """Not supported.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("ggml_qcache.Llama gives no text embeddings; use llama_cpp.Llama(embedding=True)")


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_base_arguments(arguments: dict[str, Any]) -> None:
    """Lets arguments of the base class pass at their defaults.

    Raises:
        TypeError: Not an argument of the base class either.
        ValueError: Another value than the default.
    """
    known = inspect.signature(base.Llama.__init__).parameters
    for name, given in arguments.items():
        if name not in known or known[name].kind is inspect.Parameter.VAR_KEYWORD:
            raise TypeError(f"Llama() got an unexpected keyword argument {name!r}")
        if given != known[name].default:
            raise ValueError(f"{name}={given!r} is not supported by ggml_qcache, only {known[name].default!r}")
