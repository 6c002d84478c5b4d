"""The Metal host side through the whole library, on the mock of Metal: steps that fail, and the device with private buffers.

test_metal_backend.py runs it, beside tests of gpu_backend.py, in a process whose libqcache has the mock.
"""

import ctypes
import os

import numpy as np
import pytest
from core_helpers import N_LAYER, CoreModel, CoreModels, decode, decode_in_parts, make_prompt, worst_nmse
from gpu_backend import FEW_ROWS_MAX, MANY_ROWS_MAX, PROMPT, make
from tiny_llava import load

from ggml_qcache.errors import InternalError, UnsupportedError
from ggml_qcache.native import Model

MOCK = ctypes.CDLL(os.environ["LD_PRELOAD"])
LIBRARY, PIPELINE, MAPPING, COMMAND_BUFFER, DISPATCH = 1, 3, 5, 7, 9  # metal_mock::call
PRIVATE = "composed, as MTL1: its buffers are private, our kernels need those that the CPU shares"


@pytest.fixture(scope="module", params=["llama-gqa-32", "llama-gqa-80"])
def model(core_models: CoreModels, request: pytest.FixtureRequest) -> CoreModel:
    return core_models[request.param]


@pytest.fixture(params=[0, 1], ids=["ours-late", "ours-early"], autouse=True)
def order(request: pytest.FixtureRequest) -> None:
    MOCK.metal_mock_order(request.param)


def test_order_of_the_queues(model: CoreModel) -> None:
    with Model(model.path, n_gpu_layers=-1) as gpu:
        prompt = make_prompt(gpu, "t7 v12 t5")
        context = make(gpu, "visual")
        assert context.attn_name == "metal"
        expected = decode_in_parts(make(model.native, "visual"), prompt, [19, 1, 4])
        assert worst_nmse(decode_in_parts(context, prompt, [19, 1, 4]), expected) <= MANY_ROWS_MAX["f16"]


@pytest.mark.parametrize(
    ("what", "after", "text"),
    [
        (PIPELINE, 0, "Metal: compiling qcache_append: Compiler encountered an internal error"),
        (MAPPING, 0, "Metal: cannot map a buffer of"),
        (COMMAND_BUFFER, 3, "Metal: creating a command buffer"),
        (DISPATCH, 5, "Metal: Caused GPU Timeout Error"),
    ],
)
def test_a_step_that_fails(core_models: CoreModels, what: int, after: int, text: str) -> None:
    model = core_models["llama-gqa-32"]
    with Model(model.path, n_gpu_layers=-1) as gpu:
        prompt = make_prompt(gpu, "t5 v4 t2")
        context = make(gpu, "global")
        MOCK.metal_mock_fail(what, after)
        with pytest.raises(InternalError, match=f"computing 11 rows on qcache-MTL0 failed: {text}"):
            decode(context, prompt)
        assert context.kv_usage()["n_blocks"] == 0
        expected = decode(make(model.native, "global"), prompt)
        assert worst_nmse(decode(context, prompt), expected) <= MANY_ROWS_MAX["f16"]


def test_a_start_that_fails(core_models: CoreModels) -> None:
    with Model(core_models["llama-gqa-32"].path, n_gpu_layers=-1) as gpu:
        MOCK.metal_mock_fail(LIBRARY, 0)
        with pytest.raises(InternalError, match="Metal: compiling the kernels: program_source:12:3: error"):
            make(gpu)
        assert make(gpu).attn_name == "metal"


@pytest.mark.parametrize("mode", ["off", "global", "visual"])
@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q4_0")], ids="-".join)
def test_composed_on_private_buffers(model: CoreModel, mode: str, types: tuple[str, str]) -> None:
    params = {"type_k": types[0], "type_v": types[1]}
    with Model(model.path, n_gpu_layers=-1, main_gpu=1) as gpu:
        prompt = make_prompt(gpu, PROMPT)
        context = make(gpu, mode, **params)
        assert context.attn_name == PRIVATE
        expected = decode_in_parts(make(model.native, mode, **params), prompt, [40, 1, 7])
        assert worst_nmse(decode_in_parts(context, prompt, [40, 1, 7]), expected) <= FEW_ROWS_MAX[types[1]]


def test_composed_sequences_and_states(model: CoreModel) -> None:
    with Model(model.path, n_gpu_layers=3, main_gpu=1) as gpu:
        results = []
        for native in (model.native, gpu):
            context = make(native, "visual")
            decode(context, make_prompt(gpu, PROMPT))
            context.seq_cp(0, 2, 50)
            tail = make_prompt(gpu, "t3 v17 t4", seed=5)
            for i in range(3):  # both sequences in a batch, of one row each
                rows = tail[i : i + 2]
                context.decode(rows.tokens, rows.embeddings, seq_id=[0, 2], modality=rows.visual)
            fresh = make(native, "visual")
            fresh.state_set(context.state_get())
            results.append(np.concatenate([decode(context, tail, 2), decode(fresh, tail, 0)]))
        assert worst_nmse(results[1], results[0]) <= MANY_ROWS_MAX["f16"]


def test_an_operation_that_the_device_lacks(core_models: CoreModels) -> None:
    with Model(core_models["llama-gqa-32"].path, n_gpu_layers=-1, main_gpu=1) as gpu:
        context, prompt = make(gpu), make_prompt(gpu, "t4")
        MOCK.ggml_mock_refuse(b"SET_ROWS")
        try:
            with pytest.raises(UnsupportedError, match=rf"MTL1 cannot compute node .+ \(SET_ROWS of type f16, from type f32\) of layers 0 .. {N_LAYER - 1}"):
                decode(context, prompt)
        finally:
            MOCK.ggml_mock_refuse(b"")
        assert decode(context, prompt).shape == (4, gpu.info.n_vocab)


def test_v_skip_without_kernels_of_ours(core_models: CoreModels) -> None:
    with Model(core_models["llama-gqa-32"].path, n_gpu_layers=-1, main_gpu=1) as gpu:
        for mode in ("global", "visual"):
            with pytest.raises(UnsupportedError, match="v_skip 0.1, but layers 0 .. [0-9]+ compute without kernels of ours: MTL1: its buffers are private"):
                make(gpu, mode, v_skip=0.1)


def test_device_report() -> None:
    for main_gpu, attention in ((0, "MTL0: metal"), (1, f"MTL1: {PRIVATE}")):
        with load("visual", n_gpu_layers=-1, main_gpu=main_gpu) as llm:
            assert llm.device_report()["attention"] == attention
