"""The CUDA sources compile, without a warning and without spilling registers, wherever there is an nvcc."""

import re
import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest

try:
    import nvidia  # holds nvdisasm
except ImportError:
    nvidia = None

ROOT = Path(__file__).parents[1]
INCLUDES = [ROOT / "ggml_qcache", ROOT / "ggml_qcache" / "include", Path(llama_cpp.__file__).parents[1] / "include"]
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def compile_cuda(source: Path, arch: str, out: Path, kind: str = "-c") -> str:
    """Compiles a file; returns what the assembler says of its kernels."""
    command = [NVCC, "-std=c++17", "-O3", f"-arch={arch}", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "--resource-usage"]
    includes = [f"-I{folder}" for folder in INCLUDES]
    done = subprocess.run([*command, *includes, kind, source, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def architectures() -> list[str]:
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout if NVCC else ""
    wanted = ("75", "80", "86", "89", "90", "100", "120")
    return [f"sm_{number}" for number in wanted if f"compute_{number}\n" in known]


def machine_code(kernel: str, arch: str, folder: Path) -> list[str]:
    """The instructions of a kernel, in the order in which they lie."""
    disassembler = next((Path(path) / "cu13" / "bin" / "nvdisasm" for path in nvidia.__path__), None) if nvidia else None
    if disassembler is None or not disassembler.exists():
        pytest.skip("no nvdisasm")
    source = folder / "kernel.cu"
    instance = f"qg_cuda_launch<{kernel}>(const qcache_gpu_launch &, const void *, cudaStream_t)"
    source.write_text(f'#include "cuda/launch.cuh"\ntemplate cudaError_t {instance};\n')
    compile_cuda(source, arch, folder / "kernel.cubin", "-cubin")
    text = subprocess.run([disassembler, "-c", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)


def loads_under_way(instructions: list[str]) -> int:
    """The most loads of 16 bytes that have been asked for before one of them is waited for."""
    most, pending = 0, set()
    for instruction in instructions:
        load = re.search(r"\bLDG?\.E\.128\S* R(\d+),", instruction)
        read = {int(n) for n in re.findall(r"\bR(\d+)\b", instruction.split(",", 1)[-1])}  # without what it writes
        if any(first <= register < first + 4 for first in pending for register in read):
            pending.clear()
        if load:
            pending.add(int(load[1]))
            most = max(most, len(pending))
    return most


@pytest.mark.parametrize(
    ("kernel", "at_least"),
    [
        ("qg_decode_kernel<QG_DECODE_DIM + 1, QG_F16, QG_F16>", 8),  # 4 tokens, K and V
        ("qg_decode_group_kernel<128, QG_F16, QG_F16>", 12),  # 16 tokens, K and most of V
        ("qg_prefill_kernel<128, QG_F16, QG_F16>", 4),  # a thread's part of a tile
    ],
)
def test_loads_are_under_way_together(tmp_path: Path, kernel: str, at_least: int) -> None:
    """What no emulation shows: a kernel that waits for each load before the next gets a fraction of the memory's speed."""
    assert loads_under_way(machine_code(kernel, "sm_90", tmp_path)) >= at_least


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
