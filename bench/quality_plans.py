"""What bench_quality compares: lazy layers, dropped ones and both mixed, with and without corrections, and what else saves KV bytes."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ggml_qcache import Llama
from ggml_qcache_convert.calibration import CalibrationSettings, Measured, calibrate, measure
from ggml_qcache_convert.calibration.runner import Runner
from ggml_qcache_convert.calibration.correct import correct
from ggml_qcache_convert.lazy_layers import leaders_of
from quality_runs import BLOCK_TOKENS, Plan
from scenes import TASKS, ask, make_scene, render

CALIBRATION_SEED = 2_000_000  # training scenes far from any that a training run reaches
CORRECTIONS = ("align_heads", "vis_bias", "refit")
PRUNED_AFTER = 2  # layers, as in FastV


class Calibrator:
    """Measures the model on training scenes and makes plans of what it saw.

    Layers that rows of an earlier run name for the same method, mode and budget aren't chosen again, and corrected plans that
    have a row there come without weights.
    """

    def __init__(self, llm: Llama, folder: Path, n_samples: int, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        prompts = []
        for seed in range(CALIBRATION_SEED, CALIBRATION_SEED + n_samples):
            scene = make_scene(seed)
            render(scene).save(folder / f"scene-{seed}.png")
            rng = random.Random(seed)
            prompts += [pair[0] for pair in (ask(scene, task, rng) for task in TASKS) if pair]
        self._llm, self._earlier = llm, earlier
        # as often as they are asked: of all different questions, hardly one is for a caption
        self._kept = {"images": folder, "n_samples": n_samples, "prompts": sorted(prompts), "n_answer": 96, "block_tokens": BLOCK_TOKENS}
        self._measured: dict[str, Measured] = {}
        self.n_layer: int = llm.native_model.info.n_layer

    def settings(self, metric: str, mode: str, budget: float, drops: bool = False) -> CalibrationSettings:
        """How layers are chosen."""
        return CalibrationSettings(metric=metric, mode=mode, budget=budget, drop_attention=drops, **self._kept)

    def measured(self, mode: str) -> Measured:
        """The measurements, made once a mode."""
        if mode not in self._measured:
            self._measured[mode] = measure(self._llm, self.settings("js", mode, 0.2), progress=True)
        return self._measured[mode]

    def _row(self, method: str, mode: str, budget: float | None) -> Mapping[str, Any] | None:
        """The row of an earlier run."""
        return next((row for row in self._earlier if (row["method"], row["mode"], row["budget"]) == (method, mode, budget)), None)

    def lazy(self, metric: str, mode: str, budget: float, drops: bool = False) -> Plan:
        """Lazy layers, and with ``drops`` layers without attention, chosen by a metric."""
        started = time.monotonic()
        method = f"mixed, {metric}" if drops else metric
        if (row := self._row(method, mode, budget)) is not None:
            return Plan(method, mode, row["leaders"], budget=budget, seconds=row["seconds_to_choose"])
        leaders = calibrate(self._llm, self.settings(metric, mode, budget, drops), self.measured(mode), progress=True).leaders
        return Plan(method, mode, leaders, budget=budget, seconds=time.monotonic() - started)

    def corrected(self, plan: Plan, wanted: Sequence[str]) -> Plan:
        """A plan with some of its corrections."""
        started = time.monotonic()
        assert plan.leaders is not None
        method = f"{plan.method} + {'all' if len(wanted) > 1 else wanted[0]}"
        if self._row(method, plan.mode, plan.budget) is not None:
            return replace(plan, method=method)
        samples = self.measured(plan.mode).samples
        made = correct(self._llm, plan.leaders, samples, plan.mode, progress=True, **dict.fromkeys(wanted, True))
        seconds = plan.seconds + time.monotonic() - started
        return replace(
            plan, method=method, weights=made.weights, vis_bias=made.vis_bias, refit_step=made.refit_step, seconds=seconds
        )

    def dropped(self, budget: float) -> Plan:
        """As many layers without attention as the budget takes, those whose loss alone changes the logits least."""
        started = time.monotonic()
        method = "attention dropped"
        if (row := self._row(method, "off", budget)) is not None:
            return Plan(method, leaders=row["leaders"], budget=budget, seconds=row["seconds_to_choose"])
        chosen = np.argsort(self._drop_costs)[: int(np.ceil(budget * self.n_layer))].tolist()
        return Plan(method, leaders=leaders_of((), self.n_layer, chosen), budget=budget, seconds=time.monotonic() - started)

    @cached_property
    def _drop_costs(self) -> list[float]:
        """KL divergence of the logits without each layer's attention."""
        runner, measured = Runner(self._llm, "visual"), self.measured("visual")
        return [runner.kl(leaders_of((), self.n_layer, [layer]), measured) for layer in range(self.n_layer)]

    def prune(self, budget: float) -> tuple[int, float] | None:
        """Layers that see every token, and share of an image's tokens to keep after them; None: the budget can't be met so."""
        gone = budget / self.visual_share() * self.n_layer / (self.n_layer - PRUNED_AFTER)
        return (PRUNED_AFTER, 1 - gone) if gone < 1 else None

    def most_saved(self, mode: str) -> float:
        """Share of the KV bytes that is saved with every layer lazy that can be."""
        runner = Runner(self._llm, mode, block_tokens=BLOCK_TOKENS)
        return runner.kv_saved(leaders_of(range(1, self.n_layer), self.n_layer), self.measured(mode).samples)

    def visual_share(self) -> float:
        """Visual tokens of all tokens of the samples."""
        return self.measured("visual").visual_share

    def n_visual(self) -> int:
        """Visual tokens of a picture."""
        return int(self.measured("visual").samples[0].visual.sum())

    def random(self, mode: str, n_lazy: int, draw: int) -> Plan:
        """Layers drawn at random."""
        chosen = random.Random(f"random:{mode}:{n_lazy}:{draw}").sample(range(1, self.n_layer), n_lazy)
        return Plan("random", mode, leaders_of(chosen, self.n_layer))


def corrections(mode: str, controls: Sequence[str]) -> list[list[str]]:
    """The sets of corrections to try, all together the last: with ``corrections`` each alone before."""
    wanted = [name for name in CORRECTIONS if mode == "visual" or name != "vis_bias"]
    alone = [[name] for name in wanted] if "corrections" in controls else []
    return [*alone, wanted] if alone or "corrected" in controls else []


def make_plans(
    llm: Llama,
    modes: Sequence[str],
    metrics: Sequence[str],
    budgets: Sequence[float],
    mixed_budgets: Sequence[float],
    controls: Sequence[str],
    n_samples: int,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Plan]:
    """The rows of the table after the untouched model's.

    Args:
        llm: The model, with every layer full.
        modes: Lazy modes.
        metrics: What chooses the layers; the last one's choice is corrected too, and so is the paper's, in all ways at once.
        budgets: Shares of the KV bytes to save with lazy layers; those that a mode can't reach are left out there.
        mixed_budgets: Likewise where layers may also lose their attention, by those of the metrics that can tell what that costs.
        controls: Of ``corrections``, ``corrected``, ``random``, ``dropped``, ``pruned``, ``scaled``, ``quantised``.
        n_samples: Training scenes to choose on.
        earlier: Rows of an earlier run to go on with.
    """
    if "quantised" in controls:
        for kv_type in ("q8_0", "q4_0"):
            yield Plan(kv_type, kv_type=kv_type)
    with tempfile.TemporaryDirectory() as folder:
        calibrator = Calibrator(llm, Path(folder), n_samples, earlier)
        if "dropped" in controls:
            for budget in sorted({*budgets, *mixed_budgets}):
                yield calibrator.dropped(budget)
        for budget in budgets:
            if "pruned" in controls and (prune := calibrator.prune(budget)) is not None:
                yield Plan("pruned", prune=prune)
            share = budget / calibrator.visual_share()
            if "scaled" in controls and share < 1:
                yield Plan("scaled", side=int((calibrator.n_visual() * (1 - share)) ** 0.5))
        for mode in modes:
            most = calibrator.most_saved(mode)
            for budget in (budget for budget in budgets if budget <= most):
                best = None
                for metric in metrics:
                    best = calibrator.lazy(metric, mode, budget)
                    yield best
                    if metric == "js" != metrics[-1]:
                        for names in corrections(mode, controls)[-1:]:
                            yield calibrator.corrected(best, names)
                if best is None:
                    continue
                if "random" in controls:
                    yield calibrator.random(mode, len(best.lazy_layers), 0)
                for names in corrections(mode, controls):
                    yield calibrator.corrected(best, names)
                # half of the budget pruned
                if "pruned" in controls and mode == "visual" and (prune := calibrator.prune(budget / 2)) is not None:
                    kept = leaders_of([layer for layer in best.lazy_layers if layer > PRUNED_AFTER], calibrator.n_layer)
                    yield Plan(f"{best.method} + pruned", mode, kept, prune=prune)
        for mode in modes:
            for budget in mixed_budgets:
                best = None
                for metric in (metric for metric in metrics if metric != "js"):
                    best = calibrator.lazy(metric, mode, budget, drops=True)
                    yield best
                for names in corrections(mode, controls)[-1:]:
                    if best is not None and best.lazy_layers:
                        yield calibrator.corrected(best, names)
