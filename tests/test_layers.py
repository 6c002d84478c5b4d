"""A context over some of the layers, positions given by the caller, weights and biases replaced at run time."""

import numpy as np
import pytest
from core_helpers import (
    BOUNDS,
    N_LAYER,
    SHAPES,
    CoreModels,
    assert_close,
    decode,
    make_context,
    make_prompt,
    rewrite_gguf,
    rows_of_logits,
    worst_nmse,
)

from ggml_qcache.errors import InvalidArgumentError, StateError
from ggml_qcache.native import Model, float_buffer
from ggml_qcache_convert import convert, leaders_of
from ggml_qcache_convert.calibration.weights import Weights

PATTERN = "t7 v37 e5 v20 t9"
LEADER = leaders_of([1, 2, 5, 7], N_LAYER)


def hidden_rows(context, layer: int, n: int) -> np.ndarray:
    """``[n, n_embd]`` after a layer."""
    return np.stack([context.captured("hidden", layer, row) for row in range(n)])


@pytest.mark.parametrize("attn_impl", ["auto", "composed"])
@pytest.mark.parametrize("mode", ["off", "visual", "global"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_one_after_the_other_equal_all_at_once(core_models: CoreModels, shape: str, mode: str, attn_impl: str) -> None:
    model = core_models[shape].native
    prompt = make_prompt(model, PATTERN)
    lazy = {"lazy_mode": mode, "attn_impl": attn_impl} | ({} if mode == "off" else {"lazy_leader": LEADER})
    with make_context(model, **lazy) as whole:
        expected = decode(whole, prompt)
        full = whole.kv_usage()
    stream, kv_bytes, full_bytes = None, 0, 0
    for first, n_layers in ((0, 3), (3, 1), (4, 0)):
        with make_context(model, layer_first=first, n_layers=n_layers, n_ubatch=32, **lazy) as part:
            part.capture_start("hidden")
            tokens, embeddings = (prompt.tokens, prompt.embeddings) if stream is None else (None, stream)
            part.decode(tokens, embeddings, modality=prompt.visual, logits=True)
            usage = part.kv_usage()
            kv_bytes, full_bytes = kv_bytes + usage["bytes"], full_bytes + usage["bytes_if_full"]
            if n_layers:
                stream = hidden_rows(part, first + n_layers - 1, len(prompt))
                with pytest.raises(ValueError, match=f"layers {first} .. {first + n_layers - 1} of {N_LAYER}"):
                    part.logits()
            else:
                assert_close(rows_of_logits(part, len(prompt)), expected, "rounding")
    assert (kv_bytes, full_bytes) == (full["bytes"], full["bytes_if_full"])


def test_rows_nobody_asked_for(core_models: CoreModels) -> None:
    # the last of the layers only has to leave its K and V
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, "t5 v20 t6")
    with make_context(model, n_layers=3) as one, make_context(model, n_layers=3) as two:
        for context, wanted in ((one, True), (two, False)):
            context.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual, logits=wanted)
        for layer in range(3):
            np.testing.assert_allclose(two.seq_v(layer), one.seq_v(layer), rtol=1e-3, atol=1e-4)


def test_next_token(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    rows = np.empty((2, model.info.n_vocab), np.float32)
    with make_context(model) as whole, make_context(model) as other:
        for tokens in ([5, 6], [7]):
            whole.decode(tokens)
        for token, n_past in ((5, 0), (6, 1), (9, 2), (7, 2)):  # the last takes the place of 9
            other.next_token(token, n_past, float_buffer(rows), row=1)
        assert_close(rows[1:], whole.logits()[None], "rounding")
        assert other.seq_len() == 3
        with pytest.raises(ValueError):
            float_buffer(np.frombuffer(rows.tobytes(), np.float32))
        for bad, row in ((rows[0, 1:], 0), (rows, 2), (rows, -1)):
            with pytest.raises(ValueError, match=f"row {row} of {model.info.n_vocab} values"):
                other.next_token(8, 3, float_buffer(bad), row)
        assert other.seq_len() == 3
    with make_context(model, n_layers=3) as part:
        part.decode([5])
        with pytest.raises(InvalidArgumentError, match=f"layers 0 .. 2 of {N_LAYER}"):
            part.next_token(6, 1, float_buffer(rows))
        assert part.seq_len() == 1


def test_bad_layers(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    for params, message in (
        ({"layer_first": -1}, "layer_first is -1"),
        ({"layer_first": N_LAYER}, f"layer_first is {N_LAYER}, the model has layers 0 .. {N_LAYER - 1}"),
        ({"layer_first": 3, "n_layers": 6}, "n_layers is 6, from layer 3 on the model has 5"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"layer_first": 2, "lazy_mode": "visual", "lazy_leader": LEADER}, "layer 2 is lazy and its leader 0 comes before layer_first 2"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            make_context(model, **params)
    prompt = make_prompt(model, "v20")
    with make_context(model, layer_first=3) as context:
        with pytest.raises(InvalidArgumentError, match="row 0 is token 5: a context that starts at layer 3 takes embeddings"):
            context.decode([5])
        context.decode(None, prompt.embeddings)
        with pytest.raises(InvalidArgumentError, match="the context has layers 3 .. 7"):
            context.seq_v(2)
        state = context.state_get()
        assert context.seq_len() == 20
    with make_context(model, layer_first=2) as other, pytest.raises(StateError):
        other.state_set(state)


def test_positions(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, PATTERN)
    n = len(prompt)

    def logits(pos: np.ndarray | None, size: int = n) -> np.ndarray:
        with make_context(model) as context:
            out = []
            for start in range(0, n, size):
                rows = slice(start, start + size)
                context.decode(
                    prompt.tokens[rows], prompt.embeddings[rows], modality=prompt.visual[rows], logits=True,
                    pos=None if pos is None else pos[rows],
                )  # fmt: skip
                out.append(rows_of_logits(context, len(prompt.tokens[rows])))
            return np.concatenate(out)

    usual = logits(None)
    assert np.array_equal(logits(np.arange(n)), usual)
    assert worst_nmse(logits(np.arange(n) + 50), usual) < 1e-5  # only distances count, but K is rounded after the rotation
    gap = np.arange(n) + 30 * (np.arange(n) >= 20)
    assert_close(logits(gap, 13), logits(gap), "rounding")
    assert_close(logits(gap)[:20], usual[:20], "rounding")
    assert worst_nmse(logits(gap)[20:], usual[20:]) > 1e-4
    with make_context(model) as context:
        context.decode([5, 6, 7])
        with pytest.raises(InvalidArgumentError, match="pos -1 of row 1 is negative"):
            context.decode([5, 6], pos=[3, -1])
        with pytest.raises(ValueError, match="pos has shape"):
            context.decode([5, 6], pos=[3])
        assert context.seq_len() == 3


def test_pruned_rows_equal_rows_that_were_never_there(core_models: CoreModels) -> None:
    # the rows left over keep their positions: what a row attends to doesn't depend on where it lies in the cache
    model = core_models["qwen2-gqa-64"].native
    prompt = make_prompt(model, "t4 v30 t6")
    kept = np.delete(np.arange(len(prompt)), np.arange(6, 20))
    with make_context(model) as masked, make_context(model) as at_once:
        out = []
        for row in kept:
            rows = slice(row, row + 1)
            masked.decode(prompt.tokens[rows], prompt.embeddings[rows], modality=prompt.visual[rows], logits=True, pos=[row])
            out.append(masked.logits())
        at_once.decode(prompt.tokens[kept], prompt.embeddings[kept], modality=prompt.visual[kept], logits=True, pos=kept)
        assert_close(rows_of_logits(at_once, len(kept)), np.stack(out), "rounding")


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0", "q4_0"])
def test_weights_set_equal_weights_read(core_models: CoreModels, tmp_path, outtype: str) -> None:
    model = core_models["llama-mha-64"]  # 128 values a row: repacked where ggml can
    convert(model.checkpoint, tmp_path / "m.gguf", None, outtype)
    weights = Weights(tmp_path / "m.gguf")
    prompt = make_prompt(model.native, "t7 v20 t5")
    names = ["blk.2.attn_output.weight", "blk.5.attn_v.weight", "blk.3.attn_norm.weight", "token_embd.weight"]
    rng = np.random.default_rng(1)
    new = {name: weights[name] * rng.uniform(0.5, 1.5, weights[name].shape).astype(np.float32) for name in names}

    def logits(native: Model) -> np.ndarray:
        with make_context(native) as context:
            return decode(context, prompt)

    with Model(tmp_path / "m.gguf") as native:
        before = logits(native)
        with weights.replaced(native, new):
            changed = logits(native)
        np.testing.assert_array_equal(logits(native), before)  # a weight that went through its type is not rounded again
        for name in names:
            native.set_weight(name, weights.rounded(name, new[name]))
        np.testing.assert_array_equal(logits(native), changed)
    assert worst_nmse(changed, before) > 1e-3
    if outtype == "f32":
        rewrite_gguf(tmp_path / "m.gguf", tmp_path / "n.gguf", tensors=new)
        with Model(tmp_path / "n.gguf") as native:
            np.testing.assert_array_equal(logits(native), changed)


def test_weights_refused(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, "t7")
    name, shape = "blk.1.attn_norm.weight", model.info.n_embd
    with make_context(model) as context:
        before = decode(context, prompt)
        for bad, values, message in (
            ("blk.99.attn_norm.weight", np.zeros(4), "no weight blk.99.attn_norm.weight"),
            (name, np.zeros(shape - 1), f"n_values is {shape - 1}, {name} has {shape}"),
            (name, np.full(shape, np.nan), f"value 0 of {shape} for {name} is nan"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                model.set_weight(bad, values)
        context.clear()
        np.testing.assert_array_equal(decode(context, prompt), before)


@pytest.mark.parametrize("attn_impl", ["auto", "composed"])
def test_bias_given_equals_bias_read(core_models: CoreModels, tmp_path, attn_impl: str) -> None:
    model = core_models["llama-gqa-32"]
    bias = np.random.default_rng(5).normal(size=(N_LAYER, 4)).astype(np.float32)
    files = {f"blk.{layer}.attn_vis_bias.weight": bias[layer] for layer in range(N_LAYER)}
    rewrite_gguf(model.path, tmp_path / "m.gguf", tensors=files)
    prompt = make_prompt(model.native, PATTERN)
    lazy = {"lazy_mode": "visual", "lazy_leader": LEADER, "attn_impl": attn_impl}
    with Model(tmp_path / "m.gguf") as native, make_context(native, **lazy) as read, make_context(native, vis_bias=0 * bias, **lazy) as none:
        expected, without = decode(read, prompt), decode(none, prompt)
    with make_context(model.native, vis_bias=bias, **lazy) as given, make_context(model.native, **lazy) as plain:
        np.testing.assert_array_equal(decode(given, prompt), expected)
        assert_close(decode(plain, prompt), without, "rounding")
    assert worst_nmse(without, expected) > 10 * BOUNDS["rounding"]
    for bad, message in ((bias[1:], "vis_bias has 28 values, 8 layers of 4 heads need 32"), (bias * np.inf, "vis_bias of layer 0, head 0 is")):
        with pytest.raises(InvalidArgumentError, match=message):
            make_context(model.native, vis_bias=bad, **lazy)
