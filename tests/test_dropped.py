"""Layers without attention: against PyTorch, in every way of computing the same rows, in memory, states and files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from core_helpers import (
    BOUNDS,
    N_LAYER,
    SHAPES,
    CoreModel,
    CoreModels,
    assert_close,
    decode,
    decode_in_parts,
    make_context,
    make_prompt,
    rewrite_gguf,
    rows_of_logits,
    worst_nmse,
)
from ref_torch import reference_logits
from tiny_llava import DROPPED_LAYERS, ask, load, picture, tiny_llava, user

from ggml_qcache.cli import main
from ggml_qcache.errors import InvalidArgumentError, StateError, UnsupportedError
from ggml_qcache.inspection import inspect_file
from ggml_qcache.native import Context, Model
from ggml_qcache.pruning import PrunedContext
from ggml_qcache_convert import convert, leaders_of

TWO_IMAGES = "t7 v37 t5 v20 t9"
PLANS = {
    "inside a block": "1,4,drop:2-3",
    "between blocks": "1,5,drop:2,drop:4",
    "after the leader and at the end": "4-5,drop:3,drop:6-7",
    "the first": "2,drop:0",
    "the first and the last": "3-4,drop:0-1,drop:7",
    "nothing lazy": "drop:2,drop:5",
    "all but one": "drop:0-4,drop:6-7",
    "all": "drop:0-7",
}
MIXED = leaders_of(PLANS["inside a block"], N_LAYER)
LAZY_ONLY = leaders_of("1,4", N_LAYER)


@pytest.fixture(scope="module")
def model(core_models: CoreModels) -> CoreModel:
    return core_models["llama-gqa-32"]


@pytest.fixture(params=["global", "visual"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def reference(model: CoreModel, prompt, leader, mode: str, **params) -> np.ndarray:
    """Logits of PyTorch for every row, ``[n, n_vocab]``."""
    return reference_logits(model.hf, model.embeddings(prompt), torch.from_numpy(prompt.visual), leader, mode, **params)


def mixed_context(model: CoreModel, mode: str, leader=MIXED, **params) -> Context:
    return make_context(model.native, lazy_mode=mode, lazy_leader=leader, **params)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(core_models: CoreModels, shape: str, mode: str, plan: str) -> None:
    model, leader = core_models[shape], leaders_of(PLANS[plan], N_LAYER)
    prompt = make_prompt(model.native, TWO_IMAGES)
    expected = reference(model, prompt, leader, mode)
    assert worst_nmse(expected, reference(model, prompt, leader, "off")) > 1e3 * BOUNDS["reference f16"]
    context = mixed_context(model, mode, leader)
    assert context.lazy_mode == mode and list(context.lazy_leader) == leader
    assert_close(decode_in_parts(context, prompt, [len(prompt) - 3, 1, 1, 1]), expected, "reference f16")


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
@pytest.mark.parametrize("score_cache", ["off", "on"])
@pytest.mark.parametrize("attn_impl", ["auto", "scalar", "composed"])
def test_every_attention_path(core_models: CoreModels, mode: str, attn_impl: str, score_cache: str, type_k: str) -> None:
    model = core_models["llama-gqa-80"]
    prompt, leader = make_prompt(model.native, TWO_IMAGES), leaders_of("1,4-5,7,drop:2-3,drop:6", N_LAYER)
    bias = np.random.default_rng(3).normal(size=(N_LAYER, model.native.info.n_head)).astype(np.float32)
    context = mixed_context(
        model, mode, leader, attn_impl=attn_impl, score_cache=score_cache, type_k=type_k, type_v=type_k, n_ubatch=32, vis_bias=bias
    )
    got = decode_in_parts(context, prompt, [len(prompt) - 3, 1, 1, 1])
    expected = reference(model, prompt, leader, mode, type_k=type_k, type_v=type_k, vis_bias=dict(enumerate(bias)))
    assert_close(got, expected, f"reference {type_k}")


@pytest.mark.parametrize("plan", ["inside a block", "after the leader and at the end", "all"])
def test_logits_of_the_rows_that_were_asked_for(model: CoreModel, mode: str, plan: str) -> None:
    # after the last layer with attention only these rows are computed
    prompt, step = make_prompt(model.native, TWO_IMAGES), make_prompt(model.native, "t1", seed=5)
    leader = leaders_of(PLANS[plan], N_LAYER)
    every_row = decode(mixed_context(model, mode, leader), prompt + step)
    for wanted in (np.zeros(len(prompt), bool), np.isin(np.arange(len(prompt)), [0, 8, 30, 77])):
        context = mixed_context(model, mode, leader, n_ubatch=10)
        context.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual, logits=wanted)
        for row in np.flatnonzero(wanted):
            assert_close(context.logits(row)[None], every_row[row][None], "rounding")
        assert_close(decode(context, step), every_row[-1:], "rounding")


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "f16"), ("q4_0", "q4_0")], ids="-".join)
@pytest.mark.parametrize("plan", PLANS)
def test_memory_by_the_shapes(model: CoreModel, mode: str, plan: str, types: tuple[str, str]) -> None:
    info, leader = model.native.info, leaders_of(PLANS[plan], N_LAYER)
    row_bytes = {"f16": 2 * info.head_dim, "q8_0": 34, "q4_0": 18}
    k, v = (math.ceil(row_bytes[name] * info.n_head_kv * 16 / 64) * 64 for name in types)
    dropped = leader.count(-1)
    lazy = sum(of not in (il, -1) for il, of in enumerate(leader))
    context = mixed_context(model, mode, leader, type_k=types[0], type_v=types[1], block_tokens=16)
    decode(context, make_prompt(model.native, TWO_IMAGES))
    usage = context.kv_usage()
    visual = (N_LAYER - dropped) * (k + v) - lazy * k
    text = visual + (lazy * k if mode == "visual" else 0)
    assert (usage["n_lazy_layers"], usage["n_dropped_layers"]) == (lazy, dropped)
    assert (usage["bytes_block_text"], usage["bytes_block_visual"], usage["bytes_block_full"]) == (text, visual, N_LAYER * (k + v))
    assert usage["bytes"] == 3 * text + 5 * visual and usage["bytes_if_full"] == 8 * N_LAYER * (k + v)


@pytest.mark.parametrize("plan", ["inside a block", "the first and the last", "all"])
def test_sequences_and_states(model: CoreModel, mode: str, plan: str, tmp_path: Path) -> None:
    leader = leaders_of(PLANS[plan], N_LAYER)
    prompt, tail = make_prompt(model.native, TWO_IMAGES), make_prompt(model.native, "t3 v17 t4", seed=5)
    context = mixed_context(model, mode, leader, n_seq_max=2)
    decode(context, prompt)
    context.seq_cp(0, 1, 50)
    expected = [decode(mixed_context(model, mode, leader), prompt[:n] + tail)[n:] for n in (50, len(prompt))]
    state = context.state_get()
    context.state_save_file(tmp_path / "s")
    other, by_file = (mixed_context(model, mode, leader, n_seq_max=2) for _ in range(2))
    other.state_set(state)
    by_file.state_load_file(tmp_path / "s")
    for loaded in (context, other, by_file):
        assert loaded.state_get() == state
        assert_close(decode(loaded, tail, 1), expected[0], "rounding")
        assert_close(decode(loaded, tail, 0), expected[1], "rounding")
        loaded.seq_rm(0, len(prompt))
        assert_close(decode(loaded, tail, 0), expected[1], "rounding")


def test_states_of_other_layers_are_refused(model: CoreModel, mode: str) -> None:
    prompt = make_prompt(model.native, "t5 v20")
    mixed, lazy = mixed_context(model, mode), mixed_context(model, mode, LAZY_ONLY)
    for context in (mixed, lazy):
        decode(context, prompt)
    with pytest.raises(StateError, match="leader of layer 2 2, this context has -1"):
        mixed.state_set(lazy.state_get())
    with pytest.raises(StateError, match="leader of layer 2 -1, this context has 2"):
        lazy.state_set(mixed.state_get())
    assert mixed.seq_len() == lazy.seq_len() == len(prompt)


@pytest.mark.parametrize("attn_impl", ["auto", "composed"])
def test_layers_one_after_the_other_equal_all_at_once(model: CoreModel, mode: str, attn_impl: str) -> None:
    prompt, leader = make_prompt(model.native, TWO_IMAGES), leaders_of("4-5,7,drop:0-1,drop:6", N_LAYER)
    with mixed_context(model, mode, leader, attn_impl=attn_impl) as whole:
        expected, full = decode(whole, prompt), whole.kv_usage()
    stream, kv_bytes, dropped = None, 0, 0
    for first, n_layers in ((0, 2), (2, 1), (3, 0)):  # the first two layers keep nothing at all
        with mixed_context(model, mode, leader, layer_first=first, n_layers=n_layers, n_ubatch=32, attn_impl=attn_impl) as part:
            part.capture_start("hidden")
            tokens, embeddings = (prompt.tokens, prompt.embeddings) if stream is None else (None, stream)
            part.decode(tokens, embeddings, modality=prompt.visual, logits=True)
            kv_bytes, dropped = kv_bytes + part.kv_usage()["bytes"], dropped + part.kv_usage()["n_dropped_layers"]
            if n_layers:
                stream = np.stack([part.captured("hidden", first + n_layers - 1, row) for row in range(len(prompt))])
            else:
                assert_close(rows_of_logits(part, len(prompt)), expected, "rounding")
    assert (kv_bytes, dropped) == (full["bytes"], full["n_dropped_layers"])
    with mixed_context(model, mode, leader, n_layers=2) as part:  # rows nobody asked for, of layers that keep nothing
        part.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual, logits=False)
        assert part.seq_len() == len(prompt) and part.kv_usage()["bytes"] == 0


@pytest.mark.parametrize("attn_impl", ["auto", "composed"])
def test_capture(model: CoreModel, mode: str, attn_impl: str) -> None:
    prompt, leader = make_prompt(model.native, TWO_IMAGES), leaders_of("1,4,drop:2-3,drop:7", N_LAYER)
    layers: list[dict[str, np.ndarray]] = []
    reference(model, prompt, leader, mode, layers=layers)
    rows = np.array([3, 20, 46, 77])
    with mixed_context(model, mode, leader, attn_impl=attn_impl) as context:
        context.capture_start("scores", "probs", "attn", "hidden")
        context.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual, logits=np.isin(np.arange(len(prompt)), rows))
        for il, layer in enumerate(layers):
            for row in rows:
                np.testing.assert_allclose(context.captured("hidden", il, row), layer["hidden"][row], rtol=2e-3, atol=2e-3)
                if leader[il] != -1:
                    np.testing.assert_allclose(context.captured("probs", il, row), layer["probs"][row][:, : row + 1], rtol=1e-2, atol=1e-4)
                    continue
                for what in ("scores", "probs", "attn"):
                    with pytest.raises(ValueError, match=f"layer {il} has no attention"):
                        context.captured(what, il, row)
            if leader[il] == -1:
                with pytest.raises(InvalidArgumentError, match=f"layer {il} has no attention and keeps no V"):
                    context.seq_v(il)
            else:
                np.testing.assert_allclose(context.seq_v(il), layer["v"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("keep_qk", [False, True])
def test_files_equal_layers_dropped_at_load(model: CoreModel, tmp_path: Path, mode: str, keep_qk: bool) -> None:
    convert(model.checkpoint, tmp_path / "m.gguf", None, "f32", PLANS["inside a block"], mode, keep_qk)
    prompt = make_prompt(model.native, TWO_IMAGES)
    expected = decode(mixed_context(model, mode), prompt)
    with Model(tmp_path / "m.gguf") as native:
        assert (native.info.lazy_mode, list(native.info.lazy_leader)) == (mode, MIXED)
        with make_context(native) as context:
            np.testing.assert_array_equal(decode(context, prompt), expected)
        more = leaders_of("1,drop:2-4", N_LAYER)
        with make_context(native, lazy_mode=mode, lazy_leader=more) as context:
            assert_close(decode(context, prompt), reference(model, prompt, more, mode), "reference f16")
        if keep_qk:
            for leader in (None, LAZY_ONLY):
                lazy = {"lazy_mode": "off"} if leader is None else {"lazy_mode": mode, "lazy_leader": leader}
                with make_context(native, **lazy) as context:
                    assert_close(decode(context, prompt), reference(model, prompt, leader or MIXED, lazy["lazy_mode"]), "reference f16")
            return
        assert native.info.n_bytes < model.native.info.n_bytes
        message = "layer 2 needs blk.2.attn_norm.weight, attn_v.weight and attn_output.weight, which the file left out.*--keep-qk"
        for lazy in ({"lazy_mode": mode, "lazy_leader": leaders_of("1-2,4,drop:3", N_LAYER)}, {"layer_first": 2, "lazy_mode": "off"}):
            with pytest.raises(UnsupportedError, match=message):
                make_context(native, **lazy)
        with make_context(native, layer_first=5, lazy_mode="off") as context:  # needs none of them
            assert context.lazy_mode == "off"
        with pytest.raises(InvalidArgumentError, match="the model has no weight blk.3.attn_output.weight"):
            native.set_weight("blk.3.attn_output.weight", np.zeros(4))
        native.set_weight("blk.3.ffn_norm.weight", np.ones(native.info.n_embd))


@pytest.mark.parametrize("missing", ["attn_norm", "attn_v", "attn_output"])
def test_files_may_leave_out_what_a_dropped_layer_does_not_need(model: CoreModel, tmp_path: Path, missing: str) -> None:
    convert(model.checkpoint, tmp_path / "kept.gguf", None, "f32", PLANS["inside a block"], "visual", keep_qk=True)
    name = f"blk.2.{missing}.weight"
    with Model(rewrite_gguf(tmp_path / "kept.gguf", tmp_path / "m.gguf", tensors={name: None})) as native:
        with make_context(native) as context:
            prompt = make_prompt(native, "t5 v9 t3")
            np.testing.assert_array_equal(decode(context, prompt), decode(mixed_context(model, "visual"), prompt))
        with pytest.raises(UnsupportedError, match="layer 2 needs blk.2.attn_norm.weight"):
            make_context(native, lazy_mode="off")


def test_pruning_needs_attention(model: CoreModel) -> None:
    with pytest.raises(ValueError, match="layer=4: layer 3 has no attention by which tokens could be pruned"):
        PrunedContext(model.native, 4, 0.5, lazy_mode="visual", lazy_leader=leaders_of("1,drop:3", N_LAYER))
    prompt = make_prompt(model.native, "t5 v20 t4")
    with PrunedContext(model.native, 3, 0.5, n_threads_batch=1, lazy_mode="visual", lazy_leader=leaders_of("1,drop:3", N_LAYER)) as context:
        assert len(context.prefill(prompt.tokens, prompt.embeddings, prompt.visual)) == 19


#
# the Python side
#


def test_llama_drops_what_it_is_told_to() -> None:
    question = [user("What is this?", picture(1))]
    with load("dropped") as by_file, load("plain", lazy_layers=DROPPED_LAYERS) as at_load, load("plain") as plain:
        assert by_file.lazy == at_load.lazy and by_file.lazy.mode == "visual"
        assert (by_file.lazy.n_lazy, by_file.lazy.n_dropped) == (3, 3)
        assert ask(by_file, question) == ask(at_load, question)
        assert ask(plain, question)
        usage, full = by_file.kv_cache_usage(), plain.kv_cache_usage()
        assert usage == at_load.kv_cache_usage()
        assert (usage["lazy_layers"], usage["dropped_layers"]) == (3, 3) and (full["lazy_layers"], full["dropped_layers"]) == (0, 0)
        assert usage["bytes_if_full"] == usage["blocks"] * full["bytes_block_full"]
        assert usage["bytes_block_text"] * 8 == full["bytes_block_full"] * 5
        assert usage["bytes_block_visual"] * 16 == full["bytes_block_full"] * 7
    with load("plain", lazy_layers="drop:1-2") as llm:  # nothing lazy
        assert llm.lazy == ("visual", (0, -1, -1, 3, 4, 5, 6, 7))
    with load("plain", lazy_layers="drop:1", lazy_mode="global") as llm:
        assert llm.lazy.mode == "global"
    for arguments, error, message in (
        ({"file": "dropped", "lazy_layers": "none"}, UnsupportedError, "layer 3 needs blk.3.attn_norm.weight"),
        ({"lazy_layers": "drop:0-1,2"}, ValueError, "layer 2 can't be lazy: every layer before it is dropped"),
        ({"lazy_layers": "drop:8"}, ValueError, "layer 8 is out of range"),
        ({"lazy_layers": "none", "lazy_mode": "global"}, ValueError, "no layer is lazy"),
    ):
        with pytest.raises(error, match=message):
            load(**arguments)


def test_inspection(capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect_file(tiny_llava().dropped)
    assert facts["lazy"]["leader"] == [0, 1, 1, -1, 1, -1, -1, 1]
    assert (facts["lazy"]["lazy_layers"], facts["lazy"]["dropped_layers"]) == ([2, 4, 7], [3, 5, 6])
    kv = facts["kv_bytes_per_1000_tokens"]
    assert (kv["text"] / kv["full"], kv["visual"] / kv["full"]) == (5 / 8, 7 / 16)
    assert main(["inspect", tiny_llava().dropped]) == 0
    shown = capsys.readouterr().out
    assert "3 of 8 layers lazy, visual mode, 3 without attention" in shown
    rows = [line.split() for line in shown.splitlines() if line.rstrip().endswith(("K V", "· V", "· ·"))]
    assert rows[3][:6] == ["3", "│", "no", "attention", "·", "·"] and rows[1][1:3] == ["┌", "leader"] and rows[7][1] == "└"
