"""Choosing lazy layers from data: the measures against NumPy, the search against brute force, the command end to end."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from core_helpers import CoreModels, make_context, make_prompt
from gguf import GGUFReader
from hf_models import build_llava
from ref_torch import TextModel, reference_logits
from tiny_llava import N_LAYER, load, picture, tiny_llava

from ggml_qcache import Llama
from ggml_qcache_convert import dropped_of, lazy_of, leaders_of
from ggml_qcache_convert.calibration import CalibrationSettings, calibrate, measure
from ggml_qcache_convert.calibration.attention import js_divergence, kl_divergence, length_keeping, log_softmax, sharing_errors
from ggml_qcache_convert.calibration.ondisk import OnDisk, Some
from ggml_qcache_convert.calibration.runner import Runner
from ggml_qcache_convert.calibration.samples import choose_pairs
from ggml_qcache_convert.calibration.select import by_cost, by_descent, by_divergence, by_threshold, neighbours
from ggml_qcache_convert.cli import main

BUDGET = 0.08  # of KV bytes: the tiny model's images are a quarter of its prompts
SETTINGS = {"images": [picture(0), picture(1)], "n_samples": 3, "n_answer": 4, "n_other_rows": 6, "budget": BUDGET}


def plans(n_layer: int, kinds: str) -> list[list[int]]:
    """Leaders of every plan of these kinds of layers: full, lazy, dropped."""
    found = []
    for plan in itertools.product(kinds, repeat=n_layer):
        lazy, dropped = ([layer for layer, kind in enumerate(plan) if kind == of] for of in "ld")
        try:
            found.append(leaders_of(lazy, n_layer, dropped))
        except ValueError:  # lazy without a leader
            assert next(kind for kind in plan if kind != "d") == "l"
    return found


def n_lazy(leaders: list[int]) -> int:
    return len(lazy_of(leaders))


def test_lists_on_disk_are_lists():
    items = [np.arange(n) for n in range(4)]
    listed = OnDisk(items[:3])
    assert [len(item) for item in listed] == [0, 1, 2]
    first = listed[0]
    listed.append(items[3])  # after a read
    assert first is not listed[0] and len(listed) == 4
    np.testing.assert_equal(list(listed), items)
    np.testing.assert_equal(list(listed[1:]), items[1:])
    chosen = Some(listed, [3, 0, 2])
    np.testing.assert_equal(list(chosen), [items[3], items[0], items[2]])
    np.testing.assert_equal(list(chosen[1:]), [items[0], items[2]])
    for beyond in (listed, chosen):
        with pytest.raises(IndexError):
            beyond[4]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kinds", ["fl", "fld"])
def test_dynamic_programming_finds_what_brute_force_finds(kinds: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_layer = int(rng.integers(1, 9 if kinds == "fl" else 8))
    cost = np.triu(rng.random((n_layer, n_layer)) ** 3, 1)
    drop_cost = rng.random(n_layer) ** 3

    def total(plan: list[int]) -> float:
        return sum(drop_cost[layer] if leader == -1 else cost[leader, layer] for layer, leader in enumerate(plan))

    least: dict[tuple[int, int], float] = {}
    for plan in plans(n_layer, kinds):
        key = n_lazy(plan), len(dropped_of(plan))
        least[key] = min(total(plan), least.get(key, np.inf))
    found = by_cost(cost, drop_cost if "d" in kinds else None)
    assert found.keys() == least.keys()
    for key, plan in found.items():
        assert (n_lazy(plan), len(dropped_of(plan))) == key
        assert total(plan) == pytest.approx(least[key], abs=1e-12)


def test_the_papers_rule() -> None:
    divergence = [0.0, 0.5, 0.1, 0.2, 0.6, 0.1]
    assert by_threshold(divergence, 0.3) == [0, 1, 1, 1, 4, 4]
    assert by_threshold(divergence, 0.1) == [0, 1, 2, 3, 4, 5]
    assert by_divergence(divergence, 1) == [0, 1, 2, 3, 4, 4]  # of equals the deeper one is lazy
    assert by_divergence(divergence, 3) == by_threshold(divergence, 0.3)


def test_descent_ends_where_no_swap_helps() -> None:
    target = [0, 1, 1, 3, 3, 5]

    def loss(leaders: list[int], _to_beat: float) -> float:
        return float(sum(a != b for a, b in zip(leaders, target)))

    assert by_descent([0, 0, 0, 3, 4, 5], loss) == (target, 0.0)
    assert by_descent([0, 0, 0, 0], loss)[0] == [0, 0, 0, 0]  # nothing to swap
    # with less time, the best so far
    tried: list[list[int]] = []

    def noted(leaders: list[int], to_beat: float) -> float:
        tried.append(leaders)
        return loss(leaders, to_beat)

    found, value = by_descent([0, 0, 0, 3, 4, 5], noted, most_tried=3)
    assert len(tried) == 1 + 3 and value == min(loss(plan, 0.0) for plan in tried) == loss(found, 0.0)
    assert by_descent([0, 0, 0, 3, 4, 5], loss, most_tried=0)[0] == [0, 0, 0, 3, 4, 5]


def test_descent_takes_no_step_that_other_samples_refuse() -> None:
    start, target = [0, 0, 0, 3, 4, 5], [0, 1, 1, 3, 3, 5]

    def loss(leaders: list[int], _to_beat: float) -> float:
        return float(sum(a != b for a, b in zip(leaders, target)))

    asked: list[float] = []

    def check(leaders: list[int], to_beat: float) -> float:  # lower where layer 1 is lazy
        asked.append(to_beat)
        return 1.0 if leaders[1] == 1 else loss(leaders, to_beat) / 100

    found, _ = by_descent(start, loss, check=check)
    assert found[1] == 0 and check(found, 0.0) < check(start, 0.0)
    assert loss(target, 0.0) < loss(found, 0.0) < loss(start, 0.0)  # there was something to find, and something to refuse
    assert asked[0] == np.inf and (np.diff(asked[:-2]) <= 0).all()


def test_descent_with_dropped_layers() -> None:
    target = [0, -1, 2, 3, 3, -1]

    def loss(leaders: list[int], _to_beat: float) -> float:
        return float(sum(a != b for a, b in zip(leaders, target)))

    def allowed(leaders: list[int]) -> bool:
        return n_lazy(leaders) + 2 * len(dropped_of(leaders)) >= 5

    for start in ([0, -1, 2, 2, -1, 5], [0, 0, -1, 0, 0, 5], [-1, -1, 2, -1, 2, 5], [0, 0, 0, 0, 0, 0]):
        assert by_descent(start, loss, allowed, drops=True) == (target, 0.0)
    # a start without dropped layers stays without where none may be dropped
    assert dropped_of(by_descent([0, 0, 2, 2, 2, 2], loss, allowed)[0]) == []


def test_neighbours_of_a_plan() -> None:
    assert list(neighbours([0, 0, 2], False)) == [[0, 1, 1]]
    assert sorted(neighbours([0, -1, 2], True)) == sorted([[-1, 1, 2], [0, 1, -1], [0, 1, 2], [0, 0, 2]])
    for plan in plans(5, "fld"):
        kinds = sorted((n_lazy(plan), len(dropped_of(plan))) for plan in neighbours(plan, False))
        assert kinds == [(n_lazy(plan), len(dropped_of(plan)))] * len(kinds)  # a swap saves the same


def test_divergences_by_definition() -> None:
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.full(9, 0.3), (2, 4, 5)).astype(np.float32)
    p[0, 0] = np.eye(9)[0]
    q[0, 0] = np.eye(9)[1]
    expected = np.zeros((4, 5))
    for at in np.ndindex(4, 5):
        for a, b in zip(p[at].astype(float), q[at].astype(float)):
            for x in (a, b):
                expected[at] += x * np.log(2 * x / (a + b)) / 2 if x > 0 else 0.0
    np.testing.assert_allclose(js_divergence(p, q), expected, rtol=1e-5, atol=1e-7)
    assert js_divergence(p, q)[0, 0] == pytest.approx(np.log(2))
    a, b = rng.normal(size=(2, 3, 7))
    pa, pb = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(kl_divergence(log_softmax(a), log_softmax(b)), (pa * np.log(pa / pb)).sum(-1))


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_sharing_error_is_what_the_lazy_layer_would_do(core_models: CoreModels, mode: str) -> None:
    # PyTorch with one lazy layer: what comes before it is untouched, so its attention output is the one predicted
    model = core_models["llama-gqa-32"]
    prompt = make_prompt(model.native, "t7 v21 t9")
    n_layer, rows = model.native.info.n_layer, np.array([5, 12, 27, 28, 36])
    bias = np.random.default_rng(1).normal(0, 0.1, model.native.info.n_embd)  # of W_o: a layer without attention loses it too

    def w_o(layer: int) -> np.ndarray:
        return TextModel.of(model.hf).decoder.layers[layer].self_attn.o_proj.weight.detach().numpy()

    def layers_of(leaders: list[int]) -> list[dict[str, np.ndarray]]:
        layers: list[dict[str, np.ndarray]] = []
        reference_logits(model.hf, model.embeddings(prompt), torch.from_numpy(prompt.visual), leaders, mode, layers=layers)
        return layers

    with make_context(model.native) as context:
        context.capture_start("scores", "hidden")
        context.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual, logits=np.isin(np.arange(len(prompt)), rows))

        def scores(layer: int) -> np.ndarray:
            out = np.full((len(rows), model.native.info.n_head, len(prompt)), -np.inf, np.float32)
            for i, row in enumerate(rows):
                out[i, :, : row + 1] = context.captured("scores", layer, row)
            return out

        inputs = model.embeddings(prompt).numpy()[rows]
        errors, dropped = sharing_errors(
            scores, context.seq_v, lambda layer: (w_o(layer), bias),
            lambda layer: np.stack([context.captured("hidden", layer - 1, row) for row in rows]) if layer else inputs,
            prompt.visual[rows], prompt.visual, mode, n_layer,
        )  # fmt: skip
    untouched = layers_of(list(range(n_layer)))
    for leader, layer in ((0, 1), (1, 4), (4, 5), (0, 7)):
        # the layers between are their leader's too: only the last of them is looked at, at what the untouched model feeds it
        if layer == leader + 1:
            lazy = layers_of([leader if il == layer else il for il in range(n_layer)])[layer]["attn"][rows]
        else:
            probs = untouched[leader]["scores"], untouched[layer]["scores"]
            v = untouched[layer]["v"].repeat(model.native.info.n_head // model.native.info.n_head_kv, 0)
            inherits = prompt.visual[:, None] | prompt.visual[None, :] if mode == "visual" else np.ones((len(prompt),) * 2, bool)
            mixed = np.where(inherits[:, None, :], *probs)
            mixed[np.broadcast_to(np.triu(np.ones((len(prompt),) * 2, bool), 1)[:, None, :], mixed.shape)] = -np.inf
            weights = np.exp(mixed - mixed.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            lazy = np.einsum("thk,hkd->thd", weights, v)[rows]
        own = untouched[layer]["attn"][rows].reshape(len(rows), -1) @ w_o(layer).T
        lazy = lazy.reshape(len(rows), -1) @ w_o(layer).T
        after = untouched[layer - 1]["hidden"][rows] + own + bias
        expected = (((lazy - own) ** 2).sum(1) / (after**2).sum(1)).mean()
        assert errors[leader, layer] == pytest.approx(expected, rel=1e-3)
    assert not np.tril(errors).any()
    for layer in range(n_layer):
        own = untouched[layer]["attn"][rows].reshape(len(rows), -1) @ w_o(layer).T + bias
        after = (untouched[layer - 1]["hidden"][rows] if layer else inputs) + own
        assert dropped[layer] == pytest.approx(((own**2).sum(1) / (after**2).sum(1)).mean(), rel=1e-3)


def test_random_combinations_keep_lengths() -> None:
    rng = np.random.default_rng(6)
    matrix = rng.normal(size=(1500, 40)).astype(np.float32)
    shorter = length_keeping(1500, 512, 3)
    small = shorter @ matrix
    assert small.shape == (512, 40) and np.array_equal(length_keeping(4, 4, 3), np.eye(4))
    x = rng.normal(size=(64, 40))
    ratios = ((x @ small.T) ** 2).sum(1) / ((x @ matrix.T) ** 2).sum(1)
    assert abs(ratios.mean() - 1) < 0.03 and ratios.std() < 0.1


def test_pairs_use_every_image_before_any_again() -> None:
    pairs = choose_pairs(["a", "b", "c"], ["x", "y"], 5, seed=1)
    assert len(set(pairs)) == 5 and sorted(image for image, _ in pairs[:3]) == ["a", "b", "c"]
    assert len(choose_pairs(["a"], ["x", "y"], 9, seed=1)) == 2
    assert pairs == choose_pairs(["a", "b", "c"], ["x", "y"], 5, seed=1)


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_plans_meet_the_budget_and_loss_is_best(mode: str) -> None:
    with load(lazy_layers="none", n_seq_max=9) as llm:
        settings = {metric: CalibrationSettings(metric=metric, mode=mode, **SETTINGS) for metric in ("js", "output", "loss")}
        measured = measure(llm, settings["js"])
        chosen = {metric: calibrate(llm, settings[metric], measured) for metric in settings}
        repeated = calibrate(llm, settings["output"])
        fewer = leaders_of(range(1, n_lazy(chosen["js"].leaders)), N_LAYER)
        assert Runner(llm, mode).kv_saved(fewer, measured.samples) < BUDGET
    for calibration in chosen.values():
        assert calibration.kv_saved >= BUDGET and calibration.logits_kl > 0
    assert chosen["loss"].logits_kl <= min(chosen["js"].logits_kl, chosen["output"].logits_kl) + 1e-9
    assert by_threshold(measured.js_divergence, chosen["js"].threshold) == chosen["js"].leaders
    assert (repeated.leaders, repeated.logits_kl) == (chosen["output"].leaders, chosen["output"].logits_kl)
    assert 0 <= measured.js_divergence.min() and measured.js_divergence.max() <= np.log(2)


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_mixed_plans_meet_the_budget_and_cost_no_more_than_lazy_ones(mode: str) -> None:
    with load(lazy_layers="none", n_seq_max=9) as llm:
        settings = {
            (metric, drops): CalibrationSettings(metric=metric, mode=mode, drop_attention=drops, **SETTINGS)
            for metric in ("output", "loss") for drops in (False, True)
        }  # fmt: skip
        measured = measure(llm, settings["output", False])
        chosen = {key: calibrate(llm, settings[key], measured, n_threads=1) for key in settings}
        # a budget out of reach of lazy layers: by brute force over every plan
        high = CalibrationSettings(metric="output", mode=mode, drop_attention=True, **SETTINGS | {"budget": 0.55})
        mixed, runner = calibrate(llm, high, measured), Runner(llm, mode)
        lazy, dropped = (runner.kv_saved(leaders, measured.samples) for leaders in (leaders_of([7], 8), leaders_of([], 8, [7])))
        allowed = [plan for plan in plans(N_LAYER, "fld") if n_lazy(plan) * lazy + len(dropped_of(plan)) * dropped >= 0.55 - 1e-9]
        least = min(measured.errors_of(plan).sum() for plan in allowed)
    assert measured.errors_of(mixed.leaders).sum() == pytest.approx(least, rel=1e-9) and mixed.kv_saved >= 0.55
    for (_, drops), calibration in chosen.items():
        assert calibration.kv_saved >= BUDGET and (drops or not dropped_of(calibration.leaders))
    cost = {drops: measured.errors_of(chosen["output", drops].leaders).sum() for drops in (False, True)}
    assert cost[True] <= cost[False] + 1e-12
    assert chosen["loss", True].logits_kl <= min(chosen["output", drops].logits_kl for drops in (False, True)) + 1e-9
    assert (measured.drop_error > 0).all()


@pytest.mark.parametrize("block_tokens", [16, 32])
def test_saved_bytes_are_those_of_the_cache(block_tokens: int) -> None:
    leaders = leaders_of([2, 3, 5, 7], N_LAYER, [0, 6])
    with load(lazy_layers="none", n_seq_max=9) as llm:
        measured = measure(llm, CalibrationSettings(**SETTINGS))
        runner = Runner(llm, "visual", block_tokens=block_tokens)
        kept = full = 0
        with runner.context(leaders, block_tokens=block_tokens) as context:
            for sample in measured.samples:
                runner.decode(context, sample, sample.rows)
                kept += context.kv_usage()["bytes"]
                full += context.kv_usage()["bytes_if_full"]
        assert runner.kv_saved(leaders, measured.samples) == pytest.approx(1 - kept / full)
        assert runner.kl(list(range(N_LAYER)), measured) < 1e-6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three images and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def keys_of(path: Path) -> dict[str, object]:
    """The qcache keys of a GGUF."""
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("qcache.")}


@pytest.mark.parametrize("mode", ["visual", "global"])
def test_command(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    build_llava(tmp_path / "hf", n_layer=6)
    arguments = ["--lazy-layers", "auto", "--lazy-mode", mode, "--lazy-budget", str(BUDGET), "--calibration-images", str(images)]
    arguments += ["--calibration-samples", "3", "--seed", "7", "--lazy-metric", "output"]
    one, two, mm = tmp_path / "1.gguf", tmp_path / "2.gguf", tmp_path / "mm.gguf"
    for outfile in (one, two):
        assert main([str(tmp_path / "hf"), "--outfile", str(outfile), "--mmproj", str(mm), *arguments]) == 0
    output = capsys.readouterr()
    assert f"{mode} mode" in output.out and "chosen by output on 3 samples" in output.out
    assert "calibrating: 100%" in output.err
    keys = keys_of(one)
    assert keys == keys_of(two)
    assert keys["qcache.lazy.mode"] == mode and n_lazy(keys["qcache.lazy.leader"]) > 0
    assert len(keys["qcache.lazy.js_divergence"]) == 6 and keys["qcache.lazy.js_divergence"][0] == 0
    expected = {"metric": "output", "samples": 3, "seed": 7, "budget": np.float32(BUDGET)}
    assert {name: keys[f"qcache.calibration.{name}"] for name in expected} == expected
    assert keys["qcache.calibration.kv_saved"] >= BUDGET
    names = {tensor.name for tensor in GGUFReader(one).tensors}
    for layer, leader in enumerate(keys["qcache.lazy.leader"]):
        assert (f"blk.{layer}.attn_q.weight" in names) == (leader == layer or mode == "visual")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.gguf", "2.gguf", "hf", "mm.gguf"]
    with Llama(str(one), mmproj_path=str(mm), n_ctx=128) as llm:
        assert list(llm.lazy.leader) == keys["qcache.lazy.leader"]


def test_command_on_a_gguf(tmp_path: Path, images: Path) -> None:
    files = tiny_llava()
    arguments = ["--calibration-images", str(images), "--calibration-samples", "2", "--quiet"]
    lazy, given, off = tmp_path / "lazy.gguf", tmp_path / "given.gguf", tmp_path / "off.gguf"
    source = [files.visual, "--mmproj-in", files.mmproj]  # its own lazy layers don't count
    assert main([*source, "--outfile", str(lazy), "--lazy-layers", "auto", "--lazy-threshold", "0.6", *arguments]) == 0
    keys = keys_of(lazy)
    assert keys["qcache.calibration.metric"] == "js" and "qcache.calibration.budget" not in keys
    assert keys["qcache.lazy.leader"] == by_threshold(keys["qcache.lazy.js_divergence"], 0.6)
    assert main([files.visual, "--outfile", str(given), "--lazy-layers", "3-4", "--quiet"]) == 0
    assert keys_of(given)["qcache.lazy.leader"] == leaders_of([3, 4], N_LAYER)
    assert main([files.visual, "--outfile", str(off), "--quiet"]) == 0
    assert keys_of(off) == {}
    before, after = GGUFReader(files.visual), GGUFReader(off)
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(before.tensors, after.tensors))
    assert set(before.fields) - set(after.fields) == set(keys_of(Path(files.visual)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lazy-layers", "auto"], "name a folder of them with --calibration-images DIR"),
        (["--lazy-layers", "2", "--lazy-budget", "0.2"], "--lazy-budget goes with --lazy-layers auto"),
        (["--lazy-layers", "auto", "--calibration-images", "nowhere"], "nowhere: isn't a directory"),
        (["--lazy-layers", "auto", "--calibration-images", "EMPTY"], "has no images"),
        (["--lazy-layers", "auto", "--calibration-images", "IMAGES", "--lazy-budget", "1.5"], "lazy_budget 1.5"),
        (["--lazy-layers", "auto", "--calibration-images", "IMAGES", "--lazy-budget", "0.49"], "can't be met: in visual mode 7"),
        (
            ["--lazy-layers", "auto", "--calibration-images", "IMAGES", "--lazy-budget", ".2", "--lazy-threshold", ".2"],
            "give one of them",
        ),
        (
            ["--lazy-layers", "auto", "--calibration-images", "IMAGES", "--lazy-threshold", "0.2", "--lazy-metric", "loss"],
            "a threshold goes with the metric js",
        ),
        (["--lazy-layers", "auto", "--calibration-images", "IMAGES", "--calibration-samples", "0"], "n_samples 0"),
        (["--mmproj", "m.gguf"], "--mmproj goes with a Hugging Face directory"),
        (["--lazy-layers", "2", "--drop-attention"], "--drop-attention goes with --lazy-layers auto"),
        (["--lazy-layers", "auto", "--calibration-images", "IMAGES", "--drop-attention"], "js compares the attention of two layers"),
        (
            ["--lazy-layers", "auto", "--calibration-images", "IMAGES", "--drop-attention", "--lazy-threshold", "0.1"],
            "js compares the attention of two layers",
        ),
    ],
)
def test_command_refuses(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"IMAGES": str(images), "EMPTY": str(tmp_path / "empty")}
    files = tiny_llava()
    outfile = tmp_path / "o.gguf"
    given = [files.plain, "--mmproj-in", files.mmproj, "--outfile", str(outfile), *(places.get(a, a) for a in arguments)]
    assert main(given) == 1
    assert message in capsys.readouterr().err
    assert not outfile.exists()


def test_command_drops_attention(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, outfile, report = tiny_llava(), tmp_path / "m.gguf", tmp_path / "r.html"
    arguments = ["--lazy-layers", "auto", "--lazy-metric", "output", "--drop-attention", "--lazy-budget", "0.5", "--refit"]
    arguments += ["--calibration-images", str(images), "--calibration-samples", "4", "--report", str(report), "--no-progress"]
    assert main([files.plain, "--mmproj-in", files.mmproj, "--outfile", str(outfile), *arguments]) == 0
    keys = keys_of(outfile)
    leaders = keys["qcache.lazy.leader"]
    gone = dropped_of(leaders)
    assert keys["qcache.version"] == 2 and len(gone) >= 2 and keys["qcache.calibration.drop_attention"] is True
    assert keys["qcache.calibration.kv_saved"] >= 0.5
    errors, drop_errors = keys["qcache.calibration.output_error"], keys["qcache.calibration.drop_error"]
    assert len(drop_errors) == N_LAYER and all(errors[layer] == drop_errors[layer] for layer in gone)
    assert [error > 0 for error in errors] == [leader != layer for layer, leader in enumerate(leaders)]
    assert [error > 0 for error in keys["qcache.calibration.corrected_error"]] == [layer in lazy_of(leaders) for layer in range(N_LAYER)]
    assert f"{len(gone)} layers without attention: " in capsys.readouterr().out
    assert f"{len(gone)} without attention" in report.read_text() and "no attention" in report.read_text()
    names = {tensor.name for tensor in GGUFReader(outfile).tensors}
    assert all((f"blk.{layer}.attn_output.weight" in names) == (layer not in gone) for layer in range(N_LAYER))
    with load(str(outfile)) as llm:
        assert list(llm.lazy.leader) == leaders


def test_command_refuses_files_it_cannot_read(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing")
    assert main([str(tmp_path / "bad.gguf"), "--outfile", str(tmp_path / "o.gguf")]) == 1
    assert "is truncated or damaged" in capsys.readouterr().err
    assert main([tiny_llava().mmproj, "--outfile", str(tmp_path / "o.gguf")]) == 1
    assert "isn't a text model" in capsys.readouterr().err
    auto = ["--lazy-layers", "auto", "--calibration-images", str(images)]
    assert main([tiny_llava().plain, "--outfile", str(tmp_path / "o.gguf"), *auto]) == 1
    assert "--mmproj-in" in capsys.readouterr().err
    assert main([tiny_llava().global_, "--outfile", str(tmp_path / "o.gguf")]) == 1
    assert "was lazy in global mode" in capsys.readouterr().err
