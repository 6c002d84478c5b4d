"""Corrections of lazy layers: the pieces against brute force and NumPy, the whole on a tiny model, and what is written."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_helpers import rewrite_gguf
from gguf import GGUFReader
from test_calibration import keys_of
from tiny_llava import N_LAYER, load, picture, tiny_llava

from ggml_qcache import Llama
from ggml_qcache.cli import main as inspect_main
from ggml_qcache.inspection import inspect_file
from ggml_qcache_convert import leaders_of
from ggml_qcache_convert.calibration import CalibrationSettings, calibrate, measure
from ggml_qcache_convert.calibration.attention import softmax
from ggml_qcache_convert.calibration.calibrate import N_CHECKED
from ggml_qcache_convert.calibration.runner import Runner
from ggml_qcache_convert.calibration.correct import (
    LARGEST_BIAS, LEAST_KL, Corrections, correct, head_order, log_divergences, matching_bias, shortest_of_the_best,
)  # fmt: skip
from ggml_qcache_convert.calibration.refit import Ridge, ValueRidge, conjugate_gradients, main_directions
from ggml_qcache_convert.calibration.weights import Weights
from ggml_qcache_convert.cli import main
from ggml_qcache_convert.make_lazy import make_lazy

LEADERS = leaders_of([1, 3, 4, 5, 7], N_LAYER)
SETTINGS = {"images": [picture(seed) for seed in range(6)], "n_samples": 6, "n_answer": 8, "n_other_rows": 16, "budget": 0.05}
ALL = {"visual": ("align_heads", "vis_bias", "refit"), "global": ("align_heads", "refit")}


@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 4), (4, 2), (6, 2), (6, 3), (5, 1)])
def test_head_order_finds_what_brute_force_finds(n_head: int, n_head_kv: int) -> None:
    n_group = n_head // n_head_kv
    for seed in range(5):
        cost = np.random.default_rng(seed).random((n_head, n_head))
        totals = []
        for order in itertools.permutations(range(n_head)):
            groups = np.array(order).reshape(n_head_kv, n_group) // n_group
            if (groups == groups[:, :1]).all():  # heads that share a key stay together
                totals.append(sum(cost[h, place] for place, h in enumerate(order)))
        order = head_order(cost, n_head_kv)
        assert sorted(order) == list(range(n_head))
        assert (order.reshape(n_head_kv, n_group) // n_group == order[::n_group, None] // n_group).all()
        assert cost[order, np.arange(n_head)].sum() == pytest.approx(min(totals))


def test_bias_gives_the_wanted_mass() -> None:
    rng = np.random.default_rng(2)
    visual = [np.arange(20) % 3 > 0, np.arange(14) > 3]
    scores = [rng.normal(size=(n_rows, 3, len(is_visual))).astype(np.float32) for n_rows, is_visual in zip((4, 7), visual)]
    for s in scores:
        s[:, :, -2:] = -np.inf  # keys that a row doesn't see
    wanted = [rng.uniform(0.2, 0.9, s.shape[:2]) for s in scores]
    bias = matching_bias(scores, visual, wanted)
    got = [softmax(s + bias[None, :, None] * is_visual)[..., is_visual].sum(-1) for s, is_visual in zip(scores, visual)]
    np.testing.assert_allclose(np.concatenate(got).mean(0), np.concatenate(wanted).mean(0), atol=1e-6)
    out_of_reach = matching_bias(scores, visual, [np.ones_like(w) for w in wanted])
    np.testing.assert_allclose(out_of_reach, LARGEST_BIAS, atol=1e-6)


def test_ridge_finds_the_solution_and_its_error() -> None:
    rng = np.random.default_rng(4)
    true = rng.normal(size=(6, 3))
    ridge, xs, ys, ws = Ridge(6, 3), [], [], []
    for _ in range(8):
        x, w = rng.normal(size=(40, 6)).astype(np.float32), rng.uniform(0.1, 2.0, 40)
        y = (x @ true + 0.05 * rng.normal(size=(40, 3))).astype(np.float32)
        ridge.add(x, y, w)
        xs, ys, ws = [*xs, x], [*ys, y], [*ws, w]
    solution = ridge.solve()
    np.testing.assert_allclose(solution, true, atol=0.03)
    x, y, w = np.concatenate(xs), np.concatenate(ys), np.concatenate(ws)
    assert ridge.error(solution) == pytest.approx((w * ((y - x @ solution) ** 2).sum(1)).mean(), rel=1e-4)
    noise = Ridge(6, 3)
    for _ in range(8):
        noise.add(rng.normal(size=(8, 6)), rng.normal(size=(8, 3)), np.ones(8))
    # nothing to be learned: little is changed, whatever the held-out rows say
    assert np.abs(noise.solve()).max() < 0.3


@pytest.mark.parametrize(("n_head", "n_head_kv"), [(1, 1), (3, 3), (4, 2), (3, 1)])
def test_value_ridge_is_the_optimum(n_head: int, n_head_kv: int) -> None:
    # against least squares in float64 on the outer products, laid out
    rng = np.random.default_rng(5)
    head_dim, n_embd, n, n_group = 3, 7, 5, n_head // n_head_kv
    w_o = rng.normal(size=(n_embd, n_head * head_dim)).astype(np.float32)
    true = rng.normal(size=(n_head_kv, head_dim, n))

    def effect(change: np.ndarray, features: np.ndarray) -> np.ndarray:
        values = np.stack([features[:, h] @ change[h // n_group].T for h in range(n_head)], axis=1)
        return values.reshape(len(features), -1) @ w_o.astype(float).T

    ridge, fs, ys = ValueRidge(w_o, n_head, n_head_kv, n), [], []
    for i in range(8):
        f, w = rng.normal(size=(30, n_head, n)).astype(np.float32), rng.uniform(0.1, 2.0, 30)
        y = effect(true, f) + 0.1 * rng.normal(size=(30, n_embd))
        ridge.add(f, y, w)
        fs, ys = [*fs, f * np.sqrt(w)[:, None, None]], [*ys, y * np.sqrt(w)[:, None]]
    for parts, chosen in ((slice(None), range(8)), (slice(0, 1), range(0, 8, 2)), (slice(1, 2), range(1, 8, 2))):
        f, y = (np.concatenate([all_of[i] for i in chosen]) for all_of in (fs, ys))
        columns = np.stack([effect(unit.reshape(true.shape), f).ravel() for unit in np.eye(true.size)], axis=1)
        assert ridge.error(parts=parts) == pytest.approx((y**2).sum())
        change = ridge.solve_with(1e-3, parts)
        assert ridge.error(change, parts) == pytest.approx(((y - effect(change, f)) ** 2).sum(), rel=1e-6)
        # the ridge by its definition: a share of the mean eigenvalue, of the heads' equations apart
        outer = [sum(w_o[:, h * head_dim : (h + 1) * head_dim].astype(float).T @ w_o[:, h * head_dim : (h + 1) * head_dim] for h in heads)
                 for heads in np.arange(n_head).reshape(n_head_kv, n_group)]  # fmt: skip
        inner = [np.mean([f[:, h].T @ f[:, h] for h in heads], axis=0) for heads in np.arange(n_head).reshape(n_head_kv, n_group)]
        shrink = 1e-3 * np.mean([np.trace(a) * np.trace(b) / (head_dim * n) for a, b in zip(outer, inner)])
        gradient = columns.T @ (columns @ change.ravel() - y.ravel()) + shrink * change.ravel()
        assert np.abs(gradient).max() < 1e-4 * np.abs(columns.T @ y.ravel()).max()
        best = np.linalg.solve(columns.T @ columns + shrink * np.eye(true.size), columns.T @ y.ravel())
        np.testing.assert_allclose(change.ravel(), best, atol=1e-3)
    np.testing.assert_allclose(ridge.solve(), true, atol=0.15)
    noise = ValueRidge(w_o, n_head, n_head_kv, n)
    for _ in range(8):
        noise.add(rng.normal(size=(9, n_head, n)), rng.normal(size=(9, n_embd)), np.ones(9))
    assert noise.solve() is None or np.abs(noise.solve()).max() < 0.3


def test_conjugate_gradients_solve() -> None:
    rng = np.random.default_rng(6)
    root = rng.normal(size=(20, 20))
    matrix, right = root @ root.T + np.eye(20), rng.normal(size=20)
    for preconditioner in (lambda r: r, lambda r: r / np.diag(matrix)):
        solved = conjugate_gradients(lambda x: matrix @ x, right, preconditioner)
        np.testing.assert_allclose(matrix @ solved, right, atol=1e-4)
    np.testing.assert_array_equal(conjugate_gradients(lambda x: matrix @ x, 0 * right, lambda r: r), 0 * right)


def test_main_directions_are_those_of_most_variance() -> None:
    rng = np.random.default_rng(7)
    norm = rng.uniform(0.5, 2.0, 40).astype(np.float32)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    scales = np.array([10.0] * 4 + [0.01] * 36)
    streams = [(rng.normal(size=(50, 40)) * scales @ basis.T / norm).astype(np.float32) for _ in range(3)]
    found = main_directions(streams, norm, 4)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(found @ basis[:, :4] @ basis[:, :4].T, found, atol=1e-2)
    np.testing.assert_array_equal(main_directions(streams, norm, 64), np.eye(40))


@pytest.fixture(scope="module")
def llm() -> Llama:
    """The tiny model with every layer full."""
    with load(lazy_layers="none", n_seq_max=9) as loaded:
        yield loaded


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_each_correction_alone_and_all_together(llm: Llama, mode: str) -> None:
    measured = measure(llm, CalibrationSettings(mode=mode, **SETTINGS))
    runner = Runner(llm, mode)
    before = runner.kl(LEADERS, measured.part(range(N_CHECKED)))
    weights = Weights(llm.model_path)
    for wanted in [(name,) for name in ALL[mode]] + [ALL[mode]]:
        made = correct(llm, LEADERS, measured.samples, mode, **dict.fromkeys(wanted, True))
        assert runner.kl(LEADERS, measured.part(range(N_CHECKED))) == before  # the model is as it was
        assert [error.layer for error in made.errors] == [1, 3, 4, 5, 7]
        for error in made.errors:
            steps = [error.shared, error.aligned, error.biased, error.refitted]
            assert [step is not None for step in steps[1:]] == [name in wanted for name in ("align_heads", "vis_bias", "refit")]
            assert error.aligned is None or error.aligned <= error.shared
            assert (error.revalued is not None) == (error.refitted is not None)
            if error.refitted is not None:
                assert error.revalued <= error.refitted and error.last == error.revalued
                assert error.refitted <= [step for step in steps[:3] if step is not None][-1] * (1 + 1e-6)
        changed = {name.split(".", 2)[2] for name in made.weights}
        if wanted == ("refit",):
            # on random weights six samples hardly tell a better W_v: it may be left alone
            assert changed - {"attn_v.weight"} == {"attn_output.weight"}
            assert sum(error.refitted for error in made.errors) < 0.9 * sum(error.shared for error in made.errors)
        if wanted == ("vis_bias",):
            assert not changed and made.vis_bias[[1, 3, 4, 5, 7]].any(1).all() and not made.vis_bias[[0, 2, 6]].any()
        if wanted == ("align_heads",):
            assert made.vis_bias is None
            # as a full layer it is what it was
            with weights.replaced(llm.native_model, made.weights):
                assert runner.kl(list(range(N_LAYER)), measured) < 1e-5
        with weights.replaced(llm.native_model, made.weights):
            assert np.isfinite(runner.kl(LEADERS, measured, vis_bias=made.vis_bias))


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_dropped_layers_are_left_alone_and_made_up_for(llm: Llama, mode: str) -> None:
    # the first layers, one inside a block, one after it
    leaders = leaders_of("3,5,7,drop:0-1,drop:4,drop:6", N_LAYER)
    measured = measure(llm, CalibrationSettings(mode=mode, **SETTINGS))
    made = correct(llm, leaders, measured.samples, mode, **dict.fromkeys(ALL[mode], True))
    assert [error.layer for error in made.errors] == [3, 5, 7]
    assert all(error.refitted < error.shared for error in made.errors)
    assert {int(name.split(".")[1]) for name in made.weights} == {3, 5, 7}
    if mode == "visual":
        assert not made.vis_bias[[0, 1, 2, 4, 6]].any()
    runner = Runner(llm, mode)
    before = runner.kl(leaders, measured)
    with Weights.of(llm.native_model).replaced(llm.native_model, made.weights):
        assert runner.kl(leaders, measured, vis_bias=made.vis_bias) != before
    assert runner.kl(leaders, measured) == before


def permuted_layer(path: Path) -> Path:
    """The tiny model with layer 3 a copy of layer 2, its heads in another order; both see the same, so that it is lazy at no loss
    but for the order.
    """
    files = tiny_llava()
    weights = Weights(files.plain)
    head_dim = weights["blk.2.attn_q.weight"].shape[0] // 4  # 4 heads, 2 keys
    order, groups = [3, 2, 0, 1], [1, 0]
    new = {}
    for name, heads in (("attn_q", order), ("attn_k", groups), ("attn_v", groups)):
        rows = weights[f"blk.2.{name}.weight"].reshape(len(heads), head_dim, -1)
        new[f"blk.3.{name}.weight"] = rows[heads].reshape(weights[f"blk.2.{name}.weight"].shape)
    columns = weights["blk.2.attn_output.weight"]
    new["blk.3.attn_output.weight"] = np.ascontiguousarray(columns.reshape(len(columns), 4, head_dim)[:, order].reshape(columns.shape))
    new["blk.3.attn_norm.weight"] = weights["blk.2.attn_norm.weight"]
    for name in ("ffn_down", "attn_output"):
        new[f"blk.2.{name}.weight"] = 0 * weights[f"blk.2.{name}.weight"]  # so that layer 3 sees what layer 2 saw
    rewrite_gguf(files.plain, path, tensors=new)
    return path


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_alignment_undoes_a_permutation(tmp_path: Path, mode: str) -> None:
    with load(str(permuted_layer(tmp_path / "m.gguf")), lazy_layers="none", n_seq_max=9) as llm:
        measured = measure(llm, CalibrationSettings(mode=mode, **SETTINGS))
        (error,) = correct(llm, leaders_of([3], N_LAYER), measured.samples, mode, align_heads=True).errors
        assert error.shared > 1e-3
        assert error.aligned < 1e-6


@pytest.mark.parametrize(("outtype", "mode"), [("f32", "global"), ("q4_0", "visual"), ("q5_k_m", "global")])
def test_values_are_refitted_where_it_helps(tmp_path: Path, outtype: str, mode: str) -> None:
    # W_o can't give a head the values of another key, W_v can
    source, target = tmp_path / "plain.gguf", tmp_path / "lazy.gguf"
    make_lazy(permuted_layer(tmp_path / "m.gguf"), source, outtype=outtype)
    settings = CalibrationSettings(layers=[3], mode=mode, refit=True, **SETTINGS)
    _, made = make_lazy(source, target, settings=settings, mmproj_in=Path(tiny_llava().mmproj))
    (error,) = made.corrections.errors
    assert error.revalued < error.refitted * (0.9 if outtype == "f32" else 1) < error.shared
    assert set(made.corrections.weights) == {f"blk.3.attn_{name}.weight" for name in ("output", "v")}
    written = Weights(target)
    for name, values in made.corrections.weights.items():
        np.testing.assert_array_equal(written[name], values)
    with load(str(target)) as lazy:
        assert Runner(lazy, mode).kl(made.leaders, made.measured.part(range(N_CHECKED))) == pytest.approx(made.logits_kl, rel=1e-4, abs=1e-7)


def test_values_are_refitted_along_few_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggml_qcache_convert.calibration.correct.MOST_FEATURES", 0)  # as for a wide model: head_dim of them
    with load(str(permuted_layer(tmp_path / "m.gguf")), lazy_layers="none", n_seq_max=9) as llm:
        measured = measure(llm, CalibrationSettings(mode="global", **SETTINGS))
        made = correct(llm, leaders_of([3], N_LAYER), measured.samples, "global", refit=True)
        (error,) = made.errors
        assert error.revalued < error.refitted < error.shared
        change = made.weights["blk.3.attn_v.weight"] - Weights.of(llm.native_model)["blk.3.attn_v.weight"]
        head_dim = llm.native_model.info.head_dim
        assert np.linalg.matrix_rank(change, tol=1e-5) == head_dim < min(change.shape)


def test_one_sample_does_not_decide_alone() -> None:
    def of(*shares: float) -> list[np.ndarray]:
        """Log-probabilities of two answer rows a sample, over two tokens."""
        return [np.log([[share, 1 - share], [0.5, 0.5]]) for share in shares]

    untouched = of(0.5, 0.5, 0.5)
    kl = [0.5 * np.log(0.25 / (share * (1 - share))) for share in (0.9, 0.6, 0.5)]
    np.testing.assert_allclose(log_divergences(untouched, of(0.9, 0.6, 0.5)), np.log(np.array(kl) + LEAST_KL))
    # two samples gain nine tenths, one that was bad is worse: the mean rises, and yet most answers are nearer
    before, after = (log_divergences(untouched, of(*shares)) for shares in ((0.6, 0.4, 0.99), (0.53, 0.47, 0.995)))
    assert after.mean() < before.mean() and np.exp(after).mean() > np.exp(before).mean()


def test_the_shortest_of_the_best() -> None:
    noise = np.array([1.0, -1.0, 1.0, -1.0])
    # by sample the third is the best, and ahead of the second by 0.2: less than the error of that difference, 1.15 / 2
    near = np.array([[3.0] * 4, 0.2 + noise, [0.0] * 4, [0.1] * 4])
    assert shortest_of_the_best(near) == 1
    assert shortest_of_the_best(np.array([[3.0] * 4, 0.2 + noise / 10, [0.0] * 4])) == 2  # 0.2 is more than 0.058
    assert shortest_of_the_best(np.zeros((5, 4))) == 0


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_refits_go_as_far_as_samples_held_out_gain(llm: Llama, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    measured = measure(llm, CalibrationSettings(mode=mode, **SETTINGS))
    held_out, runner, weights = measured.part(range(1, 6, 2)), Runner(llm, mode), Weights.of(llm.native_model)

    def divergence(made: Corrections) -> float:
        with weights.replaced(llm.native_model, made.weights):
            by_sample = runner.kl_by_sample(LEADERS, held_out, vis_bias=made.vis_bias)
        return float(np.log(np.array(by_sample) * sum(held_out.n_answer_rows) + LEAST_KL).mean())

    aligned = correct(llm, LEADERS, measured.samples, mode, align_heads=True)
    assert aligned.refit_step is None
    made = correct(llm, LEADERS, measured.samples, mode, align_heads=True, refit=True)
    assert made.refit_step in (0.25, 0.5, 0.75, 1.0)
    assert divergence(made) < divergence(aligned) + 1e-6
    # a refit that takes the layer's output away does harm at any length: only the alignment stays
    monkeypatch.setattr(
        "ggml_qcache_convert.calibration.correct._Corrector.refit",
        lambda self, layer, _: self.set_refitted(layer, "attn_output.weight", -9 * self.weight(layer, "attn_output.weight")),
    )
    monkeypatch.setattr("ggml_qcache_convert.calibration.correct._Corrector.refit_values", lambda self, layer: (0.0, 0.0))
    harmed = correct(llm, LEADERS, measured.samples, mode, align_heads=True, refit=True)
    assert harmed.refit_step == 0
    for name, values in harmed.weights.items():
        np.testing.assert_array_equal(np.sort(values, axis=None), np.sort(weights[name], axis=None))


def test_settings_and_samples_refused(llm: Llama) -> None:
    measured = measure(llm, CalibrationSettings(**SETTINGS))
    with pytest.raises(ValueError, match="goes with lazy_mode visual, got 'global'"):
        correct(llm, LEADERS, measured.samples, "global", vis_bias=True)
    with pytest.raises(ValueError, match="needs 4 samples or more.* got 3"):
        correct(llm, LEADERS, measured.samples[:3], "visual", refit=True)
    with pytest.raises(ValueError, match="needs 4 samples or more.* got n_samples 3"):
        CalibrationSettings(images=[], refit=True, n_samples=3).check()
    with pytest.raises(ValueError, match="no lazy layers to correct"):
        CalibrationSettings(images=[], layers="none", refit=True).check()
    with pytest.raises(ValueError, match="the range 5-3 is reversed"):
        CalibrationSettings(images=[], layers="5-3", refit=True).check()


@pytest.mark.parametrize(("outtype", "mode"), [("f32", "visual"), ("q4_0", "visual"), ("q8_0", "global"), ("q5_k_m", "visual")])
def test_what_is_written_is_what_was_measured(tmp_path: Path, outtype: str, mode: str) -> None:
    files, source = tiny_llava(), tmp_path / "plain.gguf"
    make_lazy(Path(files.plain), source, outtype=outtype)
    settings = CalibrationSettings(layers=[1, 3, 4, 5, 7], mode=mode, **dict.fromkeys(ALL[mode], True), **SETTINGS)
    target = tmp_path / "lazy.gguf"
    result, made = make_lazy(source, target, settings=settings, mmproj_in=Path(files.mmproj))
    assert result.leaders == tuple(LEADERS)
    written = Weights(target)
    for name, values in made.corrections.weights.items():
        if mode == "visual" or "attn_q" not in name and "attn_k" not in name:
            np.testing.assert_array_equal(written[name], values)
    with load(str(target)) as lazy:
        assert Runner(lazy, mode).kl(LEADERS, made.measured.part(range(N_CHECKED))) == pytest.approx(made.logits_kl, rel=1e-4, abs=1e-7)
    keys = keys_of(target)
    assert keys["qcache.calibration.metric"] == "given" and keys["qcache.calibration.corrections"] == ",".join(ALL[mode])
    assert keys["qcache.calibration.logits_kl_uncorrected"] == np.float32(made.uncorrected_kl)
    # another copy without corrections has no bias left, the weights stay
    make_lazy(target, tmp_path / "again.gguf", [3], "visual") if mode == "visual" else None
    if mode == "visual":
        assert not any("vis_bias" in tensor.name for tensor in GGUFReader(tmp_path / "again.gguf").tensors)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, images = tiny_llava(), tmp_path / "images"
    images.mkdir()
    for seed in range(4):
        picture(seed).save(images / f"{seed}.png")
    common = [files.plain, "--mmproj-in", files.mmproj, "--calibration-images", str(images), "--calibration-samples", "4"]
    for name, arguments in (("a", ["--lazy-layers", "auto", "--lazy-budget", "0.05"]), ("b", ["--lazy-layers", "2-3,6"])):
        outfile = tmp_path / f"{name}.gguf"
        assert main([*common, "--outfile", str(outfile), *arguments, "--align-heads", "--vis-bias", "--refit"]) == 0
        output = capsys.readouterr()
        assert "uncorrected (align_heads, vis_bias, refit)" in output.out and "correcting: 100%" in output.err
        assert keys_of(outfile)["qcache.calibration.corrections"] == "align_heads,vis_bias,refit"
        with load(str(outfile)) as lazy:
            assert lazy.lazy.mode == "visual"
    assert keys_of(tmp_path / "b.gguf")["qcache.lazy.leader"] == leaders_of([2, 3, 6], N_LAYER)
    assert "qcache.calibration.budget" not in keys_of(tmp_path / "b.gguf")
    for arguments, message in (
        (["--lazy-layers", "2", "--refit", "--lazy-budget", "0.1"], "--lazy-budget goes with --lazy-layers auto"),
        (["--refit"], "no lazy layers to correct"),
        (["--lazy-layers", "9", "--refit"], "layer 9 is out of range, the model has layers 0 to 7"),
        (["--lazy-layers", "2", "--lazy-mode", "global", "--vis-bias"], "goes with lazy_mode visual, got 'global'"),
    ):
        assert main([*common, "--outfile", str(tmp_path / "o.gguf"), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main([files.plain, "--outfile", str(tmp_path / "o.gguf"), "--lazy-layers", "2", "--refit"]) == 1
    assert "--calibration-images DIR" in capsys.readouterr().err
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_corrections_that_do_harm_are_told(factor: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, images = tiny_llava(), tmp_path / "images"
    images.mkdir()
    picture(0).save(images / "0.png")

    def calibrated(*args: Any, **more: Any) -> Any:
        chosen = calibrate(*args, **more)
        return replace(chosen, logits_kl=factor * chosen.uncorrected_kl)

    monkeypatch.setattr(sys.modules[make_lazy.__module__], "calibrate", calibrated)
    common = [files.plain, "--mmproj-in", files.mmproj, "--calibration-images", str(images), "--calibration-samples", "4"]
    assert main([*common, "--outfile", str(tmp_path / "o.gguf"), "--lazy-layers", "2-3,6", "--align-heads"]) == 0
    assert ("warning: align_heads raised the KL divergence" in capsys.readouterr().err) == (factor > 1)


def test_report_and_inspection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, images = tiny_llava(), tmp_path / "images"
    images.mkdir()
    picture(0).save(images / "0.png")
    common = [files.plain, "--mmproj-in", files.mmproj, "--calibration-images", str(images), "--calibration-samples", "4"]
    lazy = ["--lazy-layers", "2-3,6", "--refit", "--align-heads", "--outfile", str(tmp_path / "m.gguf")]
    for name in ("r.html", "r.PNG"):
        assert main([*common, *lazy, "--report", str(tmp_path / name)]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "3 of 8 layers lazy, visual mode" in page and "data:image/png;base64," in page and "src=\"http" not in page
    assert page.count("<tr>") == 8 + 1 + N_LAYER  # facts, headings, layers
    assert (tmp_path / "r.PNG").read_bytes().startswith(b"\x89PNG")
    facts = inspect_file(str(tmp_path / "m.gguf"))["lazy"]
    assert [error > 0 for error in facts["corrected_error"]] == [layer in (2, 3, 6) for layer in range(N_LAYER)]
    assert len(facts["pair_divergence"]) == N_LAYER**2 and facts["output_error"][2] > 0
    capsys.readouterr()
    assert inspect_main(["inspect", str(tmp_path / "m.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "corrected" in shown and "JS divergence by pair of layers" in shown
    for arguments, message in (
        ([*lazy, "--report", str(tmp_path / "r.pdf")], "a report is a .html or a .png file"),
        ([*lazy, "--report", str(tmp_path / "none" / "r.png")], "can't be written there"),
    ):
        assert main([*common, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main([files.plain, "--lazy-layers", "2", "--report", "r.png"]) == 1
    assert "--report shows what calibration found" in capsys.readouterr().err


def test_one_step_equals_its_parts(llm: Llama) -> None:
    settings = CalibrationSettings(layers="1,3-5,7", refit=True, **SETTINGS)
    measured = measure(llm, settings)
    chosen = calibrate(llm, settings, measured)
    made = correct(llm, LEADERS, measured.samples, "visual", refit=True)
    assert chosen.leaders == LEADERS and chosen.corrections.errors == made.errors
    for name, values in made.weights.items():
        np.testing.assert_array_equal(chosen.corrections.weights[name], values)
    runner = Runner(llm, "visual")
    assert chosen.uncorrected_kl == runner.kl(LEADERS, measured.part(range(N_CHECKED)))
    with Weights(llm.model_path).replaced(llm.native_model, made.weights):
        assert chosen.logits_kl == runner.kl(LEADERS, measured.part(range(N_CHECKED)))
