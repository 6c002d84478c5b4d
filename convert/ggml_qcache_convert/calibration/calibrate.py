"""Measures a model on calibration samples and chooses its lazy layers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..errors import ConversionError
from ..halves import from_float32, to_float32
from ..lazy_keys import MODES
from ..lazy_layers import NO_ATTENTION, dropped_of, lazy_of, leaders_of
from .attention import js_divergence, length_keeping, log_softmax, sharing_errors, softmax
from .correct import LEAST_SAMPLES, Corrections, correct
from .looking import look
from .ondisk import OnDisk, Some
from .runner import Runner
from .samples import PROMPTS, Sample, choose_pairs, find_images, make_samples
from .select import by_cost, by_descent, by_divergence, by_threshold, neighbours

if TYPE_CHECKING:
    from ggml_qcache import Llama
    from ggml_qcache.native import Context

METRICS = ("js", "output", "loss")
MOST_ROUNDS = 4  # of all steps away from a plan, in plans tried: the gains of further steps are small, and there are many
N_CHECKED = 4  # samples that are computed once more with the plan: it takes as long as asking the model about them
_LENGTHS = 512  # dimensions that stand for the residual stream of wide models; over a sample's rows the error is a percent or so
_MOST_LAYERS = 1 << 16  # to read a specification before the model is there


@dataclass(frozen=True)
class CalibrationSettings:
    """How lazy layers are chosen and corrected.

    Attributes:
        images: A folder with images, or images as paths, URLs or anything else that ``Llama`` takes for one.
        metric: ``js``: the paper's divergence of neighbouring layers' attention. ``output``: the summed error that attention
            outputs make in the residual stream. ``loss``: the divergence of the final logits, measured plan by plan.
        mode: ``visual`` or ``global``.
        drop_attention: Let layers lose their attention where that is chosen, with ``output`` or ``loss``.
        layers: The lazy layers, numbers or a specification such as ``9-15,18,drop:20``; None: they are chosen.
        budget: Share of the KV bytes to save, 0 to 1, at the samples' share of visual tokens.
        threshold: Instead of a budget, with ``js``: the divergence in nats below which a layer is lazy.
        align_heads: Permute a lazy layer's heads to those of its leader.
        vis_bias: Add a bias to visual keys' logits in rows of text, with ``visual``.
        refit: Refit W_o of lazy layers, and W_v where it helps.
        n_samples: Image and prompt pairs.
        prompts: What is asked.
        n_answer: Longest answer in tokens.
        n_other_rows: Prompt rows looked at in a sample beside those of the answer, half of them visual.
        block_tokens: Tokens of a KV block, in which bytes are counted.
        seed: Seed of the choice of pairs and rows.
    """

    images: Path | Sequence[Any]
    metric: str = "js"
    mode: str = "visual"
    drop_attention: bool = False
    layers: str | Sequence[int] | None = None
    budget: float | None = 0.35
    threshold: float | None = None
    align_heads: bool = False
    vis_bias: bool = False
    refit: bool = False
    n_samples: int = 16
    prompts: Sequence[str] = PROMPTS
    n_answer: int = 32
    n_other_rows: int = 32
    block_tokens: int = 32
    seed: int = 0

    @property
    def corrections(self) -> list[str]:
        """The corrections asked for, in the order they are made."""
        return [name for name in ("align_heads", "vis_bias", "refit") if getattr(self, name)]

    @property
    def corrects(self) -> bool:
        """Whether lazy layers are corrected."""
        return bool(self.corrections)

    def leaders(self, n_layer: int) -> list[int]:
        """The leaders of the layers that were given.

        Raises:
            ValueError: The specification is malformed or names a layer that the model hasn't.
        """
        return leaders_of(self.layers or (), n_layer)

    def check(self) -> None:
        """Refuses what makes no sense.

        Raises:
            ValueError: It names the setting.
        """
        if self.metric not in METRICS:
            raise ValueError(f"lazy_metric {self.metric!r} isn't one of {', '.join(METRICS)}")
        if self.mode not in MODES:
            raise ValueError(f"lazy_mode {self.mode!r} isn't one of {', '.join(MODES)}")
        if self.vis_bias and self.mode != "visual":
            raise ValueError(f"a bias on visual keys goes with lazy_mode visual, got {self.mode!r}")
        if self.layers is not None and not lazy_of(self.leaders(_MOST_LAYERS)):
            raise ValueError("there are no lazy layers to correct")
        if self.drop_attention and self.layers is not None:
            raise ValueError(f"drop_attention chooses layers, and these are given: {self.layers}")
        if self.drop_attention and self.metric == "js":
            raise ValueError(
                "lazy_metric js compares the attention of two layers and can't tell what none costs: drop_attention goes with output or loss"
            )
        if self.layers is None and (self.budget is None) == (self.threshold is None):
            raise ValueError("a budget or a threshold chooses how many layers are lazy: give one of them")
        if self.threshold is not None and (self.metric != "js" or not 0 < self.threshold < math.inf):
            raise ValueError(f"a threshold goes with the metric js and is positive, got {self.threshold} with {self.metric}")
        if self.budget is not None and not 0 < self.budget < 1:
            raise ValueError(f"lazy_budget {self.budget} isn't a share between 0 and 1")
        for name in ("n_samples", "n_answer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} isn't positive")
        if self.refit and self.n_samples < LEAST_SAMPLES:
            raise ValueError(f"a refit needs {LEAST_SAMPLES} samples or more, every other one to check it on, got n_samples {self.n_samples}")
        if not self.prompts:
            raise ValueError("there are no calibration prompts")


@dataclass(frozen=True)
class Measured:
    """What the samples showed.

    Attributes:
        samples: The samples.
        pair_divergence: ``[n_layer, n_layer]`` nats, Jensen-Shannon, the last row's attention in one layer against another's,
            mean over heads and samples.
        output_error: ``[n_layer, n_layer]``, ``[j, l]``: relative squared error of the residual stream after layer l's
            attention with leader j, mean over rows and samples.
        drop_error: ``[n_layer]``, the same without layer l's attention.
        log_probs: By sample, ``[n answer rows, n_vocab]`` log-probabilities of the untouched model.
        n_answer_rows: By sample, known without reading ``log_probs``.
    """

    samples: Sequence[Sample]
    pair_divergence: npt.NDArray[np.float64]
    output_error: npt.NDArray[np.float64]
    drop_error: npt.NDArray[np.float64]
    log_probs: Sequence[npt.NDArray[np.float32]]
    n_answer_rows: Sequence[int]

    @property
    def js_divergence(self) -> npt.NDArray[np.float64]:
        """``[n_layer]``, each layer's divergence from the one before; 0 for layer 0."""
        return np.concatenate([[0.0], np.diagonal(self.pair_divergence, 1)])

    def part(self, numbers: Sequence[int]) -> "Measured":
        """With some of the samples only; the means stay those of all."""
        samples, log_probs, n_rows = (Some(of_all, numbers) for of_all in (self.samples, self.log_probs, self.n_answer_rows))
        return replace(self, samples=samples, log_probs=log_probs, n_answer_rows=n_rows)

    def errors_of(self, leaders: Sequence[int]) -> npt.NDArray[np.float64]:
        """``[n_layer]``: what a lazy layer's leader or a dropped layer's lack of attention costs; 0 for a full layer."""
        at = np.arange(len(leaders))
        shared = self.output_error[np.asarray(leaders), at]  # 0 on the diagonal
        return np.where(np.asarray(leaders) == NO_ATTENTION, self.drop_error, shared)

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples, visual ones included."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def visual_share(self) -> float:
        """Visual tokens of all tokens."""
        return sum(int(sample.visual.sum()) for sample in self.samples) / self.n_tokens


@dataclass(frozen=True)
class Calibration:
    """The chosen layers, and what is known about the choice.

    Attributes:
        leaders: ``[n_layer]``.
        settings: What was asked for.
        measured: What it rests on.
        kv_saved: Share of KV bytes saved on the samples, counted in blocks.
        logits_kl: KL divergence of the final logits from the untouched model's, nats; mean over the answer rows of the first
            ``N_CHECKED`` samples.
        threshold: With ``js``, the divergence in nats below which layers are lazy.
        corrections: What was corrected, or None.
        uncorrected_kl: ``logits_kl`` without the corrections.
    """

    leaders: list[int]
    settings: CalibrationSettings
    measured: Measured = field(repr=False)
    kv_saved: float
    logits_kl: float
    threshold: float | None
    corrections: Corrections | None
    uncorrected_kl: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """Tells of corrections that did harm."""
        if self.logits_kl <= self.uncorrected_kl:
            return ()
        return (
            f"{', '.join(self.settings.corrections)} raised the KL divergence of the logits from {self.uncorrected_kl:.4f} to "
            f"{self.logits_kl:.4f}: compare with a file without by qcache eval",
        )


def measure(llm: "Llama", settings: CalibrationSettings, progress: bool = False, n_threads: int = 0) -> Measured:
    """Runs the samples through the untouched model.

    Args:
        llm: The model with its mmproj, loaded with ``lazy_layers="none"`` and ``n_seq_max`` of 2 or more, best ``N_SEQ_MAX``
            (and ``LOOK_BLOCK_TOKENS``).
        settings: What to run.
        progress: Show a progress bar on stderr.
        n_threads: Threads to compute with, 0: all cores.

    Raises:
        ConversionError: No images.
        QCacheError: The runtime failed.
    """
    settings.check()
    images = find_images(settings.images) if isinstance(settings.images, Path) else list(settings.images)
    if not images:
        raise ConversionError("there are no calibration images")
    pairs = choose_pairs(images, settings.prompts, settings.n_samples, settings.seed)
    made = make_samples(llm, pairs, settings.n_answer, settings.n_other_rows, settings.seed)
    runner = Runner(llm, settings.mode, n_threads)
    return measure_samples(runner, llm.native_context, made, len(pairs), settings, progress)


def measure_samples(
    runner: Runner, context: "Context", made: Iterable[Sample], n_samples: int, settings: CalibrationSettings, progress: bool = False
) -> Measured:
    """``measure`` on ``n_samples`` samples that come one by one, each in sequence 0 of the context when it comes."""
    n_layer, weights = runner.n_layer, runner.weights
    samples: OnDisk[Sample] = OnDisk()
    log_probs: OnDisk[npt.NDArray[np.float32]] = OnDisk()
    n_answer_rows: list[int] = []
    divergence, errors, dropped = np.zeros((n_layer, n_layer)), np.zeros((n_layer, n_layer)), np.zeros(n_layer)
    # every pair of layers is compared: with W_o itself that would take longer than running the samples
    shorter = length_keeping(context.model.info.n_embd, _LENGTHS, settings.seed)
    projections = []
    for name in (f"blk.{layer}.attn_output" for layer in range(n_layer)):
        bias = shorter @ weights[f"{name}.bias"] if f"{name}.bias" in weights else 0.0
        projections.append((*_packed(shorter @ weights[f"{name}.weight"]), bias))

    def projection(layer: int) -> tuple[Any, Any]:
        packed, scale, bias = projections[layer]
        return to_float32(packed, "F16") * scale, bias

    for sample in tqdm(made, total=n_samples, desc="calibrating", unit="sample", disable=not progress):
        looked = look(context, sample)
        last = [softmax(looked.scores(layer)[-1]) for layer in range(n_layer)]
        for layer in range(1, n_layer):
            divergence[layer, :layer] += [js_divergence(p, last[layer]).mean() for p in last[:layer]]
        found = sharing_errors(
            looked.scores,
            context.seq_v,
            projection,
            lambda layer: (runner.inputs(sample) if layer == 0 else looked.hidden[layer - 1]) @ shorter.T,
            sample.visual[sample.rows],
            sample.visual,
            settings.mode,
            n_layer,
        )
        errors, dropped = errors + found[0], dropped + found[1]
        log_probs.append(log_softmax(looked.logits[sample.answer_rows]))
        n_answer_rows.append(int(sample.answer_rows.sum()))
        samples.append(sample)
        del looked, last  # else the next sample's come beside them
    divergence += divergence.T
    return Measured(samples, divergence / len(samples), errors / len(samples), dropped / len(samples), log_probs, n_answer_rows)


def _packed(matrix: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], np.float32]:
    """A matrix as f16 and what to multiply it by: those of all layers of a 7B model take 130 MB, not 270."""
    scale = np.maximum(np.abs(matrix).max(), np.finfo(np.float32).tiny)
    return from_float32(matrix / scale, "F16"), scale


def calibrate(
    llm: "Llama",
    settings: CalibrationSettings,
    measured: Measured | None = None,
    progress: bool = False,
    n_threads: int = 0,
) -> Calibration:
    """Chooses the lazy layers of a model and corrects them.

    Args:
        llm: The model with its mmproj, loaded with ``lazy_layers="none"``.
        settings: What to run and how to choose.
        measured: What ``measure`` gave for the same images, prompts and mode; None: it is measured now.
        progress: Show progress bars on stderr.
        n_threads: Threads to compute with, 0: all cores.

    Raises:
        ConversionError: No images, or a budget that even the most lazy layers don't meet: it tells what they save.
        ValueError: A setting is invalid.
        QCacheError: The runtime failed.
    """
    measured = measured or measure(llm, settings, progress, n_threads)
    runner = Runner(llm, settings.mode, n_threads, settings.block_tokens)
    divergence = measured.js_divergence
    threshold = settings.threshold
    if settings.layers is not None:
        leaders, threshold = settings.leaders(runner.n_layer), None
    elif threshold is not None:
        leaders = by_threshold(divergence, threshold)
    else:
        budget = _Budget(runner, settings, measured)
        if settings.metric == "js":
            leaders = by_divergence(divergence, budget.n_lazy())
            threshold = float(np.nextafter(max(divergence[layer] for layer in lazy_of(leaders)), 1))
        elif settings.metric == "output":
            leaders = min(_by_output(settings, measured, budget), key=lambda plan: measured.errors_of(plan).sum())
        else:
            leaders = _by_loss(runner, settings, measured, budget, progress)
    kv_saved = runner.kv_saved(leaders, measured.samples)
    checked = measured.part(range(min(N_CHECKED, len(measured.samples))))
    kl = uncorrected_kl = runner.kl(leaders, checked)
    corrections = None
    if settings.corrects:
        corrections = correct(
            llm, leaders, measured.samples, settings.mode, progress=progress, n_threads=n_threads,
            **dict.fromkeys(settings.corrections, True),
        )  # fmt: skip
        with runner.weights.replaced(llm.native_model, corrections.weights):
            kl = runner.kl(leaders, checked, vis_bias=corrections.vis_bias)
    return Calibration(leaders, settings, measured, kv_saved, kl, threshold, corrections, uncorrected_kl)


class _Budget:
    """What lazy and dropped layers save on the samples; which layers they are doesn't matter for bytes."""

    def __init__(self, runner: Runner, settings: CalibrationSettings, measured: Measured) -> None:
        assert settings.budget is not None
        n_layer, samples = runner.n_layer, measured.samples
        self._share, self._n_layer = settings.budget, n_layer
        self._dropped, self._full = runner.kv_bytes(leaders_of((), n_layer, [n_layer - 1]), samples)
        self._lazy = runner.kv_bytes(leaders_of([n_layer - 1], n_layer), samples)[0] if n_layer > 1 else 0
        self._unmet = (
            f"lazy_budget {settings.budget} can't be met: in {settings.mode} mode {n_layer - 1} of {n_layer} lazy layers save "
            f"{(n_layer - 1) * self._lazy / self._full:.3f} of the KV bytes, with {measured.visual_share:.0%} of the calibration tokens visual"
        )

    def met(self, n_lazy: int, n_dropped: int = 0) -> bool:
        """Whether so many layers save enough."""
        return (n_lazy * self._lazy + n_dropped * self._dropped) / self._full >= self._share

    def n_lazy(self) -> int:
        """The least number of lazy layers that save enough alone.

        Raises:
            ConversionError: There is none.
        """
        n_lazy = next((n for n in range(1, self._n_layer) if self.met(n)), None)
        if n_lazy is None:
            raise ConversionError(self._unmet)
        return n_lazy


def _by_output(settings: CalibrationSettings, measured: Measured, budget: _Budget) -> list[list[int]]:
    """The plan with the least summed error for each number of dropped layers that can meet the budget, from none on."""
    if not settings.drop_attention:
        budget.n_lazy()  # tells what can't be met
    plans = by_cost(measured.output_error, measured.drop_error if settings.drop_attention else None)
    best: dict[int, list[int]] = {}
    for (n_lazy, n_dropped), plan in sorted(plans.items()):
        # of plans that cost the same, the one with the fewest lazy layers
        if budget.met(n_lazy, n_dropped) and (
            n_dropped not in best or measured.errors_of(plan).sum() < measured.errors_of(best[n_dropped]).sum()
        ):
            best[n_dropped] = plan
    return [best[n_dropped] for n_dropped in sorted(best)]


def _by_loss(
    runner: Runner, settings: CalibrationSettings, measured: Measured, budget: _Budget, progress: bool
) -> list[int]:
    """Descends from the best of the other metrics' plans; each step is measured on the final logits.

    One sample in four only checks the steps that the others would take.
    """
    starts = _by_output(settings, measured, budget)
    if not settings.drop_attention:
        starts.append(by_divergence(measured.js_divergence, budget.n_lazy()))
    start, least, added = starts[0], math.inf, [0.0] * len(measured.samples)
    for plan in starts:
        by_sample = runner.kl_by_sample(plan, measured, least)
        if (kl := sum(by_sample)) < least:
            start, least, added = plan, kl, by_sample
    # one round of steps; further rounds follow only after an improvement
    n_steps = sum(1 for _ in neighbours(start, settings.drop_attention))
    # the samples that suffer most come first: a worse plan shows itself there
    numbers = sorted(range(len(measured.samples)), key=added.__getitem__, reverse=True)
    used, others = ([i for i in numbers if (i % 4 == 1) == other] for other in (False, True))
    with tqdm(total=1 + n_steps, desc="trying plans", unit="plan", disable=not progress) as bar:

        def loss(leaders: Sequence[int], to_beat: float) -> float:
            value = runner.kl(leaders, measured.part(used), to_beat)
            bar.total = max(bar.total, bar.n + 1)
            bar.update()
            return value

        def allowed(leaders: Sequence[int]) -> bool:
            return budget.met(len(lazy_of(leaders)), len(dropped_of(leaders)))

        def check(leaders: Sequence[int], to_beat: float) -> float:
            return runner.kl(leaders, measured.part(others), to_beat)

        most_tried = MOST_ROUNDS * n_steps
        return by_descent(start, loss, allowed, settings.drop_attention, check if others else None, most_tried)[0]
