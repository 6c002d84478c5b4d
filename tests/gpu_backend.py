"""Layers on a GPU against layers on the CPU: logits, sequences, states, placement and answers about images.

Needs a GPU that the library has kernels for. test_gpu_backend.py runs it with an emulated one; on a machine with a
real one, `pytest tests/gpu_backend.py` (bench/gpu.sh does).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_helpers import N_LAYER, CoreModel, CoreModels, decode, decode_in_parts, make_prompt, worst_nmse
from tiny_llava import ask, load, user

from ggml_qcache import Llama
from ggml_qcache.errors import InvalidArgumentError, UnsupportedError
from ggml_qcache.native import Context, Model
from ggml_qcache_convert import convert, leaders_of

# Largest NMSE of a row's logits, by type of the KV cache: a K or V value that rounds the other way moves what follows. Few
# rows are computed in float32; many on matrix units, with Q and the probabilities in f16.
FEW_ROWS_MAX = {"f16": 1e-6, "q8_0": 1e-3, "q4_0": 3e-2}
MANY_ROWS_MAX = {"f16": 1e-5, "q8_0": 1e-3, "q4_0": 3e-2}

MINI = Path(__file__).parents[1] / "examples" / "mini-llava"
QUESTIONS = json.loads((MINI / "images" / "questions.json").read_text())
LEADER = leaders_of([1, 2, 4, 6, 7], N_LAYER)
PROMPT = "t7 v37 t5 v20 t9"


@pytest.fixture(scope="module", params=["llama-gqa-32", "qwen2-gqa-64"])
def model(core_models: CoreModels, request: pytest.FixtureRequest) -> CoreModel:
    return core_models[request.param]


@pytest.fixture(scope="module")
def gpu(model: CoreModel) -> Model:
    return Model(model.path, n_gpu_layers=-1)


def make(model: Model, mode: str = "off", **params) -> Context:
    lazy = {} if mode == "off" else {"lazy_mode": mode, "lazy_leader": LEADER}
    return Context(model, **{"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "n_seq_max": 3, **lazy, **params})


@pytest.mark.parametrize("mode", ["off", "global", "visual"])
@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q8_0")], ids="-".join)
def test_logits(model: CoreModel, gpu: Model, mode: str, types: tuple[str, str]) -> None:
    params = {"type_k": types[0], "type_v": types[1]}
    prompt = make_prompt(gpu, PROMPT)
    whole = decode(make(gpu, mode, **params), prompt)
    expected = decode(make(model.native, mode, **params), prompt)
    assert worst_nmse(whole, expected) <= MANY_ROWS_MAX[types[0]]
    few = decode_in_parts(make(gpu, mode, **params), prompt, [3, 1])
    assert worst_nmse(few, expected) <= FEW_ROWS_MAX[types[0]]


@pytest.mark.parametrize("mode", ["global", "visual"])
def test_v_skipping(gpu: Model, mode: str) -> None:
    """Little is lost while little may be left out, and something is where much may."""
    prompt = make_prompt(gpu, PROMPT)
    exact = decode_in_parts(make(gpu, mode, score_cache="on"), prompt, [3, 1])
    few, many = (worst_nmse(decode_in_parts(make(gpu, mode, v_skip=share), prompt, [3, 1]), exact) for share in (1e-4, 0.5))
    assert few < 1e-3 and many > few


@pytest.mark.parametrize("mode", ["global", "visual"])
def test_score_cache_and_bias(model: CoreModel, gpu: Model, mode: str) -> None:
    prompt = make_prompt(gpu, PROMPT)
    bias = np.random.default_rng(3).normal(0, 1, (N_LAYER, gpu.info.n_head)).astype(np.float32) if mode == "visual" else None
    params = {"vis_bias": bias}
    expected = decode_in_parts(make(model.native, mode, **params), prompt, [20, 1, 1])
    for score_cache in ("off", "on"):
        got = decode_in_parts(make(gpu, mode, score_cache=score_cache, **params), prompt, [20, 1, 1])
        assert worst_nmse(got, expected) <= MANY_ROWS_MAX["f16"]


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_composed(model: CoreModel, gpu: Model, kv: str) -> None:
    prompt = make_prompt(gpu, PROMPT)
    types = {"type_k": kv, "type_v": kv}
    expected = decode(make(model.native, "visual", **types), prompt)
    composed = decode(make(gpu, "visual", attn_impl="composed", **types), prompt)
    # both have the matrix products of the device, TF32 on some
    assert worst_nmse(composed, expected) <= 3 * MANY_ROWS_MAX[kv]
    assert worst_nmse(decode(make(gpu, "visual", **types), prompt), composed) <= MANY_ROWS_MAX[kv]


@pytest.mark.parametrize("mode", ["off", "global", "visual"])
def test_part_of_the_layers(model: CoreModel, mode: str) -> None:
    prompt = make_prompt(model.native, PROMPT)
    expected = decode_in_parts(make(model.native, mode), prompt, [40, 1, 7])
    for n_gpu_layers in (3, 5):  # from layer 5 and 3 on, which are full
        part = Model(model.path, n_gpu_layers=n_gpu_layers)
        assert part.info.n_gpu_layers == n_gpu_layers and 0 < part.info.n_bytes_gpu < part.info.n_bytes
        context = make(part, mode)
        assert worst_nmse(decode_in_parts(context, prompt, [40, 1, 7]), expected) <= MANY_ROWS_MAX["f16"]
        assert context.kv_usage() == used(make(model.native, mode), prompt)
        assert ", " in context.attn_name
        part.close()


def used(context: Context, prompt):
    decode(context, prompt)
    return context.kv_usage()


def test_sequences_share_blocks(model: CoreModel, gpu: Model) -> None:
    results = []
    for native in (model.native, gpu):
        context = make(native, "visual")
        decode(context, make_prompt(gpu, PROMPT))
        context.seq_cp(0, 2, 50)  # the last block is shared in part: the first to write copies it
        tail = make_prompt(gpu, "t3 v17 t4", seed=5)
        results.append(np.concatenate([decode(context, tail, 2), decode(context, tail, 0), decode(context, tail[:2], 1)]))
    assert worst_nmse(results[1], results[0]) <= MANY_ROWS_MAX["f16"]


def test_states_go_from_one_to_the_other(model: CoreModel, gpu: Model) -> None:
    part = Model(model.path, n_gpu_layers=3)
    tail = make_prompt(gpu, "t3 v17 t4", seed=5)
    for origin in (model.native, gpu, part):
        source = make(origin, "visual")
        decode(source, make_prompt(gpu, PROMPT))
        state, values = source.state_get(), source.seq_v(6)
        expected = decode(source, tail)
        for target in (model.native, gpu, part):
            context = make(target, "visual")
            context.state_set(state)
            assert context.state_get() == state
            assert np.array_equal(context.seq_v(6), values)
            assert worst_nmse(decode(context, tail), expected) <= MANY_ROWS_MAX["f16"]
    part.close()


def test_a_lazy_block_is_not_torn(model: CoreModel, tmp_path: Path) -> None:
    convert(model.checkpoint, tmp_path / "lazy.gguf", None, "f32", lazy_layers="2-3,5-7")
    for asked, given in ((1, 0), (3, 0), (4, 4), (5, 4), (6, 4), (7, 7), (8, 8), (99, 8), (-1, 8)):
        with Model(tmp_path / "lazy.gguf", n_gpu_layers=asked) as placed:
            assert placed.info.n_gpu_layers == given, asked
    # layers named at load know nothing of where the weights are
    with Model(model.path, n_gpu_layers=2) as torn:
        with pytest.raises(InvalidArgumentError, match="layer 6 is lazy and on the GPU, its leader 5 is not.* 0 or 3 would do"):
            make(torn, "visual")
        assert make(torn).kv_usage()["bytes"] == 0


def test_refusals(model: CoreModel, gpu: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="main_gpu is 7"):
        Model(model.path, n_gpu_layers=-1, main_gpu=7)
    with pytest.raises(InvalidArgumentError, match="scalar"):
        make(gpu, attn_impl="scalar")
    context = make(gpu)
    with pytest.raises(UnsupportedError, match="n_gpu_layers 0"):
        context.capture_start("probs")
    assert decode(context, make_prompt(gpu, "t4")).shape == (4, gpu.info.n_vocab)


def test_device_report() -> None:
    for n_gpu_layers, layers in ((-1, 8), (4, 4), (0, 0)):
        with load("visual", n_gpu_layers=n_gpu_layers) as llm:
            report = llm.device_report()
            assert report["gpu_layers"] == layers and (report["weight_bytes_gpu"] > 0) == (layers > 0)
            assert ("layers 4-7" in report["kv"]) == (layers == 4)


@pytest.fixture(scope="module")
def mini_llava(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mini")
    convert(MINI / "model", folder / "m.gguf", folder / "mm.gguf", "q8_0", lazy_layers="1-7,9-15,17-23,25-27,29-31", lazy_mode="visual")
    return {"model_path": str(folder / "m.gguf"), "mmproj_path": str(folder / "mm.gguf"), "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}


@pytest.mark.parametrize("n_gpu_layers", [-1, 9])
@pytest.mark.parametrize("number", range(len(QUESTIONS)), ids=[f"{question['task']}-{question['image']}" for question in QUESTIONS])
def test_mini_llava_answers(mini_llava: dict[str, Any], number: int, n_gpu_layers: int) -> None:
    question = QUESTIONS[number]
    with Llama(**mini_llava) as cpu, Llama(**mini_llava, n_gpu_layers=n_gpu_layers) as gpu:
        message = [user(question["question"], MINI / "images" / question["image"])]
        assert ask(gpu, message, 40) == ask(cpu, message, 40)
        assert gpu.kv_cache_usage() == cpu.kv_cache_usage()
