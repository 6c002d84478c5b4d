"""Runs the tests of a GPU on Metal's host side over a mock of Metal, in a process whose libqcache has that in place of a GPU.

The library has the name of the real one and is loaded first. The mock ends the process where Metal would forbid something.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = os.environ.get("QCACHE_TEST_BUILD")
# the kernels are emulated with every access checked: what doesn't depend on the host side is left to test_gpu_op.py
SOME_OF_GPU_BACKEND = (
    "test_mini_llava_answers and digit and -1 or test_refusals or test_lazy_block or llama-gqa-32 and "
    "(test_logits and visual or test_part_of_the_layers and visual or test_sequences or test_states)"
)


def run(tests: str, *options: str, **variables: str) -> None:
    library = Path(BUILD).resolve() / "tests" / "metal-mocked" / "libqcache.so"
    if not library.exists():
        pytest.skip("the native tests were built without the mock of Metal: that takes Clang and GNU's Objective-C runtime")
    environment = {**os.environ, "LD_PRELOAD": str(library), "METAL_MOCK_STRICT": "1", **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name(tests)), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0


pytestmark = [
    pytest.mark.skipif(not BUILD, reason="QCACHE_TEST_BUILD names no build folder"),
    pytest.mark.skipif(sys.platform != "linux", reason="loads a library in another's place with LD_PRELOAD"),
]


def test_on_a_mock_of_metal() -> None:
    run("metal_backend.py")


def test_gpu_backend_on_a_mock_of_metal() -> None:
    run("gpu_backend.py", "-k", SOME_OF_GPU_BACKEND)


def test_the_operation_on_a_mock_of_metal() -> None:
    run("test_gpu_op.py", "-k", "test_block_sizes or test_v_", QCACHE_OP_DEVICE="1", QCACHE_TEST_BUILD=str(Path(BUILD).resolve() / "tests" / "metal-mocked"))
