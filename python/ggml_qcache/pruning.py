"""Visual tokens pruned after the first layers (FastV, arXiv 2403.06764), alone or together with lazy layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ggml_qcache_convert.lazy_layers import NO_ATTENTION

from .native import TEXT, Context, Model


class PrunedContext:
    """Two contexts, one for the layers that see every token and one for those that see what is left of an image.

    After ``layer`` layers the visual tokens to which the last token of the prompt attends most, on average over heads, stay;
    the others reach no later layer and have no K and V there. What stays keeps its position.
    """

    def __init__(self, model: Model, layer: int, keep: float, **params: Any) -> None:
        """Creates the contexts.

        Args:
            model: The model.
            layer: Layers that see every token, 1 to ``n_layer - 1``.
            keep: Share of a prompt's visual tokens that stay, 0 to 1; at least one does.
            **params: As for ``Context``. Lazy layers must have their leader on the same side of ``layer``, and the layer before
                ``layer`` must have attention.

        Raises:
            ValueError: ``layer`` or ``keep`` out of range, or what ``Context`` refuses.
            QCacheError: As ``Context``.
        """
        n_layer = model.info.n_layer
        if not 1 <= layer < n_layer:
            raise ValueError(f"layer={layer}: tokens are pruned after 1 to {n_layer - 1} layers")
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} isn't a share above 0 and up to 1")
        self.layer, self.keep = layer, keep
        self._n_prompt: dict[int, int] = {}
        self._front = Context(model, n_layers=layer, **params)
        try:
            if self._front.lazy_leader[layer - 1] == NO_ATTENTION:
                raise ValueError(f"layer={layer}: layer {layer - 1} has no attention by which tokens could be pruned")
            self._back = Context(model, layer_first=layer, **params)
        except BaseException:
            self._front.close()
            raise

    def close(self) -> None:
        """Frees both. Closing twice is fine."""
        self._front.close()
        self._back.close()

    def __enter__(self) -> PrunedContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def prefill(
        self,
        tokens: npt.ArrayLike,
        embeddings: npt.NDArray[np.float32] | None,
        visual: npt.NDArray[np.bool_],
        seq_id: int = 0,
    ) -> npt.NDArray[np.int64]:
        """Computes a prompt; the logits of its last row are kept.

        Args:
            tokens: ``[n]``, -1 for rows of ``embeddings``.
            embeddings: ``[n, n_embd]`` f32, or None.
            visual: ``[n]``.
            seq_id: The sequence, which must be empty.

        Returns:
            The rows that stayed, ascending.

        Raises:
            ValueError: The sequence holds tokens, or shapes don't belong together.
            QCacheError: As ``Context.decode``; the sequence is empty then.
        """
        if self._front.seq_len(seq_id) != 0:
            raise ValueError(f"sequence {seq_id} holds {self._front.seq_len(seq_id)} tokens: a prompt is pruned as a whole")
        try:
            self._front.capture_start("hidden", "probs")
            self._front.decode(tokens, embeddings, seq_id=seq_id, modality=visual, logits=True)
            hidden = self._hidden(len(visual))
            attention = self._front.captured("probs", self.layer - 1, len(visual) - 1).mean(0)
            candidates = np.flatnonzero(visual)
            n_kept = max(1, round(self.keep * len(candidates)))
            best = candidates[np.argsort(-attention[candidates], kind="stable")[:n_kept]]
            kept = np.sort(np.concatenate([np.flatnonzero(~visual), best]))
            self._back.decode(None, hidden[kept], seq_id=seq_id, modality=visual[kept], pos=kept)
            self._n_prompt[seq_id] = len(visual)
        except BaseException:
            for context in (self._front, self._back):
                context.seq_rm(seq_id, 0)
            raise
        return kept

    def decode(self, tokens: Sequence[int], seq_id: Sequence[int]) -> None:
        """Appends tokens of text, each to the end of its sequence; the logits of all are kept.

        Raises:
            QCacheError: As ``Context.decode``; nothing was appended.
        """
        before = {seq: self._front.seq_len(seq) for seq in seq_id}
        pos = [before[seq] + list(seq_id[:i]).count(seq) for i, seq in enumerate(seq_id)]
        self._front.capture_start("hidden")
        self._front.decode(tokens, seq_id=seq_id, logits=True)
        try:
            self._back.decode(None, self._hidden(len(tokens)), seq_id=seq_id, modality=TEXT, pos=pos, logits=True)
        except BaseException:
            for seq, n in before.items():
                self._front.seq_rm(seq, n)
            raise

    def logits(self, row: int = -1) -> npt.NDArray[np.float32]:
        """Copies the logits of a row of the last batch, ``[n_vocab]`` f32; after ``prefill`` the last."""
        return self._back.logits(row)

    def seq_rm(self, seq_id: int, n_tokens: int) -> None:
        """Removes the tokens of a sequence from position ``n_tokens`` on, which came after its prompt.

        Raises:
            ValueError: ``n_tokens`` lies within the prompt.
        """
        if n_tokens < self._n_prompt.get(seq_id, 0):
            raise ValueError(f"n_tokens={n_tokens} lies within the prompt of {self._n_prompt[seq_id]} tokens, which was pruned as a whole")
        removed = max(0, self._front.seq_len(seq_id) - n_tokens)
        self._front.seq_rm(seq_id, n_tokens)
        self._back.seq_rm(seq_id, self._back.seq_len(seq_id) - removed)

    def clear(self) -> None:
        """Removes every sequence."""
        self._n_prompt.clear()
        self._front.clear()
        self._back.clear()

    def kv_usage(self) -> dict[str, int]:
        """Bytes that the KV caches of both hold, ``bytes``."""
        return {"bytes": self._front.kv_usage()["bytes"] + self._back.kv_usage()["bytes"]}

    def _hidden(self, n_rows: int) -> npt.NDArray[np.float32]:
        return np.stack([self._front.captured("hidden", self.layer - 1, row) for row in range(n_rows)])
