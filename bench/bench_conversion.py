"""How much memory and time a conversion takes, from checkpoints of a big model's shapes with a few layers.

Peak memory is that of the process over what it had before the conversion, Python and its libraries loaded. It is that of one
tensor, so it must not depend on the number of layers: several numbers of them show it. Throughput is in bytes of the checkpoint; a
conversion that reads a file which isn't cached, or shares its cores, is slower.

    python bench/bench_conversion.py --layers 2,4 --outtypes f16,q8_0,q4_0,q4_k_m --json conversion.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggml_qcache_convert.outtypes import OUTTYPES
from ggml_qcache_convert.writer import AtomicFiles
from machine import commit, machine, versions
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


def measure(checkpoint: Path, folder: Path, outtype: str) -> dict[str, float]:
    """Converts in a process of its own.

    Returns:
        ``seconds``, ``peak_bytes`` over the start, ``written_bytes``.
    """
    outfile, mmproj = folder / "m.gguf", folder / "mm.gguf"
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
    p.add_argument("--folder", type=Path, help="where to write, with room for a checkpoint and a result (default: the system's)")
    p.add_argument("--shrink", type=int, default=1, help="as make_checkpoint, for tests")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    outtypes = args.outtypes.split(",")
    if unknown := [outtype for outtype in outtypes if outtype not in OUTTYPES]:
        p.error(f"outtype {unknown[0]!r} is not one of {', '.join(OUTTYPES)}")
    rows: list[dict[str, Any]] = []
    for n_layer in map(int, args.layers.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            checkpoint = Path(folder) / "checkpoint"
            read = make_checkpoint(checkpoint, args.preset, n_layer=n_layer, shrink=args.shrink)
            for outtype in outtypes:
                row = {"n_layer": n_layer, "outtype": outtype, "read_bytes": read, **measure(checkpoint, Path(folder), outtype)}
                rows.append(row)
                print(
                    f"{n_layer} layers, {outtype}: {read / 1e9:.2f} GB in {row['seconds']:.1f} s, {read / row['seconds'] / 1e6:.0f} MB/s; "
                    f"peak {row['peak_bytes'] / 1e6:.0f} MB over the start",
                    flush=True,
                )
    result = {
        "benchmark": "conversion", "commit": commit(), "machine": machine(), "versions": versions(), "preset": args.preset,
        "command": " ".join(["bench_conversion.py", *(sys.argv[1:] if argv is None else argv)]), "rows": rows,
    }  # fmt: skip
    if args.json:
        with AtomicFiles([args.json]) as files:
            files.path(args.json).write_text(json.dumps(result, indent=1) + "\n")
            files.commit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
