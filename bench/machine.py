"""What a measurement was made on: commit, machine, versions."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from llama_cpp._ggml import libggml

import ggml_qcache


def commit() -> str:
    """The commit of this repository, with ``-dirty`` where tracked files differ; "unknown" outside of git."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return git.stdout.strip() or "unknown"


def machine() -> dict[str, str | int | list[float]]:
    """CPU, cores, and how busy the machine is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "arch": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count() or 1,
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    """Versions of everything that is measured."""
    libggml.ggml_version.restype = ctypes.c_char_p
    return {
        "ggml_qcache": ggml_qcache.__version__,
        "ggml": libggml.ggml_version().decode(),
        "llama_cpp_python": version("llama-cpp-python"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
    }
