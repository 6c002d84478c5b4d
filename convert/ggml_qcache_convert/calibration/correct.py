"""Brings lazy layers nearer to what they were: heads aligned with the leader's, a bias on visual keys, W_o and W_v refitted.

The layers are corrected from the first to the last, each on the inputs that it will see once those before it are lazy and
corrected. One Lazy Block is computed at a time, on the residual streams that entered it: all blocks together cost a few
prefills of the samples, whatever the depth of the model.

A refit lowers the residual stream's error, and may change the answers for the worse all the same: what the fits to few samples
get wrong adds up from layer to layer. How far all refitted weights go from what they were is decided in the end, by the divergence
of the logits on samples held out (mini-LLaVA, divergence on 1,000 other scenes: 0.0046 nats without a refit and 0.0032 so in visual mode,
where it was 0.0064 all the way; 0.0058 and 0.0024 in global mode).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from ..lazy_layers import lazy_of
from .attention import kl_divergence, shared_scores, softmax
from .refit import Ridge, ValueRidge, is_held_out, main_directions
from .runner import Runner
from .samples import Sample
from .weights import Weights

if TYPE_CHECKING:
    from ggml_qcache import Llama

Array = npt.NDArray[np.float32]

LARGEST_BIAS = 10.0  # of a visual key's logit, either way
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way to the refitted weights
LEAST_SAMPLES = 4  # for a refit
LEAST_KL = 1e-6  # nats over a sample's answer: what rounding makes
MOST_FEATURES = 4096  # of all heads together, to refit W_v on; their Gram matrix is kept in memory


@dataclass(frozen=True)
class LayerError:
    """Relative squared error of the residual stream after a lazy layer's attention, as each correction left it.

    None where a correction wasn't made. ``refitted`` is with W_o refitted, all the way, ``revalued`` with W_v as well; the two are
    the same where that didn't help.
    """

    layer: int
    shared: float
    aligned: float | None = None
    biased: float | None = None
    refitted: float | None = None
    revalued: float | None = None

    @property
    def last(self) -> float:
        """The error in the end."""
        return next(error for error in (self.revalued, self.refitted, self.biased, self.aligned, self.shared) if error is not None)


@dataclass(frozen=True)
class Corrections:
    """What makes lazy layers err less.

    Attributes:
        weights: New f32 values by GGUF name, in numpy's order of dimensions.
        vis_bias: ``[n_layer, n_head]`` f32, what is added to the logits of visual keys in rows of text; None: nothing.
        errors: By lazy layer.
        refit_step: How far refitted weights go from what they were, 0 to 1; None without a refit.
    """

    weights: dict[str, Array] = field(default_factory=dict)
    vis_bias: Array | None = None
    errors: list[LayerError] = field(default_factory=list)
    refit_step: float | None = None


class Streams:
    """Runs a few layers of the model on the samples."""

    def __init__(self, runner: Runner, samples: Sequence[Sample]) -> None:
        self._runner = runner
        self._n_ctx = max(len(sample.tokens) for sample in samples)

    def context(self, first: int, last: int, leaders: Sequence[int] | None = None, vis_bias: Array | None = None) -> Any:
        """A context of layers ``first`` to ``last``; every layer full without leaders."""
        return self._runner.context(leaders, vis_bias, n_ctx=self._n_ctx, layer_first=first, n_layers=last - first + 1)

    @staticmethod
    def run(context: Any, sample: Sample, stream: Array | None, rows: npt.NDArray[np.int64] | None, *what: str) -> None:
        """Computes a sample from its start.

        Args:
            context: The layers.
            sample: Tokens and modality.
            stream: ``[n, n_embd]`` residual stream before the first of the layers; None: the sample's own rows.
            rows: Rows to capture at; None: all.
            *what: What to capture.
        """
        context.clear()
        context.capture_start(*what)
        wanted: Any = True if rows is None else np.isin(np.arange(len(sample.tokens)), rows)
        tokens, embeddings = (sample.tokens, sample.embeddings) if stream is None else (None, stream)
        context.decode(tokens, embeddings, modality=sample.visual, logits=wanted)

    @staticmethod
    def captured(context: Any, what: str, layer: int, n_rows: int) -> Array:
        """``[n_rows, n]`` of a layer that was captured at all rows."""
        return np.stack([context.captured(what, layer, row).ravel() for row in range(n_rows)])


def scores_of(context: Any, layer: int, sample: Sample) -> Array:
    """``[n rows, n_head, n_keys]`` logits of a layer at the sample's rows, -inf where a row doesn't see a key."""
    first = context.captured("scores", layer, int(sample.rows[0]))
    out = np.full((len(sample.rows), len(first), len(sample.tokens)), -np.inf, dtype=np.float32)
    for i, row in enumerate(sample.rows):
        out[i, :, : row + 1] = context.captured("scores", layer, int(row))
    return out


def head_order(cost: npt.NDArray[np.float64], n_head_kv: int) -> npt.NDArray[np.int64]:
    """Which head goes where, so that the cost is least and heads that share a key stay together.

    Args:
        cost: ``[n_head, n_head]``: ``[h, place]``, what head h costs in a place.
        n_head_kv: Number of keys.

    Returns:
        ``[n_head]``: the head that comes to each place.
    """
    n_group = len(cost) // n_head_kv
    blocks = cost.reshape(n_head_kv, n_group, n_head_kv, n_group).transpose(0, 2, 1, 3)
    inner = [[linear_sum_assignment(block)[1] for block in row] for row in blocks]
    totals = np.array([[blocks[g, to][np.arange(n_group), inner[g][to]].sum() for to in range(n_head_kv)] for g in range(n_head_kv)])
    order = np.empty(len(cost), dtype=np.int64)
    for g, to in zip(*linear_sum_assignment(totals)):
        order[to * n_group + inner[g][to]] = g * n_group + np.arange(n_group)
    return order


def matching_bias(
    scores: Sequence[Array], visual: Sequence[npt.NDArray[np.bool_]], wanted: Sequence[Array]
) -> npt.NDArray[np.float64]:
    """What to add to the logits of visual keys so that the mean visual attention mass is the wanted one.

    Args:
        scores: By sample, ``[n_rows, n_head, n_keys]`` of rows of text.
        visual: By sample, ``[n_keys]``.
        wanted: By sample, ``[n_rows, n_head]`` mass in the untouched layer.

    Returns:
        ``[n_head]``, at most ``LARGEST_BIAS`` either way.
    """
    # the mass of a row is that of a logistic function: only the gap between the two log-sum-exps counts
    gaps = []
    for s, is_visual in zip(scores, visual):
        kinds = [s[..., is_visual], s[..., ~is_visual]]
        peaks = [kind.max(-1) for kind in kinds]
        sums = [np.log(np.exp(kind - peak[..., None]).sum(-1)) + peak for kind, peak in zip(kinds, peaks)]
        gaps.append(sums[0] - sums[1])
    gap = np.concatenate(gaps).astype(np.float64)
    goal = np.concatenate(list(wanted)).mean(0, dtype=np.float64)
    low, high = np.full(len(goal), -LARGEST_BIAS), np.full(len(goal), LARGEST_BIAS)
    for _ in range(50):
        middle = (low + high) / 2
        too_little = (1 / (1 + np.exp(-(gap + middle)))).mean(0) < goal
        low, high = np.where(too_little, middle, low), np.where(too_little, high, middle)
    return (low + high) / 2


def log_divergences(untouched: Sequence[Array], corrected: Sequence[Array]) -> npt.NDArray[np.float64]:
    """How far answers are from the untouched model's: ``[n_samples]``, logarithms of the KL divergence in nats.

    Samples lie six orders of magnitude apart: a plain mean is that of the worst one or two, and they tell little of others.

    Args:
        untouched: By sample, log-probabilities ``[n answer rows, n_vocab]``.
        corrected: Likewise.
    """
    by_sample = [float(kl_divergence(p, q).sum()) for p, q in zip(untouched, corrected, strict=True)]
    return np.log(np.maximum(by_sample, 0) + LEAST_KL)


def shortest_of_the_best(losses: npt.NDArray[np.float64]) -> int:
    """The first choice that can't be told from the best: the one-standard-error rule (Breiman et al. 1984), with paired differences.

    Other images differ from the samples more than samples do among themselves, and the less is changed the less can go wrong there.

    Args:
        losses: ``[n_choices, n_samples]``, from the least change to the largest.
    """
    behind = losses - losses[losses.mean(-1).argmin()]
    error = behind.std(-1, ddof=1) / np.sqrt(losses.shape[-1])
    return int(np.flatnonzero(behind.mean(-1) <= error)[0])


class _Corrector:
    """Corrects layer by layer; ``weights`` and ``vis_bias`` grow."""

    def __init__(self, llm: "Llama", leaders: Sequence[int], samples: Sequence[Sample], mode: str, n_threads: int) -> None:
        info = llm.native_model.info
        self.model, self.n_head, self.n_head_kv, self.head_dim = llm.native_model, info.n_head, info.n_head_kv, info.head_dim
        self.leaders, self.samples, self.mode = list(leaders), samples, mode
        self.file = Weights.of(llm.native_model)
        self.runner = Runner(llm, mode, n_threads)
        self.streams = Streams(self.runner, samples)
        self.weights: dict[str, Array] = {}
        self.before_refit: dict[str, Array | None] = {}  # None: as in the file, where it is read again
        self.vis_bias = np.zeros((info.n_layer, info.n_head), dtype=np.float32)
        self.untouched: list[Array] | None = None  # residual streams before the block, by sample; None: layer 0
        self.lazy: list[Array] | None = None
        # of the current block, by layer and sample
        self.targets: dict[int, list[Array]] = {}
        self.scores: dict[int, list[Array]] = {}
        self.values: dict[int, list[Array]] = {}

    def weight(self, layer: int, name: str) -> Array:
        """The weight in force."""
        name = f"blk.{layer}.{name}"
        return self.weights[name] if name in self.weights else self.file[name]

    def set_weight(self, layer: int, name: str, values: Array) -> None:
        """Puts a weight in force, rounded to its type."""
        name = f"blk.{layer}.{name}"
        self._put(name, self.file.rounded(name, values))

    def set_refitted(self, layer: int, name: str, values: Array) -> None:
        """``set_weight``, remembering what the weight was."""
        self.before_refit[f"blk.{layer}.{name}"] = self.weights.get(f"blk.{layer}.{name}")
        self.set_weight(layer, name, values)

    def undo(self, weights: dict[str, Array]) -> None:
        """Puts the weights of an earlier time in force: ``weights`` as they were then."""
        for name, values in self.weights.items():
            if values is not weights.get(name):
                self.model.set_weight(name, weights[name] if name in weights else self.file[name])
        self.weights = weights

    def output_bias(self, layer: int) -> Array | float:
        """W_o's bias, 0 where there is none."""
        name = f"blk.{layer}.attn_output.bias"
        return self.file[name] if name in self.file else 0.0

    def measure_block(self, first: int, last: int, with_scores: bool) -> None:
        """The untouched block: where the residual stream ought to go, and what attention its lazy layers had."""
        self.targets, self.scores, self.values = {}, {}, {}
        lazy = [layer for layer in lazy_of(self.leaders) if first <= layer <= last]
        out = []
        with self.streams.context(first, last) as context:
            for i, sample in enumerate(self.samples):
                stream = None if self.untouched is None else self.untouched[i]
                if with_scores and lazy:
                    self.streams.run(context, sample, stream, sample.rows, "scores")
                    for layer in (first, *lazy):
                        self.scores.setdefault(layer, []).append(scores_of(context, layer, sample))
                        self.values.setdefault(layer, []).append(context.seq_v(layer))
                self.streams.run(context, sample, stream, None, "attn", "hidden")
                n = len(sample.tokens)
                for layer in lazy:
                    before = self.streams.captured(context, "hidden", layer - 1, n)
                    attn = self.streams.captured(context, "attn", layer, n)
                    after = before + attn @ self.file[f"blk.{layer}.attn_output.weight"].T + self.output_bias(layer)
                    self.targets.setdefault(layer, []).append(after)
                out.append(self.streams.captured(context, "hidden", last, n))
        self.untouched = out

    def lazy_runs(self, first: int, last: int, *what: str, looked_at: bool = False) -> Iterator[tuple[Sample, Any]]:
        """Takes the lazy residual streams through some layers, as corrected so far.

        Args:
            first, last: The layers.
            *what: What to capture.
            looked_at: At the samples' rows alone; else at all.

        Yields:
            Each sample, and the context that has just computed it.
        """
        with self.streams.context(first, last, self.leaders, self.vis_bias) as context:
            for i, sample in enumerate(self.samples):
                self.streams.run(context, sample, None if self.lazy is None else self.lazy[i], sample.rows if looked_at else None, *what)
                yield sample, context

    def pass_block(self, first: int, last: int) -> None:
        """Takes the lazy residual streams through the corrected block."""
        runs = self.lazy_runs(first, last, "hidden")
        self.lazy = [self.streams.captured(context, "hidden", last, len(sample.tokens)) for sample, context in runs]

    def rows(self, layer: int) -> Iterator[tuple[Array, Array, Array, npt.NDArray[np.float64]]]:
        """By sample: the lazy layer's attention output, the residual stream that it adds to, what it leaves undone, and how much
        each row counts.
        """
        w_o = self.weight(layer, "attn_output.weight")
        runs = self.lazy_runs(self.leaders[layer], layer, "attn", "hidden")
        for (sample, context), target in zip(runs, self.targets[layer], strict=True):
            n = len(sample.tokens)
            attn = self.streams.captured(context, "attn", layer, n)
            before = self.streams.captured(context, "hidden", layer - 1, n)
            # the next norm divides by the row's size: relative errors count
            weights = 1 / np.maximum(np.sum(target.astype(np.float64) ** 2, -1), np.finfo(np.float32).tiny)
            yield attn, before, target - before - attn @ w_o.T - self.output_bias(layer), weights

    def residuals(self, layer: int, fits: bool) -> tuple[float, Ridge | None]:
        """What the lazy layer's attention leaves undone: the mean squared error, and with ``fits`` the sums that a refit needs."""
        n_out, n_in = self.weight(layer, "attn_output.weight").shape
        ridge = Ridge(n_in, n_out) if fits else None
        power, n_rows = 0.0, 0
        for attn, _, left, weights in self.rows(layer):
            power += float(np.sum(left**2 * weights[:, None]))
            n_rows += len(left)
            if ridge is not None:
                ridge.add(attn, left, weights)
        return power / n_rows, ridge

    def value_features(self, layer: int, directions: Array) -> list[Array]:
        """By sample, ``[n, n_head, n_directions]``: the layer's inputs along directions ``[n_directions, n_embd]``, under its attention.

        The layer computes them itself, with the directions in the place of W_v: its attention is never laid out.
        """
        name, parts = f"blk.{layer}.attn_v", []
        bias = 0.0 if f"{name}.bias" not in self.file else np.repeat(
            self.weight(layer, "attn_v.bias").reshape(self.n_head_kv, self.head_dim), self.n_head // self.n_head_kv, axis=0
        )
        try:
            for first in range(0, len(directions), self.head_dim):
                chunk = np.zeros((self.head_dim, directions.shape[1]), np.float32)
                chunk[: len(directions) - first] = directions[first : first + self.head_dim]
                self.model.set_weight(f"{name}.weight", np.tile(chunk, (self.n_head_kv, 1)))
                shape = (-1, self.n_head, self.head_dim)
                runs = self.lazy_runs(self.leaders[layer], layer, "attn")
                parts.append([
                    self.streams.captured(context, "attn", layer, len(sample.tokens)).reshape(shape) - bias for sample, context in runs
                ])  # fmt: skip
        finally:
            self.model.set_weight(f"{name}.weight", self.weight(layer, "attn_v.weight"))
        return [np.concatenate(features, axis=-1)[..., : len(directions)] for features in zip(*parts)]

    def align(self, layer: int) -> None:
        """Moves each head to the place where the leader's attention serves it best."""
        leader = self.leaders[layer]
        w_o = self.weight(layer, "attn_output.weight").reshape(-1, self.n_head, self.head_dim)
        cost = np.zeros((self.n_head, self.n_head))
        for sample, own, of_leader, v in zip(self.samples, self.scores[layer], self.scores[leader], self.values[layer]):
            row_visual = sample.visual[sample.rows]
            for h in range(self.n_head):
                values = v[h // (self.n_head // self.n_head_kv)]
                mine = own[:, h : h + 1]
                expected = softmax(mine) @ values
                shared = softmax(shared_scores(of_leader, mine, row_visual, sample.visual, self.mode)) @ values
                # |W_o (a - b)|^2 with W_o's Gram matrix
                gram = w_o[:, h].T @ w_o[:, h]
                error = shared - expected
                cost[h] += np.einsum("rpd,de,rpe->p", error, gram, error)
        order = head_order(cost, self.n_head_kv)
        if np.array_equal(order, np.arange(self.n_head)):
            return
        groups = order[:: self.n_head // self.n_head_kv] // (self.n_head // self.n_head_kv)
        for name, heads in (("attn_q", order), ("attn_k", groups), ("attn_v", groups)):
            for suffix in ("weight", "bias"):
                if f"blk.{layer}.{name}.{suffix}" in self.file:
                    values = self.weight(layer, f"{name}.{suffix}")
                    by_head = values.reshape(len(heads), self.head_dim, -1)
                    self.set_weight(layer, f"{name}.{suffix}", by_head[heads].reshape(values.shape))
        self.set_weight(layer, "attn_output.weight", np.ascontiguousarray(w_o[:, order].reshape(len(w_o), -1)))
        self.scores[layer] = [s[:, order] for s in self.scores[layer]]

    def bias(self, layer: int) -> None:
        """Matches the visual attention mass of the untouched layer."""
        scores, visual, wanted = [], [], []
        runs = self.lazy_runs(self.leaders[layer], layer, "scores", looked_at=True)
        for (sample, context), own in zip(runs, self.scores[layer], strict=True):
            seen = np.logical_or.accumulate(sample.visual)[sample.rows]  # before an image there is nothing to match
            text = ~sample.visual[sample.rows] & seen
            if text.any():
                scores.append(scores_of(context, layer, sample)[text])
                visual.append(sample.visual)
                wanted.append(softmax(own[text])[..., sample.visual].sum(-1))
        if scores:
            self.vis_bias[layer] = matching_bias(scores, visual, wanted)

    def refit(self, layer: int, ridge: Ridge) -> None:
        """W_o by ridge regression, pulled to what it was; kept when it helps, rounding included."""
        w_o = self.weight(layer, "attn_output.weight")
        rounded = self.file.rounded(f"blk.{layer}.attn_output.weight", (w_o + ridge.solve().T).astype(np.float32))
        if ridge.error((rounded - w_o).T.astype(np.float64)) < ridge.error():
            self.set_refitted(layer, "attn_output.weight", rounded)

    def refit_values(self, layer: int) -> tuple[float, float]:
        """W_v likewise, with W_o as it is now; kept when samples that it wasn't fitted to say so, and rounding leaves a gain.

        Returns:
            The mean squared error before and after.
        """
        name = f"blk.{layer}.attn_v.weight"
        inputs, lefts, weights = zip(*((before, left, w) for _, before, left, w in self.rows(layer)))
        error = sum(float(np.sum(left**2 * w[:, None])) for left, w in zip(lefts, weights)) / sum(map(len, lefts))
        n_most = max(MOST_FEATURES // (self.n_head * self.head_dim), 1) * self.head_dim
        directions = self.file.rounded(name, main_directions(inputs, self.file[f"blk.{layer}.attn_norm.weight"], n_most))
        del inputs
        ridge = ValueRidge(self.weight(layer, "attn_output.weight"), self.n_head, self.n_head_kv, len(directions))
        for features, left, w in zip(self.value_features(layer, directions), lefts, weights):
            ridge.add(features, left, w)
        change = ridge.solve()
        if change is None:
            return error, error
        old, before = self.weight(layer, "attn_v.weight"), dict(self.weights)
        self.set_refitted(layer, "attn_v.weight", old + (change.reshape(len(old), -1) @ directions).astype(np.float32))
        after, _ = self.residuals(layer, False)
        if after < error:
            return error, after
        self.undo(before)
        del self.before_refit[name]
        return error, error

    def answers(self, leaders: Sequence[int] | None) -> list[Array]:
        """By sample held out, log-probabilities of its answer ``[n answer rows, n_vocab]`` with the weights in force."""
        vis_bias = None if leaders is None else self.vis_bias
        found = []
        with self.runner.context(leaders, vis_bias, n_ctx=max(len(sample.tokens) for sample in self.samples)) as context:
            for sample in (sample for i, sample in enumerate(self.samples) if is_held_out(i)):
                self.runner.decode(context, sample, sample.rows[sample.answer_rows])
                found.append(self.runner.answer_log_probs(context, sample))
        return found

    def go_part_of_the_way(self, progress: bool) -> float:
        """Has refitted weights go as far from what they were as the logits of the samples held out gain; returns how far, 0 to 1."""
        if not self.before_refit:
            return 0.0
        corrected = self.weights
        self.undo({})
        untouched = self.answers(None)
        self.weights = corrected
        for name, values in corrected.items():
            self.model.set_weight(name, values)

        def at(name: str, step: float) -> Array:
            before = self.before_refit[name]
            was = self.file[name] if before is None else before
            return self.file.rounded(name, was + np.float32(step) * (self.weights[name] - was)) if step else was

        def losses(step: float) -> npt.NDArray[np.float64]:
            for name in self.before_refit:
                self.model.set_weight(name, at(name, step))
            return log_divergences(untouched, self.answers(self.leaders))

        tried = tqdm(STEPS, desc="how far to refit", disable=not progress)
        best = STEPS[shortest_of_the_best(np.stack([losses(step) for step in tried]))]
        for name, before in self.before_refit.items():
            self._put(name, at(name, best))
            if best == 0 and before is None:
                del self.weights[name]
        return best

    def _put(self, name: str, values: Array) -> None:
        self.model.set_weight(name, values)
        self.weights[name] = values


def correct(
    llm: "Llama",
    leaders: Sequence[int],
    samples: Sequence[Sample],
    mode: str,
    *,
    align_heads: bool = False,
    vis_bias: bool = False,
    refit: bool = False,
    progress: bool = False,
    n_threads: int = 0,
) -> Corrections:
    """Corrects the lazy layers of a plan; the model itself is left as it was.

    Args:
        llm: The model, loaded with ``lazy_layers="none"``.
        leaders: ``[n_layer]``.
        samples: What it is measured on.
        mode: ``visual`` or ``global``.
        align_heads: Permute a lazy layer's heads, so that each gets the leader's attention that serves it best; kept when it helps.
        vis_bias: Match each head's mean attention mass on visual keys in rows of text; ``visual`` mode only.
        refit: Refit W_o to the residual stream of the untouched model, then W_v where that helps; all of them go as far from what they
            were as the logits gain.
        progress: Show a progress bar on stderr.
        n_threads: Threads to compute with, 0: all cores.

    Raises:
        ValueError: A bias in ``global`` mode, where rows of text have no logits of their own to balance; or too few samples
            for a refit.
        QCacheError: The runtime failed.
    """
    if vis_bias and mode != "visual":
        raise ValueError(f"a bias on visual keys goes with lazy_mode visual, got {mode!r}")
    if refit and len(samples) < LEAST_SAMPLES:
        raise ValueError(f"a refit needs {LEAST_SAMPLES} samples or more, every other one to check it on, got {len(samples)}")
    corrector = _Corrector(llm, leaders, samples, mode, n_threads)
    errors: list[LayerError] = []
    lazy = lazy_of(leaders)
    # a block begins with a full layer, but the first one with layer 0 even where that is dropped
    starts = sorted({0} | {layer for layer, leader in enumerate(leaders) if leader == layer})
    try:
        with tqdm(total=len(lazy), desc="correcting", unit="layer", disable=not progress) as bar:
            for first, end in zip(starts, [*starts[1:], len(leaders)]):
                corrector.measure_block(first, end - 1, with_scores=align_heads or vis_bias)
                for layer in (layer for layer in lazy if first < layer < end):
                    errors.append(_correct_layer(corrector, layer, align_heads, vis_bias, refit))
                    bar.update()
                corrector.pass_block(first, end - 1)
        step = corrector.go_part_of_the_way(progress) if refit else None
        weights = corrector.weights
    finally:
        corrector.undo({})
    return Corrections(weights, corrector.vis_bias if vis_bias else None, errors, step)


def _correct_layer(corrector: _Corrector, layer: int, align_heads: bool, vis_bias: bool, refit: bool) -> LayerError:
    """Makes the corrections asked for; the error is measured after each."""
    found: dict[str, float] = {}
    found["shared"], ridge = corrector.residuals(layer, refit and not align_heads and not vis_bias)
    if align_heads:
        before = dict(corrector.weights), corrector.scores[layer]
        corrector.align(layer)
        found["aligned"], ridge = corrector.residuals(layer, refit and not vis_bias)
        if found["aligned"] > found["shared"]:
            corrector.undo(before[0])
            corrector.scores[layer] = before[1]
            found["aligned"], ridge = corrector.residuals(layer, refit and not vis_bias)
    if vis_bias:
        corrector.bias(layer)
        found["biased"], ridge = corrector.residuals(layer, refit)
    if ridge is not None:
        corrector.refit(layer, ridge)
        found["refitted"], found["revalued"] = corrector.refit_values(layer)
    return LayerError(layer, **found)
