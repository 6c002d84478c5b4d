"""Runs plans of lazy layers on samples."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .attention import kl_divergence, log_softmax
from .samples import Sample
from .weights import Weights

if TYPE_CHECKING:
    from ggml_qcache import Llama

    from .calibrate import Measured


class Runner:
    """Runs plans of lazy layers on samples, on an already loaded model."""

    def __init__(self, llm: "Llama", mode: str, n_threads: int = 0, block_tokens: int = 32) -> None:
        """Takes the model of a ``Llama``; KV bytes are counted in blocks of ``block_tokens`` tokens."""
        from ggml_qcache.native import Context

        self._context_class = Context
        self._model = llm.native_model
        self.weights = Weights.of(llm.native_model)
        self._mode = mode
        self._n_threads = n_threads
        self._block_tokens = block_tokens
        self.n_layer: int = self._model.info.n_layer

    def context(self, leaders: Sequence[int] | None, vis_bias: npt.NDArray[np.float32] | None = None, **params: Any) -> Any:
        """A new context with these leaders; None: every layer full. Other parameters as ``Context``."""
        lazy: dict[str, Any] = {"lazy_mode": "off"}
        if leaders is not None:
            lazy = {"lazy_mode": self._mode, "lazy_leader": leaders, "vis_bias": vis_bias}
        return self._context_class(self._model, n_threads=self._n_threads, n_threads_batch=self._n_threads, **lazy, **params)

    def decode(self, context: Any, sample: Sample, rows: npt.NDArray[np.int64]) -> None:
        """Computes a sample from its start and keeps the logits of some rows."""
        context.clear()
        wanted = np.isin(np.arange(len(sample.tokens)), rows)
        context.decode(sample.tokens, sample.embeddings, modality=sample.visual, logits=wanted)

    def inputs(self, sample: Sample) -> npt.NDArray[np.float32]:
        """The rows that are looked at as they enter layer 0, ``[n rows, n_embd]``."""
        tokens, embeddings = sample.tokens[sample.rows], sample.embeddings[sample.rows]
        return np.where(tokens[:, None] < 0, embeddings, self.weights.rows("token_embd.weight", np.maximum(tokens, 0)))

    def answer_log_probs(self, context: Any, sample: Sample) -> npt.NDArray[np.float32]:
        """Log-probabilities ``[n answer rows, n_vocab]`` of a sample that was just decoded."""
        return log_softmax(np.stack([context.logits(int(row)) for row in sample.rows[sample.answer_rows]]))

    def kl(
        self,
        leaders: Sequence[int],
        measured: "Measured",
        to_beat: float = math.inf,
        vis_bias: npt.NDArray[np.float32] | None = None,
    ) -> float:
        """Mean KL divergence over answer rows, nats; stops above ``to_beat``, where the value is a lower bound."""
        return float(sum(self.kl_by_sample(leaders, measured, to_beat, vis_bias)))

    def kl_by_sample(
        self,
        leaders: Sequence[int],
        measured: "Measured",
        to_beat: float = math.inf,
        vis_bias: npt.NDArray[np.float32] | None = None,
    ) -> list[float]:
        """What each sample adds to ``kl``; those after ``to_beat`` is reached are left out."""
        n_rows = sum(measured.n_answer_rows)
        added: list[float] = []
        with self.context(leaders, vis_bias) as context:
            for sample, log_p in zip(measured.samples, measured.log_probs, strict=True):
                self.decode(context, sample, sample.rows[sample.answer_rows])
                added.append(float(kl_divergence(log_p, self.answer_log_probs(context, sample)).sum()) / n_rows)
                if sum(added) >= to_beat:
                    break
        return added

    def kv_bytes(self, leaders: Sequence[int], samples: Sequence[Sample]) -> tuple[int, int]:
        """KV bytes that a plan saves on samples, and those of a full cache, counted in the blocks that each of them fills."""
        with self.context(leaders, block_tokens=self._block_tokens) as context:
            usage = context.kv_usage()
        kept = full = 0
        for sample in samples:
            for first, last in _runs(sample.visual):
                n_blocks = -(-(last - first) // self._block_tokens)
                kept += n_blocks * usage["bytes_block_visual" if sample.visual[first] else "bytes_block_text"]
                full += n_blocks * usage["bytes_block_full"]
        return full - kept, full

    def kv_saved(self, leaders: Sequence[int], samples: Sequence[Sample]) -> float:
        """Share of KV bytes that a plan saves on samples."""
        saved, full = self.kv_bytes(leaders, samples)
        return saved / full


def _runs(visual: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs of one modality, as first row and row after the last."""
    edges = [0, *(np.flatnonzero(np.diff(visual.astype(np.int8))) + 1).tolist(), len(visual)]
    return list(zip(edges, edges[1:]))
