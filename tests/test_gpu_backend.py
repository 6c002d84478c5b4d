"""Runs gpu_backend.py where there is no GPU: in a process whose libqcache takes the CPU for one and emulates the kernels.

The emulated library has the name of the real one and is loaded first, so that the extension module finds it in its place.
"""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from tiny_llava import load

from ggml_qcache.errors import UnsupportedError

BUILD = os.environ.get("QCACHE_TEST_BUILD")


@pytest.mark.skipif(not BUILD, reason="QCACHE_TEST_BUILD names no build folder")
@pytest.mark.skipif(sys.platform != "linux", reason="loads a library in another's place with LD_PRELOAD")
def test_with_an_emulated_gpu() -> None:
    library = Path(BUILD).resolve() / "tests" / "emulated" / "libqcache.so"
    assert library.exists()
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    tests = Path(__file__).with_name("gpu_backend.py")
    # an emulated GPU takes seconds to read an image: three of the questions do
    some = "not test_mini_llava_answers or existence or digit or caption"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(tests), "-k", some], env=environment, capture_output=True, text=True, timeout=900)
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0


def test_without_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match=r"n_gpu_layers is -1, but of ggml's devices \(CPU\) none"):
        load(n_gpu_layers=-1)


def test_a_build_for_a_gpu_that_ggml_lacks(tmp_path: Path) -> None:
    root, site = Path(__file__).parents[1], Path(llama_cpp.__file__).parents[1]
    if 'set(GGML_CUDA "OFF")' not in (site / "lib" / "cmake" / "ggml" / "ggml-config.cmake").read_text():
        pytest.skip("this ggml has CUDA")
    command = ["cmake", "-S", root, "-B", tmp_path, "-DGGML_CUDA=ON", "-DQCACHE_BUILD_PYTHON=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "GGML_CUDA=ON, but the llama-cpp-python in" in done.stderr and "--no-cache-dir --force-reinstall" in done.stderr
