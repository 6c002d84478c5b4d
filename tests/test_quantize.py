"""Quantising (ggml_qcache/qcache-quantize.h): the bits are ggml's, for weights and for what no model should have."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf import quants
from ggml_qcache import native
from ggml_qcache_convert.halves import from_float32, to_float32
from ggml_qcache_convert.outtypes import dequantised, quantised
from llama_cpp._ggml import libggml
from op_harness import library

TYPES = [T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K]
N_SUPERBLOCKS = 101  # odd: up to four are done at once
N = 256 * N_SUPERBLOCKS


def by_ggml(values: np.ndarray, kind: T) -> np.ndarray:
    n_values, n_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.empty(values.size // n_values * n_bytes, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, blocks)]
    chunk = libggml.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk(ctypes.c_int(kind), *pointers, ctypes.c_int64(0), ctypes.c_int64(1), ctypes.c_int64(values.size), None)
    return blocks


def by_kernel(i_kernel: int, values: np.ndarray, kind: T) -> tuple[np.ndarray, int]:
    """The blocks, and how many superblocks were left to ggml. Nothing after the blocks may change."""
    n_values, n_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = values.size // n_values
    blocks = np.full(n_blocks * n_bytes + 64, 0xA5, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, blocks)]
    n_other = ctypes.c_int64()
    assert library().harness_quantize(i_kernel, ctypes.c_int32(kind), *pointers, ctypes.c_int64(n_blocks), ctypes.byref(n_other)) == 0
    assert (blocks[n_blocks * n_bytes :] == 0xA5).all()
    return blocks[: n_blocks * n_bytes], n_other.value


def n_kernels() -> int:
    """Kernels of this CPU, the fastest first, and then that of AVX-512 emulated."""
    empty, n = np.zeros(0, np.float32), ctypes.c_int64()
    pointer = empty.ctypes.data_as(ctypes.c_void_p)
    return next(i for i in range(9) if library().harness_quantize(i, 8, pointer, pointer, ctypes.c_int64(0), ctypes.byref(n)) == 1)


def in_blocks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Values of very different size from block to block: ggml rounds the scales of the small ones to zero."""
    return rng.standard_normal(N) * 10.0 ** rng.integers(-9, 4, N // size).repeat(size)


def near_a_constant(rng: np.random.Generator) -> np.ndarray:
    """Blocks whose values differ by so little, beside one far away, that ggml's rounding to integers wraps."""
    blocks = -0.41 + 4e-7 * rng.uniform(-1, 1, (N // 256, 8, 32))
    blocks[:, 0], blocks[:, 1] = -50, -0.41 + 2.7e-5 * rng.uniform(-1, 1, (N // 256, 32))
    return blocks.ravel()


def cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    normal = rng.standard_normal(N)
    values = {
        "normal": normal * 0.02,
        "f16": normal.astype(np.float16),
        "bf16": (normal.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
        "outliers": rng.standard_t(2, N),
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "shifted": normal - 50,
        "integers": rng.integers(-4, 5, N),
        "ties": rng.integers(-254, 255, N) / 2,
        "zero": np.zeros(N),
        "negative zero": np.full(N, -0.0),
        "constant": np.full(N, 0.25),
        "constant, negative": np.full(N, -0.25),
        "sparse": normal * (rng.random(N) < 0.02),
        "blocks of zeros": normal * (rng.random(N // 16) < 0.5).repeat(16),
        "uneven 32": in_blocks(rng, 32),
        "uneven 16": in_blocks(rng, 16),
        "tiny": normal * 1e-9,
        "subnormal": normal * 1e-40,
        "large": normal * 1e6,
        "far down": rng.uniform(-6e6, 0, N),
        "far from the others": near_a_constant(rng),
        "huge": normal * 1e37,
    }
    return {name: np.ascontiguousarray(case, np.float32) for name, case in values.items()}


CASES = cases()
OF_WEIGHTS = ["normal", "f16", "bf16", "outliers", "positive", "negative"]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("i_kernel", range(n_kernels()))
def test_bits_are_ggmls(i_kernel: int, kind: T) -> None:
    for name, values in CASES.items():
        blocks, n_other = by_kernel(i_kernel, values, kind)
        wrong = (blocks != by_ggml(values, kind)).reshape(-1, GGML_QUANT_SIZES[kind][1]).any(1)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {len(wrong)} blocks"
        assert n_other == 0 or name not in OF_WEIGHTS


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_few_blocks(kind: T, n: int) -> None:
    values = CASES["normal"][: n * GGML_QUANT_SIZES[kind][0]]
    for i_kernel in range(n_kernels()):
        assert np.array_equal(by_kernel(i_kernel, values, kind)[0], by_ggml(values, kind))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_the_converter_s_way(kind: T) -> None:
    """``quantised`` takes the fast way where there is one: then it gives the same bits, whatever the rows' layout in memory."""
    rows = CASES["normal"].reshape(-1, 256)
    blocks = np.zeros(by_ggml(rows.copy(), kind).size, np.uint8)
    assert native.quantize(np.ascontiguousarray(rows), kind, blocks) == (n_kernels() > 1)
    for layout in (rows, rows[::-1], np.asfortranarray(rows)):
        assert np.array_equal(quantised(layout, kind).ravel(), by_ggml(np.ascontiguousarray(layout), kind))


@pytest.mark.skipif(n_kernels() < 2, reason="this CPU has no kernel")
@pytest.mark.parametrize("kind", [T.Q4_K, T.Q5_K, T.Q6_K], ids=lambda kind: kind.name)
def test_a_ggml_that_fuses_is_told_apart(kind: T) -> None:
    tells = [library().harness_quantize_probe_tells(ctypes.c_int32(kind), i) for i in range(17)]
    assert tells == [1] * 16 + [-1]


def test_refusals() -> None:
    if n_kernels() < 2:
        pytest.skip("this CPU has no kernel")
    values, blocks = np.zeros(512, np.float32), np.zeros(288, np.uint8)
    assert native.quantize(values, T.Q4_K, blocks)
    for kind in (T.Q4_0, T.F16, T.IQ2_XXS, -1, 99):
        assert not native.quantize(values, kind, blocks)
    with pytest.raises(ValueError, match="512 values to 287 bytes of type 12, which takes 256 to 144 bytes"):
        native.quantize(values, T.Q4_K, blocks[:287])
    with pytest.raises(ValueError, match="511 values"):
        native.quantize(values[:511], T.Q4_K, blocks)
    for other in (np.float64, np.float16):
        with pytest.raises(ValueError, match="float32, got"):
            native.quantize(values.astype(other), T.Q4_K, blocks)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_halves(dtype: str) -> None:
    """Every value of 16 bits there and back, and values between two."""
    stored = np.arange(1 << 16, dtype=np.uint16).view(np.float16 if dtype == "F16" else np.uint16)
    expected = stored.astype(np.float32) if dtype == "F16" else (stored.astype(np.uint32) << 16).view(np.float32)
    values = to_float32(stored, dtype)
    known = ~np.isnan(expected)
    assert np.isnan(values[~known]).all() and np.array_equal(values[known].view(np.uint32), expected[known].view(np.uint32))
    assert np.array_equal(from_float32(values, dtype)[known].view(np.uint16), stored[known].view(np.uint16))
    kind = T[dtype]
    between = np.concatenate([case for case in CASES.values() if np.abs(case).max() < 6e4]).reshape(-1, 256)
    assert np.array_equal(quantised(between[::2], kind), quants.quantize(between[::2], kind))
    assert np.array_equal(dequantised(quantised(between, kind), kind), quants.dequantize(quants.quantize(between, kind), kind))


def test_halves_of_any_number_in_a_process_of_their_own() -> None:
    """ggml takes what is left of a row after whole vectors from a table that it fills when it is first used."""
    code = """
import numpy as np
from ggml_qcache_convert.halves import from_float32, to_float32
for n in range(1, 35):
    values = np.arange(1, n + 1, dtype=np.float32) / 4
    for dtype in ("F16", "BF16"):
        assert np.array_equal(to_float32(from_float32(values, dtype), dtype), values), (n, dtype)
    assert np.array_equal(to_float32(values.astype(np.float16), "F16"), values), n
"""
    subprocess.run([sys.executable, "-c", code], check=True)
