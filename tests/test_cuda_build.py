"""The CUDA sources compile, without a warning and without spilling registers, wherever there is an nvcc."""

import re
import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest

ROOT = Path(__file__).parents[1]
INCLUDES = [ROOT / "ggml_qcache", ROOT / "ggml_qcache" / "include", Path(llama_cpp.__file__).parents[1] / "include"]
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def compile_cuda(source: Path, arch: str, out: Path) -> str:
    """Compiles a file; returns what the assembler says of its kernels."""
    command = [NVCC, "-std=c++17", "-O3", f"-arch={arch}", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "--resource-usage"]
    includes = [f"-I{folder}" for folder in INCLUDES]
    done = subprocess.run([*command, *includes, "-c", source, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def architectures() -> list[str]:
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout if NVCC else ""
    wanted = ("75", "80", "86", "89", "90", "100", "120")
    return [f"sm_{number}" for number in wanted if f"compute_{number}\n" in known]


def check_kernels(arch: str, folder: Path) -> None:
    report = compile_cuda(ROOT / "tests" / "native" / "cuda_kernels.cu", arch, folder / "kernels.o")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    print(arch, "registers", registers, "spills", spills)
    assert len(spills) == len(registers) == 9
    assert all(sum(map(int, of_kernel)) <= 64 for of_kernel in spills)


def test_kernels_of_the_oldest_and_of_hopper(tmp_path: Path) -> None:
    for arch in ("sm_75", "sm_90"):
        check_kernels(arch, tmp_path)


def test_runtime(tmp_path: Path) -> None:
    compile_cuda(ROOT / "ggml_qcache" / "cuda" / "runtime.cu", "sm_90", tmp_path / "runtime.o")


@pytest.mark.slow
@pytest.mark.parametrize("arch", architectures())
def test_kernels_of_every_architecture(tmp_path: Path, arch: str) -> None:
    check_kernels(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attn-decode", "attn-decode-group", "attn-prefill"])
def test_every_kernel(tmp_path: Path, name: str) -> None:
    compile_cuda(ROOT / "ggml_qcache" / "cuda" / f"{name}.cu", "sm_90", tmp_path / f"{name}.o")
