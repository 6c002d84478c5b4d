"""Several sequences in one KV cache: batches, removal, sharing, limits, and the memory they take."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from core_helpers import (
    N_LAYER,
    CoreModel,
    CoreModels,
    Prompt,
    assert_close,
    decode,
    decode_in_parts,
    make_context,
    make_prompt,
    rows_of_logits,
)
from gguf import GGUFWriter
from ref_torch import reference_logits

from ggml_qcache.errors import ContextFullError, InvalidArgumentError, NoBlocksError
from ggml_qcache.native import Context
from ggml_qcache_convert import leaders_of

LEADER = leaders_of([1, 2, 4, 7], N_LAYER)
MODES = ("off", "global", "visual")


@pytest.fixture(scope="module")
def model(core_models: CoreModels) -> CoreModel:
    return core_models["llama-gqa-32"]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def lazy_context(model: CoreModel, mode: str, **params) -> Context:
    return make_context(model.native, lazy_mode=mode, lazy_leader=None if mode == "off" else LEADER, **params)


def decode_together(context: Context, prompts: dict[int, Prompt]) -> dict[int, np.ndarray]:
    """Appends to several sequences in one batch, their rows in turn; returns the logits of each."""
    order = [(seq_id, row) for turn in itertools.zip_longest(*([(s, i) for i in range(len(p))] for s, p in prompts.items()))
             for seq_id, row in filter(None, turn)]
    rows = [prompts[seq_id][row : row + 1] for seq_id, row in order]
    tokens, embeddings, visual = (np.concatenate(parts) for parts in zip(*(row.fields() for row in rows)))
    context.decode(tokens, embeddings, seq_id=[seq_id for seq_id, _ in order], modality=visual, logits=True)
    logits = rows_of_logits(context, len(order))
    return {seq_id: logits[[s == seq_id for s, _ in order]] for seq_id in prompts}


#
# batches
#


@pytest.mark.parametrize("attn_impl", ["auto", "scalar", "composed"])
@pytest.mark.parametrize("patterns", [["t5 v20 t3", "t40 v9"], ["v33 t2", "t1", "t6 v20 t5 v35 t1"]], ids=["two", "three"])
def test_interleaved_sequences_equal_each_alone(model: CoreModel, mode: str, patterns: list[str], attn_impl: str) -> None:
    starts = {i: make_prompt(model.native, pattern, seed=i) for i, pattern in enumerate(patterns)}
    steps = {i: make_prompt(model.native, "t4", seed=50 + i) for i in starts}
    context = lazy_context(model, mode, n_seq_max=len(patterns), n_ubatch=32, attn_impl=attn_impl)
    got = decode_together(context, starts)
    for row in range(4):
        step = decode_together(context, {i: prompt[row : row + 1] for i, prompt in steps.items()})
        got = {i: np.concatenate([got[i], step[i]]) for i in got}
    for i, start in starts.items():
        whole = start + steps[i]
        visual = torch.from_numpy(whole.visual)
        assert_close(got[i], reference_logits(model.hf, model.embeddings(whole), visual, LEADER, mode), "reference f16")
        assert_close(got[i], decode(lazy_context(model, mode, attn_impl=attn_impl), whole), "rounding")
        assert context.seq_len(i) == len(whole)


def test_logits_of_the_rows_that_were_asked_for(model: CoreModel, mode: str) -> None:
    prompt = make_prompt(model.native, "t6 v20 t5 v7 t4")
    every_row = decode(lazy_context(model, mode, n_ubatch=10), prompt)
    for seed in range(4):
        wanted = np.random.default_rng(seed).random(len(prompt)) < (0.0, 0.1, 0.5, 0.9)[seed]
        context = lazy_context(model, mode, n_ubatch=10)
        context.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual, logits=wanted)
        rows = np.flatnonzero(wanted)
        for row in rows:
            assert_close(context.logits(row)[None], every_row[row][None], "rounding")
        for k in range(1, len(rows) + 1):
            assert np.array_equal(context.logits(-k), context.logits(rows[-k]))
        for row in (*np.flatnonzero(~wanted), -len(rows) - 1, len(prompt)):
            with pytest.raises(ValueError, match=f"row {row} "):
                context.logits(row)
        # what isn't computed for want of logits isn't missing later
        step = make_prompt(model.native, "t1", seed=5)
        assert_close(decode(context, step), decode_in_parts(lazy_context(model, mode), prompt + step, [len(prompt), 1])[-1:], "rounding")


#
# removing and sharing
#


@pytest.mark.parametrize("keep", [0, 1, 6, 7, 20, 43, 44, 45, 63, 64, 77])
def test_continuing_after_a_removed_tail_equals_never_having_had_it(model: CoreModel, mode: str, keep: int) -> None:
    prompt, other = make_prompt(model.native, "t7 v37 t5 v20 t9"), make_prompt(model.native, "t2 v11 t4", seed=2)
    context, fresh = lazy_context(model, mode), lazy_context(model, mode)
    decode(context, prompt)
    context.seq_rm(0, keep)
    assert context.seq_len() == keep
    if keep:
        decode(fresh, prompt[:keep])
    assert context.kv_usage() == fresh.kv_usage()
    assert_close(decode(context, other), decode(fresh, other), "rounding")


def test_removing_what_isn_t_a_tail_is_refused(model: CoreModel) -> None:
    context = lazy_context(model, "visual", n_seq_max=2)
    prompt, step = make_prompt(model.native, "t9 v20"), make_prompt(model.native, "t1", seed=3)
    decode(context, prompt)
    usage = context.kv_usage()
    with pytest.raises(InvalidArgumentError, match=r"positions 3 \.\. 8 of sequence 0.*29 tokens"):
        context.seq_rm(0, 3, 9)
    with pytest.raises(InvalidArgumentError, match="sequence 2 is out of range, n_seq_max is 2"):
        context.seq_rm(2, 0)
    with pytest.raises(InvalidArgumentError, match="p0 is -4"):
        context.seq_rm(0, -4)
    for src, dst in ((0, 2), (-1, 0), (2, 1)):
        with pytest.raises(InvalidArgumentError, match="n_seq_max is 2"):
            context.seq_cp(src, dst)
    context.seq_rm(0, 29)  # nothing there
    context.seq_rm(1, 0)
    assert context.kv_usage() == usage and context.seq_len(7) == context.seq_len(-1) == -1
    assert_close(decode(context, step), decode(lazy_context(model, "visual"), prompt + step)[-1:], "rounding")


@pytest.mark.parametrize("shared", [5, 7, 20, 44, 60, -1])
def test_copied_sequences_share_blocks_and_go_their_own_ways(model: CoreModel, mode: str, shared: int) -> None:
    prompt = make_prompt(model.native, "t7 v37 t5 v20 t9")
    context = lazy_context(model, mode, n_seq_max=3)
    decode(context, prompt)
    before = context.kv_usage()
    n = len(prompt) if shared < 0 else shared
    for dst in (1, 2):
        context.seq_cp(0, dst, shared)
    assert context.seq_len(1) == context.seq_len(2) == n
    after = context.kv_usage()
    assert {k: v for k, v in after.items() if "tokens" not in k} == {k: v for k, v in before.items() if "tokens" not in k}
    assert after["n_tokens_text"] + after["n_tokens_visual"] == len(prompt) + 2 * n

    # all of them grow in one batch, each in its own way
    tails = {i: make_prompt(model.native, pattern, seed=60 + i) for i, pattern in enumerate(("t3 v4 t2", "v9 t5", "t35"))}
    got = decode_together(context, tails)
    for i, tail in tails.items():
        start = prompt if i == 0 else prompt[:n]
        assert_close(got[i], decode(lazy_context(model, mode), start + tail)[len(start) :], "rounding")

    # the blocks that the first had alone go with it, those that are shared stay
    context.seq_rm(0, 0)
    step = make_prompt(model.native, "t2", seed=9)
    got = decode_together(context, {1: step, 2: step})
    for i in (1, 2):
        whole = prompt[:n] + tails[i] + step
        assert_close(got[i], decode(lazy_context(model, mode), whole)[-2:], "rounding")
    context.seq_rm(-1, 0)
    assert context.kv_usage()["bytes"] == context.kv_usage()["n_blocks"] == 0


def test_copying_replaces_what_the_target_held(model: CoreModel) -> None:
    context = lazy_context(model, "visual", n_seq_max=2)
    decode(context, make_prompt(model.native, "t40", seed=1), seq_id=1)
    prompt, step = make_prompt(model.native, "t5 v9"), make_prompt(model.native, "t1", seed=4)
    decode(context, prompt)
    context.seq_cp(0, 1)
    assert context.kv_usage()["n_blocks"] == 2
    assert_close(decode(context, step, seq_id=1), decode(lazy_context(model, "visual"), prompt + step)[-1:], "rounding")
    context.seq_cp(1, 1)
    assert context.seq_len(1) == len(prompt) + 1


def test_clear_frees_everything(model: CoreModel, mode: str) -> None:
    prompt = make_prompt(model.native, "t7 v37 t5")
    context = lazy_context(model, mode, n_seq_max=2)
    first = decode(context, prompt)
    context.seq_cp(0, 1)
    context.clear()
    usage = context.kv_usage()
    assert not any(usage[key] for key in ("bytes", "bytes_if_full", "n_blocks", "n_blocks_text", "n_tokens_text", "n_tokens_visual"))
    assert context.seq_len(0) == context.seq_len(1) == 0
    assert np.array_equal(decode(context, prompt), first)


#
# limits: what fails leaves everything as it was
#


def assert_unharmed(context: Context, model: CoreModel, mode: str, prompts: dict[int, Prompt], usage: dict[str, int]) -> None:
    """The context holds the prompts and nothing else, and continues each as a fresh one would."""
    assert context.kv_usage() == usage
    with pytest.raises(ValueError, match="no logits"):
        context.logits()  # those of before are gone, as the header says
    step = make_prompt(model.native, "t1", seed=77)
    for seq_id, prompt in prompts.items():
        assert context.seq_len(seq_id) == len(prompt)
        assert_close(decode(context, step, seq_id), decode(lazy_context(model, mode), prompt + step)[-1:], "rounding")
        context.seq_rm(seq_id, len(prompt))


@pytest.mark.parametrize("n_ubatch", [512, 8])
@pytest.mark.parametrize("pattern", ["t70", "v70", "t9 v8 t7 v6 t5", "t40 v40"])
def test_no_blocks_leaves_everything_as_it_was(model: CoreModel, mode: str, pattern: str, n_ubatch: int) -> None:
    prompt = make_prompt(model.native, "t7 v20 t5")
    probe = lazy_context(model, mode)
    decode(probe, prompt)
    block = probe.kv_usage()["bytes_block_text"]
    limit = probe.kv_usage()["bytes"] + block  # for one more block

    context = lazy_context(model, mode, kv_bytes_max=limit, n_ubatch=n_ubatch)
    decode(context, prompt)
    usage = context.kv_usage()
    too_much = make_prompt(model.native, pattern, seed=8)
    for _ in range(2):
        with pytest.raises(NoBlocksError, match=rf"row \d+ of {len(too_much)} \(sequence 0, position \d+\).*kv_bytes_max is {limit}"):
            decode(context, too_much)
        assert_unharmed(context, model, mode, {0: prompt}, usage)
    # and there is room once something is removed
    context.clear()
    assert_close(decode(context, prompt[:12]), decode(lazy_context(model, mode), prompt[:12]), "rounding")


def test_no_blocks_with_shared_blocks_leaves_everything_as_it_was(model: CoreModel, mode: str) -> None:
    prompts = {i: make_prompt(model.native, "t7 v20 t5") for i in range(3)}
    probe = lazy_context(model, mode)
    decode(probe, prompts[0])
    limit = probe.kv_usage()["bytes"] + probe.kv_usage()["bytes_block_text"]
    context = lazy_context(model, mode, n_seq_max=3, kv_bytes_max=limit)
    decode(context, prompts[0])
    context.seq_cp(0, 1)
    context.seq_cp(0, 2)
    usage = context.kv_usage()
    # the last text block is shared by three: each that writes to it needs a copy, and there is room for one
    step = make_prompt(model.native, "t1", seed=6)
    with pytest.raises(NoBlocksError, match="sequence 1, position 32"):
        decode_together(context, {0: step, 1: step, 2: step})
    assert_unharmed(context, model, mode, {0: prompts[0]}, usage)
    for seq_id in (1, 2):
        context.seq_rm(seq_id - 1, 0)
        assert context.seq_len(seq_id) == len(prompts[seq_id])
        expected = decode(lazy_context(model, mode), prompts[seq_id] + step)[-1:]
        assert_close(decode(context, step, seq_id), expected, "rounding")


@pytest.mark.parametrize("n_ubatch", [512, 8])
def test_context_full_leaves_everything_as_it_was(model: CoreModel, mode: str, n_ubatch: int) -> None:
    prompts = {0: make_prompt(model.native, "t7 v20 t5"), 1: make_prompt(model.native, "v39", seed=2)}
    context = lazy_context(model, mode, n_ctx=40, n_seq_max=2, n_ubatch=n_ubatch)
    decode_together(context, prompts)
    usage = context.kv_usage()
    for tails in ({0: "t9"}, {1: "v2"}, {0: "t3", 1: "t2"}, {0: "t300"}):
        with pytest.raises(ContextFullError, match=r"sequence \d holds \d+ tokens and would grow by \d+, n_ctx is 40"):
            decode_together(context, {i: make_prompt(model.native, tail, seed=8) for i, tail in tails.items()})
        assert_unharmed(context, model, mode, prompts, usage)
    decode(context, make_prompt(model.native, "t8", seed=3))  # exactly full
    assert context.seq_len(0) == 40


def test_wrong_rows_leave_everything_as_it_was(model: CoreModel, mode: str) -> None:
    prompt = make_prompt(model.native, "t7 v20 t5")
    context = lazy_context(model, mode, n_seq_max=2)
    decode(context, prompt)
    usage = context.kv_usage()
    n_vocab, n_embd = model.native.info.n_vocab, model.native.info.n_embd
    wrong = {
        rf"token {n_vocab} of row 1": {"tokens": [5, n_vocab]},
        r"token -2 of row 0": {"tokens": [-2, 5]},
        r"row 1 has no token": {"tokens": [5, -1]},
        r"sequence 2 of row 1 is out of range, n_seq_max is 2": {"tokens": [5, 5], "seq_id": [0, 2]},
        r"sequence -1 of row 0": {"tokens": [5, 5], "seq_id": [-1, 0]},
        r"modality 2 of row 1": {"tokens": [5, 5], "modality": [0, 2]},
        r"modality -1 of row 0": {"embeddings": np.zeros((1, n_embd)), "modality": [-1]},
    }
    for text, arguments in wrong.items():
        with pytest.raises(InvalidArgumentError, match=text):
            context.decode(**arguments)
        assert_unharmed(context, model, mode, {0: prompt}, usage)


#
# memory
#


def expected_usage(
    info, runs: list[list[tuple[str, int]]], leader: list[int], mode: str, block_tokens: int, type_k: str, type_v: str
) -> dict[str, int]:
    """KV memory by the shapes alone: K and V of a block lie apart, each rounded up to 64 bytes.

    Args:
        info: The model's.
        runs: The runs of rows of each sequence, ``("t", 7)``.
        leader: ``[n_layer]``.
        mode: ``off``, ``global`` or ``visual``.
        block_tokens: Tokens of a block.
        type_k: Type of K.
        type_v: Type of V.
    """

    def part(cache_type: str) -> int:
        row = 2 * info.head_dim if cache_type == "f16" else {"q8_0": 34, "q4_0": 18}[cache_type] * math.ceil(info.head_dim / 32)
        return math.ceil(row * info.n_head_kv * block_tokens / 64) * 64

    lazy = sum(leader[il] != il for il in range(info.n_layer)) if mode != "off" else 0
    blocks = {kind: sum(math.ceil(n / block_tokens) for seq in runs for k, n in seq if k == kind) for kind in "tv"}
    tokens = {kind: sum(n for seq in runs for k, n in seq if k == kind) for kind in "tv"}
    full = info.n_layer * (part(type_k) + part(type_v))
    visual = full - lazy * part(type_k)
    text = visual if mode == "global" else full
    return {
        "bytes": blocks["t"] * text + blocks["v"] * visual,
        "bytes_if_full": (blocks["t"] + blocks["v"]) * full,
        "bytes_max": 0,
        "bytes_block_text": text,
        "bytes_block_visual": visual,
        "bytes_block_full": full,
        "n_block_tokens": block_tokens,
        "n_blocks": blocks["t"] + blocks["v"],
        "n_blocks_text": blocks["t"],
        "n_blocks_visual": blocks["v"],
        "n_tokens_text": tokens["t"],
        "n_tokens_visual": tokens["v"],
        "n_lazy_layers": lazy,
        "n_dropped_layers": 0,
        "n_v_rows": 0,
        "n_v_rows_skipped": 0,
    }


@pytest.mark.parametrize(("type_k", "type_v"), [("f16", "f16"), ("q8_0", "f16"), ("f16", "q8_0"), ("q8_0", "q8_0"), ("q4_0", "q8_0")])
@pytest.mark.parametrize("block_tokens", [16, 32, 64])
def test_usage_equals_the_formula(core_models: CoreModels, mode: str, block_tokens: int, type_k: str, type_v: str) -> None:
    native = core_models["llama-gqa-80"].native
    patterns = ["t7 v37 t5 v20 t9", "t64", "v33", "t1 v1 t1 v1"]
    context = make_context(native, lazy_mode=mode, lazy_leader=None if mode == "off" else LEADER, n_seq_max=len(patterns),
                           block_tokens=block_tokens, type_k=type_k, type_v=type_v)
    runs = []
    for i, pattern in enumerate(patterns):
        decode(context, make_prompt(native, pattern), seq_id=i)
        runs.append([(run[0], int(run[1:])) for run in pattern.split()])
        assert context.kv_usage() == expected_usage(native.info, runs, LEADER, mode, block_tokens, type_k, type_v)


def write_wide_model(path: Path) -> None:
    """A model of 8 layers with 1,024 values of K and V a token and layer, and little else to compute."""
    n_layer, n_embd, n_head, head_dim, n_ff, n_vocab = 8, 32, 8, 128, 32, 64
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_context_length(8192)
    writer.add_layer_norm_rms_eps(1e-5)
    rng = np.random.default_rng(1)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd.weight", n_vocab, n_embd)
    add("output_norm.weight", n_embd)
    for il in range(n_layer):
        for name, shape in {"attn_norm": (n_embd,), "attn_q": (n_head * head_dim, n_embd), "attn_k": (n_head * head_dim, n_embd),
                            "attn_v": (n_head * head_dim, n_embd), "attn_output": (n_embd, n_head * head_dim), "ffn_norm": (n_embd,),
                            "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}.items():
            add(f"blk.{il}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MEASURE = """
import json, sys
import numpy as np, psutil
from ggml_qcache.native import Context, Model

path, mode, n_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = Model(path)
leader = [0] * model.info.n_layer if mode != "off" else None
context = Context(model, n_ctx=n_tokens, n_ubatch=64, n_threads=1, n_threads_batch=1, lazy_mode=mode, lazy_leader=leader, score_cache="off")
embeddings = np.random.default_rng(0).normal(0, 1, (n_tokens, model.info.n_embd)).astype(np.float32)
samples = []
def sample():
    samples.append((psutil.Process().memory_info().rss, context.kv_usage()["bytes"]))
context.decode(embeddings=embeddings[:64])  # compute buffers and code are in memory from here on
sample()
context.decode(embeddings=embeddings[64:])
sample()
context.clear()
sample()
print(json.dumps(samples))
"""


@pytest.mark.parametrize(("mode", "n_tokens"), [("off", 1536), ("visual", 2048)])
def test_memory_of_the_process_agrees_with_the_usage(tmp_path: Path, mode: str, n_tokens: int) -> None:
    """On a long context; in a process of its own, whose allocator has seen nothing else."""
    write_wide_model(tmp_path / "wide.gguf")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "wide.gguf"), mode, str(n_tokens)]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    (rss_start, bytes_start), (rss_full, bytes_full), (rss_clear, bytes_clear) = json.loads(run.stdout)
    layers = 8 + (1 if mode == "visual" else 8)  # of V and of K
    assert (bytes_full, bytes_clear) == (n_tokens * layers * 1024 * 2, 0)
    assert rss_full - rss_start == pytest.approx(bytes_full - bytes_start, rel=0.1)
    assert rss_full - rss_clear > 0.8 * bytes_full  # the allocator may keep some for later
