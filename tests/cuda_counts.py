"""What kernels ask of memory, counted by the mock of CUDA as it runs their PTX; test_cuda_mock.py runs it.

A warp's load is served in sectors of 32 bytes, and shared memory in turns in which each of its 32 banks gives a word.
"""

import ctypes

import op_harness
import pytest
from op_harness import F16, Case, Sequence, Shape

NAMES = ("instructions", "global_requests", "global_bytes", "global_sectors", "shared_requests", "shared_turns", "shared_least")


def counted(shape: Shape, n_new: int, kernel: str) -> dict[str, int]:
    """Of a run's kernels with that in their names; 544 tokens, most of them visual."""

    def totals() -> dict[str, int]:
        lib = op_harness.library()
        lib.cuda_mock_counted.restype = ctypes.c_char_p
        numbers, sums, i = (ctypes.c_uint64 * len(NAMES))(), dict.fromkeys(NAMES, 0), 0
        while name := lib.cuda_mock_counted(i, numbers):
            for key, n in zip(NAMES, numbers):
                sums[key] += n if kernel in name.decode() else 0
            i += 1
        return sums

    before = totals()
    Case(shape, [Sequence(f"t16 v512 t{16 + n_new}", 544, n_new)], "off", seed=1).run("gpu")
    return {key: n - before[key] for key, n in totals().items()}


@pytest.mark.parametrize(
    ("shape", "n_new", "kernel", "sectors_max", "turns_max"),
    [
        (Shape(128, 4, 4, F16, F16), 1, "decode_kernelILi129", 1.05, 1.8),
        (Shape(64, 4, 4, F16, F16), 1, "decode_kernelILi1", 1.05, 1.8),
        (Shape(128, 8, 2, F16, F16), 1, "decode_group_kernel", 1.25, 1.4),
        (Shape(128, 4, 4, F16, F16), 64, "prefill_kernel", 1.05, 1.1),
    ],
)
def test_f16(shape: Shape, n_new: int, kernel: str, sectors_max: float, turns_max: float) -> None:
    """K and V come in whole sectors, and tiles without conflicts of banks; measured: a few per cent less than the bounds."""
    n = counted(shape, n_new, kernel)
    print(kernel, n)
    assert n["global_bytes"] > 544 * shape.n_head_kv * shape.head_dim * 2 * 2 * 2  # of two layers, K and V
    assert n["global_sectors"] * 32 <= sectors_max * n["global_bytes"]
    assert n["shared_turns"] <= turns_max * n["shared_least"]
