"""Logits of the C++ core: lazy off against libllama on the same file, lazy on against PyTorch, and against itself in every other way
of computing the same rows."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import llama_cpp
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
    quantised,
    rewrite_gguf,
    worst_nmse,
)
from hf_models import nmse
from ref_torch import TextModel, greedy_tokens, reference_logits
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ggml_qcache.errors import UnsupportedError
from ggml_qcache.native import Context, Model
from ggml_qcache_convert import convert, leaders_of

MINI_LLAVA = Path(__file__).parents[1] / "examples" / "mini-llava"

TWO_IMAGES = "t7 v37 t5 v20 t9"
BLOCKS = {
    "one block": [3, 4, 5],
    "several blocks": [1, 2, 4, 7],
    "all but the first layer": range(1, N_LAYER),
}
SEVERAL = leaders_of(BLOCKS["several blocks"], N_LAYER)


def libllama_logits(path: Path, tokens: np.ndarray, *, use_extra_bufts: bool = True) -> np.ndarray:
    """Logits of stock llama.cpp for every position, ``[n, n_vocab]``."""
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = use_extra_bufts
    with mock.patch("llama_cpp.llama_cpp.llama_model_default_params", return_value=params):
        llm = llama_cpp.Llama(str(path), n_ctx=128, n_batch=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    llm.eval(tokens.tolist())
    logits = np.array(llm.scores[: len(tokens)])
    llm.close()
    return logits


def reference(model: CoreModel, prompt, leader, mode: str, **params) -> np.ndarray:
    """Logits of PyTorch for every row, ``[n, n_vocab]``."""
    return reference_logits(model.hf, model.embeddings(prompt), torch.from_numpy(prompt.visual), leader, mode, **params)


#
# the reference itself
#


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_without_lazy_layers_equals_hugging_face(core_models: CoreModels, shape: str) -> None:
    model = core_models[shape]
    embeddings = model.embeddings(make_prompt(model.native, TWO_IMAGES))
    with torch.no_grad():
        text = TextModel.of(model.hf)
        expected = text.lm_head(text.decoder(inputs_embeds=embeddings[None]).last_hidden_state)[0].numpy()
    visual = torch.zeros(len(embeddings), dtype=torch.bool)
    got = reference_logits(model.hf, embeddings, visual, SEVERAL, "off", type_k="f32", type_v="f32")
    assert worst_nmse(got, expected) < 1e-9  # transformers computes norms and softmax in float32


#
# lazy off
#


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lazy_off_equals_libllama(core_models: CoreModels, tmp_path: Path, shape: str, outtype: str) -> None:
    model, path = core_models[shape], tmp_path / "m.gguf"
    convert(model.checkpoint, path, None, outtype)
    prompt = make_prompt(model.native, "t70")
    truth = reference(dataclasses.replace(model, hf=quantised(model.hf, outtype)), prompt, SEVERAL, "off")
    for use_extra_bufts in (True, False):  # with AMX ggml keeps f32 activations where it otherwise rounds them to f16
        stock = libllama_logits(path, prompt.tokens, use_extra_bufts=use_extra_bufts)
        with Model(path, use_extra_bufts=use_extra_bufts) as native:
            got = decode(make_context(native), prompt)
        error, ours, theirs = nmse(got, stock), nmse(got, truth), nmse(stock, truth)
        print(f"NMSE {error:.2e} against libllama; against the truth {ours:.2e}, libllama {theirs:.2e}")
        assert error <= BOUNDS[f"libllama {outtype}"]
        assert ours <= 1.5 * theirs


def test_lazy_layers_of_the_file_can_be_switched_off(core_models: CoreModels, tmp_path: Path) -> None:
    model = core_models["llama-gqa-32"]
    convert(model.checkpoint, tmp_path / "m.gguf", None, "f32", lazy_layers=BLOCKS["several blocks"], lazy_mode="visual")
    prompt = make_prompt(model.native, TWO_IMAGES)
    with Model(tmp_path / "m.gguf") as native:
        by_file, off = make_context(native), make_context(native, lazy_mode="off")
        assert (by_file.lazy_mode, list(by_file.lazy_leader)) == ("visual", SEVERAL)
        assert (off.lazy_mode, list(off.lazy_leader)) == ("off", list(range(N_LAYER)))
        assert_close(decode(by_file, prompt), reference(model, prompt, SEVERAL, "visual"), "reference f16")
        assert_close(decode(off, prompt), reference(model, prompt, SEVERAL, "off"), "reference f16")


#
# lazy on
#


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("mode", ["global", "visual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lazy_equals_reference(core_models: CoreModels, shape: str, mode: str, blocks: str) -> None:
    model, leader = core_models[shape], leaders_of(BLOCKS[blocks], N_LAYER)
    prompt = make_prompt(model.native, TWO_IMAGES)
    expected = reference(model, prompt, leader, mode)
    # what is tested changes the logits by far more than the bound allows
    assert worst_nmse(expected, reference(model, prompt, leader, "off")) > 1e3 * BOUNDS["reference f16"]
    assert_close(decode(make_context(model.native, lazy_mode=mode, lazy_leader=leader), prompt), expected, "reference f16")


@pytest.mark.parametrize("type_v", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("type_k", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("score_cache", ["off", "on", "auto"])
@pytest.mark.parametrize("attn_impl", ["auto", "scalar", "composed"])
@pytest.mark.parametrize("mode", ["off", "global", "visual"])
def test_every_attention_path(core_models: CoreModels, mode: str, attn_impl: str, score_cache: str, type_k: str, type_v: str) -> None:
    model = core_models["llama-gqa-80"]  # a head_dim that leaves a group half empty
    prompt = make_prompt(model.native, TWO_IMAGES)
    leader = None if mode == "off" else SEVERAL
    context = make_context(model.native, lazy_mode=mode, lazy_leader=leader, attn_impl=attn_impl, score_cache=score_cache,
                           type_k=type_k, type_v=type_v)
    # prefill and decode take different kernels
    got = decode_in_parts(context, prompt, [len(prompt) - 3, 1, 1, 1])
    expected = reference(model, prompt, SEVERAL, mode, type_k=type_k, type_v=type_v)
    types = {type_k, type_v}
    coarsest = next(name for name in ("q4_0", "q8_0", "f16") if name in types)
    assert_close(got, expected, f"reference {coarsest}")
    if coarsest != "f16":
        assert_close(got, reference(model, prompt, SEVERAL, mode), f"{coarsest} KV")


@pytest.mark.parametrize("attn_impl", ["auto", "scalar", "composed"])
@pytest.mark.parametrize("mode", ["off", "global", "visual"])
def test_vis_bias_counts_in_visual_mode_only(core_models: CoreModels, tmp_path: Path, mode: str, attn_impl: str) -> None:
    model = core_models["llama-gqa-32"]
    n_head = model.native.info.n_head
    bias = {il: np.random.default_rng(il).normal(0, 1, n_head).astype(np.float32) for il in range(N_LAYER)}
    rewrite_gguf(model.path, tmp_path / "m.gguf", tensors={f"blk.{il}.attn_vis_bias.weight": bias[il] for il in bias})
    prompt = make_prompt(model.native, TWO_IMAGES)
    expected = reference(model, prompt, SEVERAL, mode, vis_bias=bias)
    without = reference(model, prompt, SEVERAL, mode)
    if mode == "visual":
        assert worst_nmse(expected, without) > 1e3 * BOUNDS["reference f16"]
    else:
        assert np.array_equal(expected, without)
    for score_cache in ("on", "off"):
        with Model(tmp_path / "m.gguf") as native:
            context = make_context(native, lazy_mode=mode, lazy_leader=None if mode == "off" else SEVERAL, attn_impl=attn_impl,
                                   score_cache=score_cache)
            assert_close(decode_in_parts(context, prompt, [len(prompt) - 2, 1, 1]), expected, "reference f16")


@pytest.mark.parametrize("shape", ["llama-gqa-32", "qwen2-gqa-64"])
@pytest.mark.parametrize("mode", ["off", "global", "visual"])
def test_several_turns(core_models: CoreModels, mode: str, shape: str) -> None:
    """Image, question, answer token by token, second image in the next turn, and so on."""
    model = core_models[shape]
    turns = ["t6 v33 t4", *["t1"] * 9, "t3 v20 t7", *["t1"] * 5, "t8", *["t1"] * 5]
    context = make_context(model.native, lazy_mode=mode, lazy_leader=None if mode == "off" else SEVERAL)
    prompts = [make_prompt(model.native, turn, seed=100 + i) for i, turn in enumerate(turns)]
    got = np.concatenate([decode(context, prompt) for prompt in prompts])
    whole = prompts[0]
    for prompt in prompts[1:]:
        whole = whole + prompt
    assert_close(got, reference(model, whole, SEVERAL, mode), "reference f16")


def test_text_given_as_embeddings_and_visual_rows_given_as_tokens(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"]
    prompt = make_prompt(model.native, "t3 e2 v9 w5 v2 w1 t4 e3 w2 t2")
    for n_ubatch in (512, 4):
        context = make_context(model.native, lazy_mode="visual", lazy_leader=SEVERAL, n_ubatch=n_ubatch)
        assert_close(decode(context, prompt), reference(model, prompt, SEVERAL, "visual"), "reference f16")


def test_modality_defaults_to_visual_for_embeddings_and_text_for_tokens(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"]
    prompt = make_prompt(model.native, "t7 v20 t5")
    context = make_context(model.native, lazy_mode="visual", lazy_leader=SEVERAL)
    context.decode(prompt.tokens, prompt.embeddings)
    expected = reference(model, prompt, SEVERAL, "visual")
    assert_close(context.logits()[None], expected[-1:], "reference f16")
    with pytest.raises(ValueError, match="row 3"):
        context.logits(3)  # by default only the last row has logits


def test_visual_mode_is_off_for_text_and_global_for_pictures(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"]
    for pattern, same in (("t40", "off"), ("v40", "global")):
        prompt = make_prompt(model.native, pattern)
        visual = decode(make_context(model.native, lazy_mode="visual", lazy_leader=SEVERAL), prompt)
        other = decode(make_context(model.native, lazy_mode=same, lazy_leader=None if same == "off" else SEVERAL), prompt)
        assert_close(visual, other, "rounding")


#
# the same rows in other portions
#


@pytest.fixture(scope="module", params=["off", "global", "visual"])
def portions(request: pytest.FixtureRequest, core_models: CoreModels):
    """Makes contexts of one mode, with the prompt and the logits that they are to give."""
    model = core_models["llama-gqa-32"]
    prompt = make_prompt(model.native, TWO_IMAGES)

    def make(**params) -> Context:
        return make_context(model.native, lazy_mode=request.param, lazy_leader=None if request.param == "off" else SEVERAL, **params)

    return make, prompt, reference(model, prompt, SEVERAL, request.param)


@pytest.mark.parametrize("n_ubatch", [1, 3, 7, 16, 64, 1000])
def test_chunks_of_any_size(portions, n_ubatch: int) -> None:
    make, prompt, expected = portions
    whole = decode(make(), prompt)
    got = decode(make(n_ubatch=n_ubatch), prompt)
    assert_close(got, whole, "rounding")
    assert_close(got, expected, "reference f16")


@pytest.mark.parametrize("sizes", [[1], [2, 1], [5], [7, 37, 5], [20, 1, 1, 30], [44, 34]], ids=str)
def test_batches_cut_anywhere(portions, sizes: list[int]) -> None:
    make, prompt, expected = portions
    got = decode_in_parts(make(n_ubatch=16), prompt, sizes)
    assert_close(got, decode(make(), prompt), "rounding")
    assert_close(got, expected, "reference f16")


@pytest.mark.parametrize("block_tokens", [16, 32, 64])
def test_block_sizes(portions, block_tokens: int) -> None:
    make, prompt, expected = portions
    assert_close(decode_in_parts(make(block_tokens=block_tokens), prompt, [60, 1, 9]), expected, "reference f16")


@pytest.mark.parametrize("attn_impl", ["auto", "scalar", "composed"])
def test_threads_change_nothing_but_rounding(core_models: CoreModels, attn_impl: str) -> None:
    native = core_models["llama-gqa-32"].native
    prompt = make_prompt(native, TWO_IMAGES)

    def logits(first: int, then: int) -> np.ndarray:
        context = make_context(native, lazy_mode="visual", lazy_leader=SEVERAL, attn_impl=attn_impl, n_threads=first, n_threads_batch=first)
        start = decode(context, prompt[:70])
        context.set_n_threads(then, then)
        return np.concatenate([start, decode(context, prompt[70:71]), decode(context, prompt[71:])])

    one, two, three = logits(1, 1), logits(2, 3), logits(3, 2)
    for other in (two, three):
        assert_close(other, one, "rounding")
        assert attn_impl == "auto" or np.array_equal(one, other)


#
# files without attn_q and attn_k
#


def test_global_file_without_qk_runs_as_converted_only(core_models: CoreModels, tmp_path: Path) -> None:
    model, lazy = core_models["qwen2-gqa-64"], BLOCKS["several blocks"]
    convert(model.checkpoint, tmp_path / "m.gguf", None, "f32", lazy_layers=lazy, lazy_mode="global")
    assert (tmp_path / "m.gguf").stat().st_size < model.path.stat().st_size
    prompt = make_prompt(model.native, TWO_IMAGES)
    with Model(tmp_path / "m.gguf") as native:
        assert_close(decode(make_context(native), prompt), reference(model, prompt, SEVERAL, "global"), "reference f16")
        # fewer lazy layers than the file has, and other modes, need what isn't there
        for params in ({"lazy_mode": "off"}, {"lazy_mode": "visual"}, {"lazy_mode": "global", "lazy_leader": leaders_of([1, 2], N_LAYER)}):
            with pytest.raises(UnsupportedError, match=r"layer \d needs blk\.\d\.attn_q\.weight.*keep-qk"):
                make_context(native, **params)
        # more is fine
        more = leaders_of([1, 2, 4, 5, 7], N_LAYER)
        context = make_context(native, lazy_mode="global", lazy_leader=more)
        assert_close(decode(context, prompt), reference(model, prompt, more, "global"), "reference f16")


def test_global_file_with_kept_qk_runs_in_every_mode(core_models: CoreModels, tmp_path: Path) -> None:
    model, lazy = core_models["qwen2-gqa-64"], BLOCKS["several blocks"]
    convert(model.checkpoint, tmp_path / "m.gguf", None, "f32", lazy_layers=lazy, lazy_mode="global", keep_qk=True)
    prompt = make_prompt(model.native, TWO_IMAGES)
    with Model(tmp_path / "m.gguf") as native:
        for mode in ("off", "global", "visual"):
            context = make_context(native, lazy_mode=mode)
            assert_close(decode(context, prompt), reference(model, prompt, SEVERAL, mode), "reference f16")


#
# the model that ships
#


def test_mini_llava_gives_hugging_face_s_200_tokens(tmp_path: Path) -> None:
    """Greedy text about a real picture, lazy layers off, ends of text ignored."""
    from PIL import Image

    checkpoint = MINI_LLAVA / "model"
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    picture = MINI_LLAVA / "images" / json.loads((MINI_LLAVA / "images" / "questions.json").read_text())[0]["image"]
    inputs = processor(images=Image.open(picture), text="USER: <image>\nDescribe the image. ASSISTANT:", return_tensors="pt")
    ids = inputs["input_ids"][0]
    visual = ids == model.config.image_token_id
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        features = model.get_image_features(pixel_values=inputs["pixel_values"])
        embeddings[visual] = torch.cat(list(features.pooler_output if hasattr(features, "pooler_output") else features))
    expected = greedy_tokens(model, embeddings, 200)

    convert(checkpoint, tmp_path / "m.gguf", None, "f32")
    with Model(tmp_path / "m.gguf") as native:
        context = make_context(native, n_ctx=1024, lazy_mode="off")
        tokens = torch.where(visual, -1, ids).numpy()
        context.decode(tokens, embeddings.numpy())
        got = [int(context.logits().argmax())]
        while len(got) < 200:
            context.decode([got[-1]])
            got.append(int(context.logits().argmax()))
    assert got == expected
