"""Products with packed weights (ggml_qcache/qcache-matmul.h) against NumPy in float64."""

import ctypes

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from ggml_qcache_convert.outtypes import quantised
from gguf import quants
from op_harness import library

TYPES = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K]
COLUMNS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 40]
K, M = 512, 80
LEFT_TO_GGML = [("avx2", T.Q8_0)]


def kernel_names() -> list[str]:
    """Kernels of this CPU, best first."""
    name_of = library().harness_matmul_kernel_name
    name_of.restype = ctypes.c_char_p
    return [name.decode() for name in iter(map(name_of, range(10)).__next__, None)]


KERNELS = kernel_names()
needs_packing = pytest.mark.skipif(not KERNELS, reason="this CPU has no kernel for packed weights")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def packs(kind: T, k: int, m: int) -> bool:
    return bool(library().harness_matmul_packs(ctypes.c_int32(kind), ctypes.c_int64(k), ctypes.c_int64(m)))


def product(kernel: str, kind: T, rows: np.ndarray, x: np.ndarray, m: int, *, n_threads: int = 1, n_runs: int = 1) -> np.ndarray:
    """``[n_runs, n, m]`` of weights in bytes and ``x [n, k]``, whose rows may lie apart. Skips the test where the kernel leaves the type to ggml."""
    n, k = x.shape
    wide = np.full((n, x.strides[0] // 4), np.nan, np.float32)
    wide[:, :k] = x
    out = np.empty((n_runs, n, m), np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (np.ascontiguousarray(rows), wide, out)]
    sizes = [ctypes.c_int64(size) for size in (k, m, n)]
    status = library().harness_matmul(
        KERNELS.index(kernel), ctypes.c_int32(kind), *sizes, *pointers[:2], ctypes.c_int64(wide.shape[1]), pointers[2], n_threads, n_runs
    )
    if status == 1 and (kernel, kind) in LEFT_TO_GGML:
        pytest.skip("without dpbusd products of bytes don't fit 16 bits")
    assert status == 0
    return out


def rounded(x: np.ndarray) -> np.ndarray:
    """``x [n, k]`` in 8 bits, a scale in f32 for each 32, as f64."""
    blocks = x.reshape(len(x), -1, 32)
    peak = np.abs(blocks).max(-1, keepdims=True)
    codes = np.rint(blocks * np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0))
    return (codes.astype(np.float64) * (peak / np.float32(127))).reshape(x.shape)


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((got - expected) ** 2) / np.sum(expected**2))


def make_weights(kind: T, m: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of rows, and their values in f64. Rows and blocks differ in size and in mean, so that scales and minima differ."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((m, k // 32, 32)) * 10 ** rng.uniform(-2, 1, (m, 1, 1)) * 2 ** rng.uniform(-3, 3, (m, k // 32, 1))
    values += rng.normal(0, 0.3, (m, k // 32, 1)) * np.abs(values).max(-1, keepdims=True)
    rows = quantised(values.reshape(m, k).astype(np.float32), kind)
    return rows, quants.dequantize(rows, kind).astype(np.float64)


def make_inputs(n: int, k: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, k)) * 10 ** rng.uniform(-3, 3, (n, 1))).astype(np.float32)


@every_kernel
@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_equals_float64(kernel: str, kind: T, n: int) -> None:
    rows, values = make_weights(kind, M, K)
    x = make_inputs(n, K)
    expected = rounded(x) @ values.T
    got = product(kernel, kind, rows, x, M)[0]
    for row in range(n):
        assert nmse(got[row], expected[row]) < 1e-12, f"row {row} of activations"
    # small rows of weights too, as near as f32 comes: codes and minima of a block are summed apart, each as large as its peak
    peaks = np.repeat(np.abs(values).reshape(M, -1, 32).max(-1), 32, axis=-1)
    assert np.max(np.abs(got - expected) / (np.abs(x) @ peaks.T)) < 1e-6


@every_kernel
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_code_and_scale(kernel: str, kind: T) -> None:
    """Random bits, which the quantiser would never write: every code meets every scale."""
    block_size, block_bytes = quants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (M * 4096 // block_size, block_bytes), dtype=np.uint8)
    at = {T.Q4_1: [0, 2], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}.get(kind, [0])
    for first in at:
        blocks[:, first : first + 2] = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    rows = blocks.reshape(M, -1)
    x = make_inputs(9, 4096)
    expected = rounded(x) @ quants.dequantize(rows, kind).astype(np.float64).T
    for got, wanted in zip(product(kernel, kind, rows, x, M)[0], expected):
        assert nmse(got, wanted) < 1e-11


@every_kernel
@pytest.mark.parametrize("n", [1, 8, 33])
def test_threads_and_repetition_change_nothing(kernel: str, n: int) -> None:
    rows, _ = make_weights(T.Q4_K, 1024, 256)
    x = make_inputs(n, 256)
    first = product(kernel, T.Q4_K, rows, x, 1024)[0]
    for n_threads in (1, 2, 5):
        for again in product(kernel, T.Q4_K, rows, x, 1024, n_threads=n_threads, n_runs=4):
            np.testing.assert_array_equal(again, first)


@every_kernel
def test_rows_apart_and_zeros(kernel: str) -> None:
    rows, values = make_weights(T.Q5_1, M, K)
    wide = make_inputs(5, K + 96)
    wide[1, :K] = 0
    wide[2, 32:64] = 0
    x = wide[:, :K]
    got = product(kernel, T.Q5_1, rows, x, M)[0]
    assert np.all(got[1] == 0)
    assert nmse(got, rounded(np.ascontiguousarray(x)) @ values.T) < 1e-12


@every_kernel
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_no_number_stays_so(kernel: str, bad: float) -> None:
    """A row that overflowed isn't taken for one of zeros, and spoils no other."""
    rows, _ = make_weights(T.Q4_0, M, K)
    x = make_inputs(4, K)
    for place in (0, 21, K - 1):
        spoilt = x.copy()
        spoilt[2, place] = bad
        got = product(kernel, T.Q4_0, rows, spoilt, M)[0]
        assert np.isnan(got[2]).all()
        np.testing.assert_array_equal(got[[0, 1, 3]], product(kernel, T.Q4_0, rows, x, M)[0][[0, 1, 3]])


@every_kernel
def test_rounding_costs_no_more_than_ggml(kernel: str) -> None:
    """Activations are rounded as for ggml's q8_0, whose scales are f16: the error against exact ones is that of 8 bits."""
    rows, values = make_weights(T.Q5_1, M, K)
    x = np.random.default_rng(3).standard_normal((16, K)).astype(np.float32)
    exact = x.astype(np.float64) @ values.T
    by_ggml = quants.dequantize(quantised(x, T.Q8_0), T.Q8_0).astype(np.float64) @ values.T
    assert nmse(product(kernel, T.Q5_1, rows, x, M)[0], exact) < 1.05 * nmse(by_ggml, exact)


@needs_packing
def test_what_is_packed() -> None:
    for kind in TYPES:
        assert packs(kind, 512, 32) == ((KERNELS[0], kind) not in LEFT_TO_GGML)
        assert not packs(kind, 512, 40), "rows that are no whole strip"
        assert not packs(kind, 512 + 16, 32), "no whole block"
    assert not packs(T.Q4_K, 512 + 32, 32)
    for kind in (T.F32, T.F16, T.BF16, T.Q2_K, T.Q3_K, T.IQ4_NL):
        assert not packs(kind, 512, 32)
