"""What the core captures of each layer, against PyTorch and NumPy."""

import numpy as np
import pytest
import torch
from core_helpers import BOUNDS, N_LAYER, SHAPES, CoreModels, decode, make_context, make_prompt, quantised, rewrite_gguf
from hf_models import nmse
from ref_torch import reference_logits

from ggml_qcache.errors import InvalidArgumentError
from ggml_qcache.native import Context, Model
from ggml_qcache_convert import convert, leaders_of

PATTERN = "t7 v37 e5 v20 t9"
LEADER = leaders_of([1, 2, 4, 7], N_LAYER)
KINDS = ("scores", "probs", "attn", "hidden")


def assert_captured(context, layers, rows, bound: float) -> None:
    """Compares every kind of every layer for some rows, and V of the whole sequence."""
    for il, expected in enumerate(layers):
        for row in rows:
            for kind in KINDS:
                got = context.captured(kind, il, row)
                wanted = expected[kind][row][..., : row + 1] if kind in ("scores", "probs") else expected[kind][row]
                assert got.shape == wanted.shape
                assert nmse(got, wanted) <= bound, (kind, il, row)
        assert nmse(context.seq_v(il), expected["v"]) <= bound
    assert len(layers) == N_LAYER


@pytest.mark.parametrize("mode", ["off", "visual", "global"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch(core_models: CoreModels, shape: str, mode: str) -> None:
    model = core_models[shape]
    prompt = make_prompt(model.native, PATTERN)
    layers: list[dict[str, np.ndarray]] = []
    reference_logits(model.hf, model.embeddings(prompt), torch.from_numpy(prompt.visual), LEADER, mode, layers=layers)
    rows = [0, 6, 7, 43, 44, 50, 70, 77]
    for params in ({}, {"n_ubatch": 16}, {"attn_impl": "composed"}, {"score_cache": "off", "block_tokens": 16}):
        lazy = {} if mode == "off" else {"lazy_leader": LEADER}
        with make_context(model.native, lazy_mode=mode, **lazy, **params) as context:
            context.capture_start(*KINDS)
            flags = np.isin(np.arange(len(prompt)), rows)
            context.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual, logits=flags)
            assert_captured(context, layers, rows, BOUNDS["reference f16"])


@pytest.mark.parametrize(("weights", "cache", "bound"), [("f32", "q8_0", BOUNDS["reference q8_0"]), ("q8_0", "f16", 2e-2)])
def test_quantised_weights_and_cache(core_models: CoreModels, tmp_path, weights: str, cache: str, bound: float) -> None:
    # quantised weights: ggml rounds activations too where they meet them, which the reference does not do
    model = core_models["llama-gqa-32"]
    convert(model.checkpoint, tmp_path / "m.gguf", None, weights)
    prompt = make_prompt(model.native, PATTERN)
    layers: list[dict[str, np.ndarray]] = []
    types = {"type_k": cache, "type_v": cache}
    hf = model.hf if weights == "f32" else quantised(model.hf, weights)
    reference_logits(hf, model.embeddings(prompt), torch.from_numpy(prompt.visual), LEADER, "visual", layers=layers, **types)
    with Model(tmp_path / "m.gguf") as native, make_context(native, lazy_mode="visual", lazy_leader=LEADER, **types) as context:
        context.capture_start(*KINDS)
        decode(context, prompt)
        assert_captured(context, layers, [10, 70, 77], bound)


def test_bias_of_visual_keys_counts(core_models: CoreModels, tmp_path) -> None:
    model = core_models["llama-gqa-32"]
    bias = np.linspace(-1, 1, model.native.info.n_head).astype(np.float32)
    path = rewrite_gguf(model.path, tmp_path / "m.gguf", tensors={"blk.2.attn_vis_bias.weight": bias})
    prompt = make_prompt(model.native, PATTERN)
    layers: list[dict[str, np.ndarray]] = []
    visual = torch.from_numpy(prompt.visual)
    reference_logits(model.hf, model.embeddings(prompt), visual, LEADER, "visual", {2: bias}, layers=layers)
    with Model(path) as native, make_context(native, lazy_mode="visual", lazy_leader=LEADER) as context:
        context.capture_start("probs")
        decode(context, prompt)
        for row in (20, 77):
            assert nmse(context.captured("probs", 2, row), layers[2]["probs"][row][:, : row + 1]) <= BOUNDS["reference f16"]


def test_rows_of_several_sequences(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, "t5 v9 t3")
    with make_context(model) as alone, make_context(model, n_seq_max=2) as both:
        for context in (alone, both):
            context.capture_start("probs", "attn")
        decode(alone, prompt)
        expected = alone.captured("attn", 5, -1)
        twice = prompt + prompt
        both.decode(twice.tokens, twice.embeddings, modality=twice.visual, seq_id=np.repeat([0, 1], len(prompt)), logits=True)
        assert nmse(both.captured("attn", 5, len(prompt) - 1), expected) <= BOUNDS["rounding"]
        assert nmse(both.captured("attn", 5, -1), expected) <= BOUNDS["rounding"]
        assert both.captured("probs", 5, -1).shape == (model.info.n_head, len(prompt))
        np.testing.assert_array_equal(both.seq_v(3, 0), both.seq_v(3, 1))


def test_decoding_token_by_token(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, "t5 v9 t3")
    with make_context(model, lazy_mode="visual", lazy_leader=LEADER) as context:
        context.capture_start("probs")
        decode(context, prompt)
        expected = context.captured("probs", 7)
        context.seq_rm(0, len(prompt) - 1)
        context.decode([int(prompt.tokens[-1])])
        got = context.captured("probs", 7)
        assert nmse(got, expected) <= BOUNDS["rounding"]
        np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


def test_what_is_not_captured(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, "t5 v9 t3")
    with make_context(model, n_ctx=40) as context:
        with pytest.raises(ValueError, match="what='nothing' is not one of 'scores', 'probs', 'attn', 'hidden'"):
            context.capture_start("nothing")
        with pytest.raises(InvalidArgumentError, match="what to capture is 0"):
            context.capture_start()
        context.decode(prompt.tokens, prompt.embeddings)
        with pytest.raises(ValueError, match="capture is off"):
            context.captured("probs", 0)
        context.capture_start("probs")
        with pytest.raises(ValueError, match="it was not asked for before that"):
            context.captured("probs", 0)
        context.decode(prompt.tokens, prompt.embeddings)
        assert context.captured("probs", 0).shape == (model.info.n_head, 2 * len(prompt))
        for what, layer, row, message in (
            ("probs", N_LAYER, -1, f"layer {N_LAYER} is out of range"),
            ("probs", -1, -1, "layer -1 is out of range"),
            ("probs", 0, 0, "row 0 of the last batch has no logits"),
            ("probs", 0, 99, "row 99 is out of range"),
            ("attn", 0, -1, "kind 4 was not captured"),
        ):
            with pytest.raises(ValueError, match=message):
                context.captured(what, layer, row)
        with pytest.raises(InvalidArgumentError, match=f"layer {N_LAYER}"):
            context.seq_v(N_LAYER)
        with pytest.raises(InvalidArgumentError, match="sequence 1"):
            context.seq_v(0, 1)
        with pytest.raises(Exception, match="n_ctx"):
            context.decode(prompt.tokens, prompt.embeddings)
        with pytest.raises(ValueError, match="out of range"):  # a failed batch leaves nothing
            context.captured("probs", 0)
        context.capture_stop()
        context.decode([5])
        with pytest.raises(ValueError, match="capture is off"):
            context.captured("probs", 0)


def test_capture_may_start_and_stop_between_batches(core_models: CoreModels) -> None:
    # every row has logits: what is captured then adds no node to the graph
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, "t9 v20 t8")

    def hidden(context: Context) -> np.ndarray:
        return np.stack([context.captured("hidden", layer, row) for layer in range(N_LAYER) for row in range(len(prompt))])

    with make_context(model) as fresh, make_context(model) as context:
        fresh.capture_start("hidden")
        expected = decode(fresh, prompt)
        for _ in range(2):
            decode(context, prompt + prompt)
            for what in (("hidden",), ("attn", "hidden")):
                context.clear()
                context.capture_start(*what)
                np.testing.assert_array_equal(decode(context, prompt), expected)
                np.testing.assert_array_equal(hidden(context), hidden(fresh))
            context.clear()
            context.capture_stop()
            np.testing.assert_array_equal(decode(context, prompt), expected)
            context.clear()
