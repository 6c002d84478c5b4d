"""The lazy-attention operation: every kernel and the composed fallback against the judge in ref_numpy.py.

K and V of the judge are decoded from the very bytes in the blocks, so the bounds are those of float32 arithmetic. Every
run also checks what was appended, byte by byte, and the guards around blocks, scratch, score cache and results.
"""

import functools
import itertools

import numpy as np
import pytest

import op_harness
from op_harness import F16, Q4_0, Q8_0, Case, HarnessError, Sequence, Shape
from ref_numpy import TEXT, VISUAL, nmse

# bounds on the NMSE against float64, by path and K, V types; measured: about a fifth of them
NMSE_MAX = {
    "scalar": {"f16": 1e-14, "quantised": 1e-14},
    "vector": {"f16": 4e-12, "quantised": 4e-12},
    "composed": {"f16": 1e-12, "quantised": 1e-12},
}

SEED = 20260201
KERNELS = op_harness.kernel_names()
PATHS = [*KERNELS, "composed"]
MODES = ["off", "global", "visual"]
TYPES = list(itertools.product((F16, Q8_0, Q4_0), repeat=2))
DIALOGUE = "t7 v40 t5 v33 t9"  # text-image-text-image-text, partial blocks throughout; 94 tokens


@pytest.fixture(autouse=True, scope="module")
def print_seed():
    print(f"seed {SEED}")


def bound(path, shape):
    kind = path if path in NMSE_MAX else "vector"
    worst = "f16" if shape.type_k == shape.type_v == F16 else "quantised"
    return NMSE_MAX[kind][worst]


def check(case, path, **run):
    """Both layers against the judge; returns what run() gave."""
    result = case.run(path, **run)
    for layer in range(2):
        expected, _ = case.reference(layer)
        error = nmse(result[layer], expected)
        assert error <= bound(path, case.shape), f"layer {layer}, mode {case.mode}, {case.shape}, seed {case.seed}: NMSE {error:.2e}"
        # and no single row hides behind the others
        for r in range(len(case.rows)):
            assert nmse(result[layer][r], expected[r]) <= 20 * bound(path, case.shape), f"layer {layer}, row {r} {case.rows[r]}"
    return result


@functools.cache
def case_of(shape, kind, mode, bias=False, seed=SEED, **more):
    """A case that all paths share, its reference with it; not to be modified."""
    return Case(shape, sequences(kind), mode, bias_of(shape) if bias else None, seed, **more)


def bias_of(shape, seed=SEED):
    return np.random.default_rng(seed).normal(0, 1.5, shape.n_head).astype(np.float32)


def sequences(kind):
    if kind == "decode":  # one row each, of different lengths, one after an image
        return [Sequence(DIALOGUE, 93, 1), Sequence("t3", 2, 1), Sequence("v40 t1", 40, 1), Sequence("t4 v30", 33, 1)]
    if kind == "prefill":  # all at once, and one that continues and has room left
        return [Sequence(DIALOGUE, 0, 94), Sequence("t35 v50 t20", 30, 55)]
    return [Sequence("t7 v40 t5", 40, 11), Sequence("t3", 0, 3), Sequence(DIALOGUE, 93, 1)]  # mixed


#
# shapes, types, modes
#

HEAD_DIMS = [32, 40, 64, 80, 96, 128, 256]
HEADS = [(4, 4), (8, 4), (8, 2), (8, 1), (6, 1), (14, 2), (20, 1)]  # MHA, GQA 2, 4, 8, MQA, GQA 7, MQA 20
# types, block sizes and modes rotate, so that every pair of values meets somewhere
GRID = [
    (d, h, TYPES[i % 9], (32, 16, 64)[(i + i // 7) % 3])
    for i, (d, h) in enumerate(itertools.product(HEAD_DIMS, HEADS))
]


@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("path", PATHS)
def test_shapes(path, kind):
    for i, (head_dim, (n_head, n_head_kv), (type_k, type_v), n_block) in enumerate(GRID):
        shape = Shape(head_dim, n_head, n_head_kv, type_k, type_v, n_block)
        check(case_of(shape, kind, MODES[(i + i // 7) % 3], bool(i % 2), SEED + i), path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("types", TYPES, ids=lambda t: "-".join(op_harness.TYPE_NAMES[x] for x in t))
@pytest.mark.parametrize("path", PATHS)
def test_types_and_modes(path, types, mode):
    for kind, bias in itertools.product(("decode", "prefill", "mixed"), (False, True)):
        shape = Shape(64, 8, 2, *types)
        check(case_of(shape, kind, mode, bias), path)


def test_best_is_the_first_kernel():
    case = case_of(Shape(), "mixed", "visual")
    for a, b in zip(case.run("best")[:2], case.run(KERNELS[0])[:2]):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_block", [16, 32, 64])
def test_block_sizes(path, n_block):
    for mode in MODES:
        check(case_of(Shape(n_block=n_block), "mixed", mode), path)


@pytest.mark.parametrize("path", PATHS)
def test_rows_in_any_order(path):
    for mode in MODES:
        check(case_of(Shape(n_head_kv=2), "mixed", mode, order="shuffled"), path)


@pytest.mark.parametrize("path", PATHS)
def test_shared_blocks(path):
    a, b = Sequence("t32 v64 t5", 100, 1), Sequence("t32 v64 v20 t9", 116, 7)
    for mode in MODES:
        check(Case(Shape(), [a, b], mode, seed=SEED, shared=(0, 1, 96)), path)


@pytest.mark.parametrize("path", PATHS)
def test_room_after_the_rows(path):
    """Tokens of a later chunk have their place in the blocks, but nothing is written there yet."""
    for mode in MODES:
        case = Case(Shape(), [Sequence(DIALOGUE, 30, 25), Sequence(DIALOGUE, 0, 1)], mode, seed=SEED)
        check(case, path)


def test_graph_can_run_again():
    case = Case(Shape(n_head=1, n_head_kv=1), sequences("mixed"), "visual", np.ones(1, np.float32), seed=SEED)
    for path in PATHS:
        check(case, path, n_runs=3)


#
# the same numbers another way
#


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("mode", ["global", "visual"])
def test_score_cache(path, mode):
    def without_leader(layers, step):
        # a lazy layer that reads scores needs neither Q nor K of its leader: 0 is a gap full of NaN
        layers[1].q_leader = None
        for row, key in itertools.product((TEXT, VISUAL), repeat=2):
            if layers[1].q_source[row][key] == 1:
                layers[1].k_offset[row][key] = 0

    for kind, heads, type_k in itertools.product(("decode", "prefill", "mixed"), ((4, 4), (8, 2), (20, 1)), (F16, Q8_0, Q4_0)):
        shape = Shape(80, *heads, type_k)
        case = case_of(shape, kind, mode, True)
        _, out, scores = check(case, path, score_cache=True, edit=without_leader)
        assert nmse(out, case.run(path)[1]) <= bound(path, shape)

        _, logits = case.reference(0)
        logits = logits[..., : scores.shape[-1]]
        seen = np.pad(~np.isnan(logits), [(0, 0), (0, 0), (0, scores.shape[-1] - logits.shape[-1])])
        assert nmse(scores[seen], logits[~np.isnan(logits)]) <= bound(path, shape)
        assert np.isnan(scores[~seen]).all(), "only keys that a row sees are written"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_prefill_is_decode_row_by_row(path, mode):
    shape = Shape(64, 8, 2)
    bias = bias_of(shape)
    whole = Case(shape, [Sequence(DIALOGUE, 0, 94)], mode, bias, seed=SEED)
    outputs = whole.run(path)[:2]
    for pos in (0, 6, 7, 46, 47, 51, 52, 84, 85, 93):
        row = Case(shape, [Sequence(DIALOGUE, pos, 1)], mode, bias, seed=SEED)
        for layer, out in enumerate(row.run(path)[:2]):
            assert nmse(outputs[layer][pos], out[0]) <= 20 * bound(path, shape), f"layer {layer}, position {pos}"


@pytest.mark.parametrize("path", PATHS)
def test_threads_change_nothing_but_rounding(path):
    """More threads than tasks share the blocks of a task, so that sums are made in another order."""
    for kind, mode in itertools.product(("decode", "prefill", "mixed"), MODES):
        for heads in ((6, 3), (8, 1)):
            case = case_of(Shape(n_head=heads[0], n_head_kv=heads[1], n_block=16), kind, mode)
            one = case.run(path, n_threads=1, score_cache=path != "composed")
            for n_threads in (2, 3, 13):
                other = case.run(path, n_threads=n_threads, score_cache=path != "composed", n_runs=2)
                for a, b in zip(one, other):
                    if a is not None:
                        assert np.array_equal(np.isnan(a), np.isnan(b))  # logits of keys that a row doesn't see
                        error = nmse(np.nan_to_num(a), np.nan_to_num(b).astype(np.float64))
                        assert error < 1e-13, f"{kind}, {mode}, {heads}, {n_threads} threads: NMSE {error:.1e}"


@pytest.mark.parametrize("path", [path for path in KERNELS if path != "scalar"])
@pytest.mark.parametrize("types", [(F16, F16), (Q8_0, Q4_0)], ids=lambda t: "-".join(op_harness.TYPE_NAMES[x] for x in t))
def test_v_skipping(path, types):
    """What is left out of a lazy layer's output is at most `v_skip` of the largest |v| in that dimension, whatever the threads.

    Where V is 1 everywhere, what the output lacks is the skipped share itself.
    """
    skipped, lacking = {}, 0.0
    for mode, heads, ones, v_skip, n_threads in itertools.product(
        ("global", "visual"), ((4, 4), (8, 2)), (False, True), (0.0, 0.02, 0.3), (1, 5)
    ):
        shape = Shape(64, *heads, *types)
        case = Case(shape, sequences("decode"), mode, bias_of(shape) if mode == "visual" else None, SEED, q_gain=4.0)
        for v in case.v[1] if ones else ():
            v[:] = 1.0
        exact = case.run(path, score_cache=True)[1]
        steps = []

        def edit(layers, step, v_skip=v_skip):
            layers[1].v_skip = v_skip
            steps.append(step)

        out = case.run(path, n_threads, score_cache=True, edit=edit)[1]
        for r, (i, pos) in enumerate(case.rows):
            v = np.abs(op_harness.unpack(case.packed("v", 1, i), types[1], 64)[: pos + 1]).max(axis=0)  # [n_head_kv, head_dim]
            bound = v_skip * np.repeat(v, heads[0] // heads[1], axis=0)
            assert (np.abs(out[r].astype(np.float64) - exact[r]) <= bound + 1e-5 * np.abs(exact).max()).all(), f"{mode}, {heads}, {v_skip}, row {r}"
        lacking = max(lacking, float(np.max(1 - out)) / v_skip if ones and v_skip > 0 else 0.0)
        n, n_skipped = steps[0].v_rows
        assert 0 <= n_skipped <= n and (n > 0) == (v_skip > 0)
        if v_skip == 0:
            assert n_threads > 1 or np.array_equal(out, exact)
        skipped.setdefault(v_skip, []).append(n_skipped / max(n, 1))
    assert 0.5 < lacking <= 1.001  # the share is used
    assert max(skipped[0.0]) == 0 and 0 < np.mean(skipped[0.02]) < np.mean(skipped[0.3])


#
# extreme values
#


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("q_gain", [1e-30, 1e3, 1e5])
def test_large_and_small_logits(path, q_gain):
    for mode, kind in itertools.product(MODES, ("decode", "prefill")):
        case = case_of(Shape(), kind, mode, q_gain=q_gain)
        _, out, _ = case.run(path)
        # float32 logits of 1e5 are 0.01 apart: the softmax of near ties may move, the rest may not
        assert nmse(out, case.reference(1)[0]) <= (bound(path, case.shape) if q_gain < 1 else 1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_growing_logits(path):
    """Each key outweighs all before it: the running maximum moves at every key and block."""
    case = Case(Shape(), [Sequence("t100", 0, 100)], "off", seed=SEED)
    for layer in range(2):
        case.q[layer][0][:] = 4.0
        case.k[layer][0][:] = np.linspace(0, 4, 100, dtype=np.float32)[:, None, None]
    check(case, path)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflowing_logits_stay_finite(path, sign):
    for kind in ("decode", "prefill"):
        case = Case(Shape(), sequences(kind), "global", seed=SEED)
        for q in case.q:
            for x in q:
                x[:] = sign * np.float32(3e38)
        for k in case.k:
            for x in k:
                np.abs(x, out=x)
        for out in case.run(path)[:2]:
            assert np.isfinite(out).all()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("bias", [-np.inf, np.inf, -3e38, 3e38])
def test_infinite_bias(path, bias):
    case = Case(Shape(), [Sequence("t5 v50 t9", 0, 64)], "visual", np.full(4, bias, np.float32), seed=SEED)
    _, out, _ = case.run(path)
    assert np.isfinite(out).all()
    if bias < 0:  # a text row after the image sees only text
        case.vis_bias = None
        logits = case.reference(1)[1][-1]
        seen = case.sequences[0].modality == TEXT
        p = np.where(seen, np.exp(logits - logits[:, seen].max(-1, keepdims=True)), 0)
        v = op_harness.unpack(op_harness.pack(case.v[1][0], F16), F16, 64)
        assert nmse(out[-1], np.einsum("hk,khd->hd", p / p.sum(-1, keepdims=True), v)) <= 20 * bound(path, case.shape)


@pytest.mark.parametrize("path", KERNELS)
def test_nan_stays_in_its_row(path):
    for kind in ("decode", "prefill"):
        case = Case(Shape(n_head_kv=2), sequences(kind), "global", seed=SEED)
        i, pos = case.rows[-1]
        case.q[0][i][pos, 1, 3] = np.nan
        for out in case.run(path)[:2]:
            if out is not None:
                nan = np.isnan(out)
                assert nan[-1, 1].all() or not nan.any()
                nan[-1, 1] = False
                assert not nan.any()
        assert np.isnan(case.run(path)[1][-1, 1]).all()


#
# constructors
#


def set_field(layer, name, value):
    def edit(layers, step):
        setattr(step if layer is None else layers[layer], name, value)

    return edit


def set_row(index, name, value):
    def edit(layers, step):
        setattr(step.rows[index], name, value)

    return edit


REFUSED = [
    ("head_dim", set_field(0, "head_dim", 60), "head_dim 60"),
    ("head_dim_too_big", set_field(0, "head_dim", 264), "head_dim 264"),
    ("type_k", set_field(0, "type_k", 0), "K type 0"),
    ("type_v", set_field(1, "type_v", 6), "V type 6"),
    ("n_head_kv", set_field(0, "n_head_kv", 0), "n_head_kv 0"),
    ("n_block_tokens", set_field(0, "n_block_tokens", 0), "n_block_tokens 0"),
    ("heads", set_field(0, "n_head", 6), "6 query heads"),
    ("no_k", set_field(0, "k", None), "no K"),
    ("k_rows", set_field(0, "n_k", 2), "append: k is"),
    ("q_rows", set_field(0, "n_own", 2), "q_own has 2 rows"),
    ("no_own", set_field(0, "q_own", None), "own query"),
    ("no_leader", set_field(1, "q_leader", None), "leader's query"),
    ("no_scores", set_field(1, "score_op", op_harness.READ), "score cache of 0 keys"),
    ("row_sequence", set_row(3, "seq", 9), "row 3: sequence 9"),
    ("row_block", set_row(3, "block", 99), "block 99"),
    ("row_position", set_row(3, "pos", 999), "position 999"),
    ("row_modality", set_row(0, "modality", 7), "modality 7"),
    ("row_own", set_row(0, "q_own", -1), "row 0"),
    ("no_rows", set_field(None, "n_rows", 0), "rows and sequences"),
]


@pytest.mark.parametrize("edit, text", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_constructors_refuse(edit, text):
    case = case_of(Shape(), "mixed", "visual")
    with pytest.raises(HarnessError, match=text):
        case.run("scalar", edit=edit)


def test_row_bytes_and_types():
    lib = op_harness.library()
    for type_, head_dim in itertools.product((F16, Q8_0, Q4_0), HEAD_DIMS):
        assert lib.harness_row_bytes(type_, head_dim) == op_harness.pack(np.zeros((1, head_dim)), type_).shape[-1]
        assert lib.harness_type_supported(type_, head_dim)
    for type_, head_dim in ((F16, 0), (F16, -8), (F16, 4), (F16, 264), (Q8_0, 100), (0, 64), (6, 64), (39, 64), (-1, 64)):
        assert not lib.harness_type_supported(type_, head_dim)
