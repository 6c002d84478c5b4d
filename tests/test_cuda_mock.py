"""Runs the tests of a GPU on CUDA's host side and on the PTX of its kernels, both as nvcc compiled them, over a mock of the runtime.

The mock (tests/native/cuda_mock/) runs PTX on the CPU and stops where a GPU would fault or leave something undefined. In the
process that runs the tests its libqcache has the name of the real one and is loaded first.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = os.environ.get("QCACHE_TEST_BUILD")
FOLDER = Path(BUILD or ".").resolve() / "tests" / "cuda-mocked"
# what doesn't depend on the runtime is left to test_gpu_op.py and test_gpu_backend.py
SOME_OF_GPU_BACKEND = (
    "test_mini_llava_answers and digit and -1 or llama-gqa-32 and (test_logits and visual or test_part_of_the_layers and visual "
    "or test_sequences) or qwen2-gqa-64 and (test_logits and q8_0-q8_0-global or test_v_skipping and visual or test_states)"
)

pytestmark = pytest.mark.skipif(
    not (FOLDER / "libqcache.so").exists(), reason="QCACHE_TEST_BUILD names no build folder with a mock of CUDA: that takes nvcc"
)


def run(tests: str, *options: str, **variables: str) -> None:
    # what the mock writes to stderr is to come through, also of tests that pass
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", str(Path(__file__).with_name(tests)), *options]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=1800)
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0 and " passed" in done.stdout
    assert "CUDA mock:" not in done.stderr


def test_the_operation() -> None:
    some = "not test_types_and_modes and not (test_shapes and prefill)"
    run("test_gpu_op.py", "-k", some, QCACHE_OP_DEVICE="1", QCACHE_TEST_BUILD=str(FOLDER))


def test_what_kernels_ask_of_memory() -> None:
    run("cuda_counts.py", QCACHE_OP_DEVICE="1", QCACHE_TEST_BUILD=str(FOLDER))


@pytest.mark.parametrize("stream", ["ggml", "own"])
def test_the_library(stream: str) -> None:
    options = ("-k", SOME_OF_GPU_BACKEND if stream == "ggml" else "llama-gqa-32 and test_sequences")
    run("gpu_backend.py", *options, LD_PRELOAD=str(FOLDER / "libqcache.so"), QCACHE_CUDA_STREAM=stream)


@pytest.mark.slow
def test_every_case_of_the_operation() -> None:
    run("test_gpu_op.py", QCACHE_OP_DEVICE="1", QCACHE_TEST_BUILD=str(FOLDER))


@pytest.mark.slow
def test_everything_on_the_library() -> None:
    run("gpu_backend.py", LD_PRELOAD=str(FOLDER / "libqcache.so"))


@pytest.mark.slow
def test_the_oldest_architecture(tmp_path: Path) -> None:
    """sm_75 multiplies matrices of half the depth."""
    root = Path(__file__).parents[1]
    options = ["-DQCACHE_MOCK_ARCH=75", "-DQCACHE_BUILD_TESTS=ON", "-DQCACHE_BUILD_PYTHON=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (["cmake", "-S", root, "-B", tmp_path, *options], ["cmake", "--build", tmp_path, "--parallel", "2", "--target", "qcache-op-cuda-mocked"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run("test_gpu_op.py", QCACHE_OP_DEVICE="1", QCACHE_TEST_BUILD=str(tmp_path / "tests" / "cuda-mocked"))
