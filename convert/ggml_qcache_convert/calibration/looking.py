"""What every layer computes at the rows of a sample that are looked at.

The sample lies in the KV cache already, where the model has just answered it. Each row is computed once more, after its own past: a
sequence of its own that shares the sample's blocks. So a sample is prefilled once, not twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .samples import Sample

if TYPE_CHECKING:
    from ggml_qcache.native import Context

N_SEQ_MAX = 9  # sequences of a context to look with: rows computed at once, and the sample
LOOK_BLOCK_TOKENS = 16  # best for such a context: each of those rows has blocks of its own in every layer

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Looked:
    """What was seen.

    Attributes:
        below: By layer, ``[n_rows, n_head, n_keys]`` f16, how far a logit of the attention is below the largest of its row and head;
            -inf where a row doesn't see a key. So what weighs most is kept most exactly, in half of the bytes.
        most: By layer, ``[n_rows, n_head, 1]``, that largest logit.
        hidden: By layer, ``[n_rows, n_embd]`` residual stream after it.
        logits: ``[n_rows, n_vocab]``.
    """

    below: list[npt.NDArray[np.float16]]
    most: list[Array]
    hidden: list[Array]
    logits: Array

    def scores(self, layer: int) -> Array:
        """The logits of a layer's attention, ``[n_rows, n_head, n_keys]``."""
        return self.below[layer] + self.most[layer]


def look(context: Context, sample: Sample) -> Looked:
    """Computes the rows of a sample that sequence 0 of a context holds, with every layer full; sequence 0 stays as it is.

    Args:
        context: The context, of two sequences or more; what the others held goes.
        sample: The sample.

    Raises:
        ValueError: The context has room for one sequence only, or holds something else.
        QCacheError: The runtime failed.
    """
    if context.n_seq_max < 2 or context.seq_len() != len(sample.tokens):
        raise ValueError(
            f"calibration needs a context with the sample's {len(sample.tokens)} tokens and room for two sequences or more (n_seq_max), got one with "
            f"{context.seq_len()} tokens and n_seq_max={context.n_seq_max}"
        )
    info, n_rows = context.model.info, len(sample.rows)
    below = [np.full((n_rows, info.n_head, len(sample.tokens)), -np.inf, np.float16) for _ in range(info.n_layer)]
    most = [np.empty((n_rows, info.n_head, 1), np.float32) for _ in range(info.n_layer)]
    hidden = [np.empty((n_rows, info.n_embd), np.float32) for _ in range(info.n_layer)]
    logits = np.empty((n_rows, info.n_vocab), np.float32)
    n_at_once = min(N_SEQ_MAX, context.n_seq_max) - 1
    context.capture_start("scores", "hidden")
    try:
        for first in range(0, n_rows, n_at_once):
            rows = sample.rows[first : first + n_at_once]
            for i, row in enumerate(rows):
                context.seq_cp(0, i + 1, int(row))
            context.decode(
                sample.tokens[rows], sample.embeddings[rows], seq_id=np.arange(1, len(rows) + 1), modality=sample.visual[rows], logits=True
            )
            for i, row in enumerate(rows):
                context.logits(i, logits[first + i])
                for layer in range(info.n_layer):
                    scores = context.captured("scores", layer, i)
                    most[layer][first + i] = scores.max(-1, keepdims=True)
                    below[layer][first + i, :, : row + 1] = scores - most[layer][first + i]
                    hidden[layer][first + i] = context.captured("hidden", layer, i)
    finally:
        context.capture_stop()
        for i in range(1, n_at_once + 1):
            context.seq_rm(i, 0)
    return Looked(below, most, hidden, logits)
