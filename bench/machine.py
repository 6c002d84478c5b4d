"""What a measurement was made on, and the file that keeps it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_cpp._ggml import libggml

import ggml_qcache
from ggml_qcache_convert.writer import AtomicFiles


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


def facts(benchmark: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """How a result begins; to be taken before anything is measured.

    Args:
        benchmark: Its name.
        argv: Arguments of its ``main``; None: the process's own.
    """
    command = shlex.join([f"bench_{benchmark}.py", *(sys.argv[1:] if argv is None else argv)])
    return {"benchmark": benchmark, "commit": commit(), "machine": machine(), "versions": versions(), "command": command}


def write_result(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFiles([path]) as files:
        files.path(path).write_text(json.dumps(result, indent=1) + "\n")
        files.commit()
