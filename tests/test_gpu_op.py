"""The GPU kernels, emulated on the CPU thread by thread, against the judge in ref_numpy.py.

Two devices: "gpu" has the bodies of the CUDA kernels (tests/native/simt_emulation.h), "metal" the Metal source
(metal_emulation.h), whose every load and store is checked for races and alignment. They run through the backend that wraps
a ggml device (ggml_qcache/qcache-backend.cpp), here the CPU: tables, launches, appended bytes and guards are checked with
them. Few rows take a decode kernel, in float32 or as exact on matrix units; many take the prefill kernel, whose products round
Q and the probabilities to f16.

With QCACHE_OP_DEVICE set, "gpu" is this machine's first GPU instead, and all memory the kernels see is its own.
"""

import itertools

import numpy as np
import pytest

import op_harness
from op_harness import F16, Q4_0, Q8_0, Case, Sequence, Shape
from ref_numpy import nmse
from test_op import DIALOGUE, GRID, MODES, SEED, TYPES, bias_of, case_of, sequences

# bounds on the NMSE against float64; measured in emulation: about a fifth of them. A GPU's exponential is less exact
DECODE_MAX = 1e-11 if op_harness.ON_DEVICE else 4e-13
PREFILL_MAX = 8e-7
GROUP_V_MAX = 2e-7  # V of quantised types rounded to f16


def decode_max(device: str, shape: Shape) -> float:
    """Where three or more heads share keys, decoding on CUDA's matrix units rounds V of quantised types to f16."""
    return GROUP_V_MAX if device == "gpu" and shape.n_head // shape.n_head_kv > 2 and shape.type_v != F16 else DECODE_MAX


@pytest.fixture(params=["gpu"] if op_harness.ON_DEVICE else ["gpu", "metal"])
def device(request):
    return request.param


def check(device, case, bound, **run):
    result = case.run(device, **run)
    for layer in range(2):
        expected, _ = case.reference(layer)
        error = nmse(result[layer], expected)
        assert error <= bound, f"layer {layer}, mode {case.mode}, {case.shape}, seed {case.seed}: NMSE {error:.2e}"
        for r in range(len(case.rows)):
            assert nmse(result[layer][r], expected[r]) <= 20 * bound, f"layer {layer}, row {r} {case.rows[r]}"
    return result


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_shapes(device, kind):
    """Every head_dim with MHA, GQA of 2, 4, 7 and 8 and MQA of 20 queries; types, block sizes and modes rotate."""
    for i, (head_dim, (n_head, n_head_kv), (type_k, type_v), n_block) in enumerate(GRID):
        if kind == "decode" or i % 3 == 0:
            shape = Shape(head_dim, n_head, n_head_kv, type_k, type_v, n_block)
            case = case_of(shape, kind, MODES[(i + i // 7) % 3], bool(i % 2), SEED + i)
            check(device, case, decode_max(device, shape) if kind == "decode" else PREFILL_MAX)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("types", TYPES, ids=lambda t: "-".join(op_harness.TYPE_NAMES[x] for x in t))
def test_types_and_modes(device, types, mode):
    for kind, bound in (("decode", DECODE_MAX), ("prefill", PREFILL_MAX)):
        check(device, case_of(Shape(64, 4, 2, *types), kind, mode, True), bound)


@pytest.mark.parametrize("n_head_kv", [4, 2])
def test_the_usual_head_dim(device, n_head_kv):
    """CUDA has decode kernels of their own for 128."""
    for i, types in enumerate(TYPES):
        check(device, case_of(Shape(128, 4, n_head_kv, *types), "decode", MODES[i % 3], True), DECODE_MAX)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("n_new", [1, 2])
def test_infinite_v(device, head_dim, n_new):
    """f16 has no more than 65504; what is read past the last token must not make NaN of it."""
    case = Case(Shape(head_dim), [Sequence("t11", 11 - n_new, n_new)], "off", seed=SEED)
    case.v[1][0][10] = 1e6
    with np.errstate(over="ignore"):
        out = case.run(device)[1]
    assert np.isposinf(out[-1]).all() and np.isfinite(out[:-1]).all()


@pytest.mark.parametrize("n_block", [16, 32, 64])
def test_block_sizes_and_row_order(device, n_block):
    for mode in MODES:
        check(device, case_of(Shape(n_block=n_block), "mixed", mode, order="shuffled"), PREFILL_MAX)
        check(device, case_of(Shape(n_block=n_block), "decode", mode, order="shuffled"), DECODE_MAX)


def test_room_after_the_rows(device):
    for mode in MODES:
        check(device, Case(Shape(), [Sequence(DIALOGUE, 30, 25), Sequence(DIALOGUE, 0, 1)], mode, seed=SEED), PREFILL_MAX)


def test_long_sequence_is_split(device):
    """Spans of KV blocks go to thread blocks of their own; the last span is shorter, and one row has none for some."""
    for mode, type_ in itertools.product(MODES, (F16, Q8_0)):
        shape = Shape(64, 2, 1, type_, type_, 16)
        check(device, Case(shape, [Sequence("t20 v300 t41", 360, 1), Sequence("t3", 2, 1)], mode, bias_of(shape), seed=SEED), DECODE_MAX)


@pytest.mark.parametrize("mode", ["global", "visual"])
def test_score_cache(device, mode):
    def without_leader(layers, step):
        # a lazy layer that reads scores needs neither Q nor K of its leader: 0 is a gap full of NaN
        layers[1].q_leader = None
        for row, key in itertools.product((0, 1), repeat=2):
            if layers[1].q_source[row][key] == 1:
                layers[1].k_offset[row][key] = 0

    shapes = ((80, 4, 4), (80, 8, 2), (80, 20, 1), (128, 4, 2))
    for kind, shape, type_k in itertools.product(("decode", "mixed"), shapes, (F16, Q4_0)):
        case = case_of(Shape(*shape, type_k), kind, mode, True)
        _, _, scores = check(device, case, DECODE_MAX, score_cache=True, edit=without_leader)
        _, logits = case.reference(0)
        seen = np.zeros(scores.shape, bool)
        seen[..., : logits.shape[-1]] = ~np.isnan(logits)[..., : scores.shape[-1]]
        assert nmse(scores[seen], logits[~np.isnan(logits)]) <= DECODE_MAX
        assert np.isnan(scores[~seen]).all(), "only keys that a row sees are written"


def test_graph_can_run_again(device):
    case = Case(Shape(n_head=1, n_head_kv=1), [Sequence(DIALOGUE, 60, 20)], "visual", np.ones(1, np.float32), seed=SEED)
    check(device, case, PREFILL_MAX, n_runs=3)


def test_growing_logits(device):
    """Each key outweighs all before it: the running maximum moves at every key and block."""
    for n_past, bound in ((0, PREFILL_MAX), (99, DECODE_MAX)):
        case = Case(Shape(), [Sequence("t100", n_past, 100 - n_past)], "off", seed=SEED)
        for layer in range(2):
            case.q[layer][0][:] = 4.0
            case.k[layer][0][:] = np.linspace(0, 4, 100, dtype=np.float32)[:, None, None]
        check(device, case, bound)


@pytest.mark.parametrize("heads", [(1, 1), (8, 1)])
def test_many_small_probabilities(device, heads):
    """One key has a logit 18 above all others, which together still make the answer."""
    case = Case(Shape(64, *heads), [Sequence("t2000", 1999, 1)], "off", seed=SEED)
    for layer in range(2):
        case.q[layer][0][:] = 1.0
        case.k[layer][0][:] = 0.0
        case.k[layer][0][0] = 18.0 * np.sqrt(64) / 64
        case.v[layer][0][0] = 0.0
        case.v[layer][0][1:] = np.abs(case.v[layer][0][1:])
    check(device, case, DECODE_MAX)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("sign", [1, -1])
def test_overflowing_logits_stay_finite(device, kind, sign):
    case = Case(Shape(), [Sequence(DIALOGUE, 93, 1)] if kind == "decode" else [Sequence(DIALOGUE, 0, 94)], "global", seed=SEED)
    for q in case.q:
        for x in q:
            x[:] = sign * np.float32(3e38)
    for k in case.k:
        for x in k:
            np.abs(x, out=x)
    for out in case.run(device)[:2]:
        assert np.isfinite(out).all()


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_nan_stays_in_its_row(device, kind):
    case = Case(Shape(n_head_kv=2), [Sequence(DIALOGUE, 92, 2)] if kind == "decode" else [Sequence(DIALOGUE, 0, 94)], "global", seed=SEED)
    i, pos = case.rows[-1]
    case.q[0][i][pos, 1, 3] = np.nan
    for out in case.run(device)[:2]:
        nan = np.isnan(out)
        assert nan[-1, 1].all()
        nan[-1, 1] = False
        assert not nan.any()


@pytest.mark.parametrize("types", [(F16, F16), (Q8_0, Q4_0)], ids=lambda t: "-".join(op_harness.TYPE_NAMES[x] for x in t))
def test_v_skipping(device, types):
    """A lazy layer's output lacks at most `v_skip` of the largest |v|; where V is 1 everywhere it lacks the skipped share itself."""
    lacking = []
    shapes = ((64, 4, 4), (64, 8, 2), (64, 7, 1), (128, 4, 4))
    for mode, (head_dim, *heads), ones, v_skip in itertools.product(("global", "visual"), shapes, (False, True), (0.02, 0.3)):
        shape = Shape(head_dim, *heads, *types)
        case = Case(shape, sequences("decode"), mode, bias_of(shape) if mode == "visual" else None, SEED, q_gain=4.0)
        for v in case.v[1] if ones else ():
            v[:] = 1.0

        def edit(layers, step, v_skip=v_skip):
            layers[1].v_skip = v_skip

        exact = case.run(device, score_cache=True)[1]
        out = case.run(device, score_cache=True, edit=edit)[1]
        for r, (i, pos) in enumerate(case.rows):
            v = np.abs(op_harness.unpack(case.packed("v", 1, i), types[1], head_dim)[: pos + 1]).max(axis=0)  # [n_head_kv, head_dim]
            bound = v_skip * np.repeat(v, heads[0] // heads[1], axis=0)
            assert (np.abs(out[r] - exact[r]) <= bound + 1e-5 * np.abs(exact).max()).all(), f"{mode}, {heads}, {v_skip}, row {r}"
        if ones:
            lacking.append(float(np.max(1 - out)) / v_skip)
    assert min(lacking) > 0 and 0.5 < max(lacking) <= 1.001  # the share is used


def test_v_that_is_skipped_is_not_read(device):
    """V of keys with next to no attention is NaN: what is read shows."""
    case = Case(Shape(64, 4, 4), [Sequence("t100", 99, 1)], "global", seed=SEED)
    case.k[0][0][:50] = -8 * np.sign(case.q[0][0][99])  # of the leader
    case.k[0][0][50:] = 0

    def edit(layers, step):
        layers[1].v_skip = 0.01

    case.v[1][0][:50] = np.nan
    assert np.isnan(case.run(device, score_cache=True, check_blocks=False)[1]).any()
    assert np.isfinite(case.run(device, score_cache=True, check_blocks=False, edit=edit)[1]).all()
