"""How much memory and time a conversion takes, from checkpoints of a big model's shapes with a few layers.

Peak memory is that of the process over what it had before the conversion, Python and its libraries loaded. It is that of one
tensor, so it must not depend on the number of layers: several numbers of them show it. Throughput is in bytes of the checkpoint. The
disk is measured beside it, and each conversion starts with the checkpoint out of the page cache: `disk_share` is the time that the
disk alone needs to read the checkpoint and to write the files, over the time of the conversion.

    python bench/bench_conversion.py --layers 2,4 --outtypes f16,q8_0,q4_0,q4_k_m --json conversion.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggml_qcache_convert.outtypes import OUTTYPES
from machine import facts, write_result
from make_checkpoint import LLAVA_1_5, make_checkpoint

# Linux's VmHWM, not ru_maxrss: a child starts with its parent's
_CODE = """
import json, sys, time
from pathlib import Path
import numpy as np
from ggml_qcache_convert import convert
from ggml_qcache_convert.outtypes import OUTTYPES, quantised

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

source, outfile, mmproj, outtype = sys.argv[1:]
quantised(np.zeros((1, 256), np.float32), OUTTYPES[outtype].matrix)  # loads ggml where it is needed
before, started = peak(), time.monotonic()
convert(Path(source), Path(outfile), Path(mmproj), outtype)
print(json.dumps({"seconds": time.monotonic() - started, "peak_bytes": peak() - before}))
"""


def uncache(folder: Path) -> None:
    """Has the system forget what it holds of a folder's files in memory, where it can be told to."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path, n_bytes: int) -> dict[str, float]:
    """How fast a file is read that isn't cached, and written until it is on the disk; medians of three, in bytes per second."""
    chunk, rates = os.urandom(1 << 22), {"read": [], "write": []}
    n_bytes = max(1, n_bytes // len(chunk)) * len(chunk)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "blob"
        for _ in range(3):
            started = time.monotonic()
            with path.open("wb") as file:
                for _ in range(n_bytes // len(chunk)):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            rates["write"].append(n_bytes / (time.monotonic() - started))
            uncache(Path(name))
            started = time.monotonic()
            with path.open("rb", buffering=0) as file:
                while file.read(len(chunk)):
                    pass
            rates["read"].append(n_bytes / (time.monotonic() - started))
    return {kind: statistics.median(values) for kind, values in rates.items()}


def measure(checkpoint: Path, folder: Path, outtype: str) -> dict[str, float]:
    """Converts in a process of its own.

    Returns:
        ``seconds``, ``peak_bytes`` over the start, ``written_bytes``.
    """
    outfile, mmproj = folder / "m.gguf", folder / "mm.gguf"
    uncache(checkpoint)
    command = [sys.executable, "-c", _CODE, str(checkpoint), str(outfile), str(mmproj), outtype]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    result["written_bytes"] = outfile.stat().st_size + mmproj.stat().st_size
    outfile.unlink()
    mmproj.unlink()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=LLAVA_1_5, default=LLAVA_1_5[0])
    p.add_argument("--layers", default="2,4", help="numbers of layers (default: 2,4)")
    p.add_argument("--outtypes", default="f16,q8_0,q4_0,q4_k_m", help="default: f16,q8_0,q4_0,q4_k_m")
    p.add_argument("--repeats", type=int, default=3, metavar="N", help="conversions of each kind, of which the median counts (default: 3)")
    p.add_argument("--folder", type=Path, help="where to write, with room for a checkpoint and a result (default: the system's)")
    p.add_argument("--shrink", type=int, default=1, help="as make_checkpoint, for tests")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    outtypes = args.outtypes.split(",")
    if unknown := [outtype for outtype in outtypes if outtype not in OUTTYPES]:
        p.error(f"outtype {unknown[0]!r} is not one of {', '.join(OUTTYPES)}")
    if args.repeats < 1:
        p.error(f"--repeats {args.repeats}: at least one is needed")
    result = facts("conversion", argv)
    rows: list[dict[str, Any]] = []
    disk: dict[str, float] = {}
    for n_layer in map(int, args.layers.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            checkpoint = Path(folder) / "checkpoint"
            read = make_checkpoint(checkpoint, args.preset, n_layer=n_layer, shrink=args.shrink)
            disk = disk or disk_speed(Path(folder), min(read, 1 << 29))
            for outtype in outtypes:
                runs = sorted((measure(checkpoint, Path(folder), outtype) for _ in range(args.repeats)), key=lambda run: run["seconds"])
                row = {"n_layer": n_layer, "outtype": outtype, "read_bytes": read, **runs[len(runs) // 2]}
                row["seconds_range"] = [runs[0]["seconds"], runs[-1]["seconds"]]
                row["peak_bytes"] = max(run["peak_bytes"] for run in runs)
                row["disk_share"] = (read / disk["read"] + row["written_bytes"] / disk["write"]) / row["seconds"]
                rows.append(row)
                print(
                    f"{n_layer} layers, {outtype}: {read / 1e9:.2f} GB in {row['seconds']:.1f} s ({runs[0]['seconds']:.1f} to {runs[-1]['seconds']:.1f}), {read / row['seconds'] / 1e6:.0f} MB/s, "
                    f"{100 * row['disk_share']:.0f} % of the disk's speed; "
                    f"peak {row['peak_bytes'] / 1e6:.0f} MB over the start",
                    flush=True,
                )
    if args.json:
        write_result({**result, "preset": args.preset, "disk": disk, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
