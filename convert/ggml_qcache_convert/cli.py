"""The command ``convert_to_gguf``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .conversion import ConversionResult, convert
from .lazy_keys import MODES
from .plan import OUTTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 converted, 1 refused or failed, 130 interrupted. In the last two nothing is left behind.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    # an empty name, as of "/", leaves "model"
    name = args.directory.resolve().name or "model"
    outfile = args.outfile or Path(f"{name}-{args.outtype}.gguf")
    mmproj = args.mmproj or Path(f"mmproj-{name}-{'f32' if args.outtype == 'f32' else 'f16'}.gguf")
    try:
        result = convert(
            args.directory,
            outfile,
            mmproj,
            args.outtype,
            args.lazy_layers,
            args.lazy_mode,
            args.keep_qk,
            progress=not (args.no_progress or args.quiet),
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, nothing written", file=sys.stderr)
        return 130
    for warning in result.warnings:
        print(f"{parser.prog}: warning: {warning}", file=sys.stderr)
    if not args.quiet:
        print(_summary(result, args.lazy_mode))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_to_gguf",
        description="Convert a Hugging Face LLaVA checkpoint to a text GGUF and an mmproj GGUF, lazy if asked for.",
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="directory with config.json, safetensors and tokenizer"
    )
    parser.add_argument("--outfile", type=Path, metavar="FILE", help="text GGUF (default: NAME-OUTTYPE.gguf)")
    parser.add_argument("--mmproj", type=Path, metavar="FILE", help="vision GGUF (default: mmproj-NAME-f16.gguf)")
    parser.add_argument(
        "--outtype", choices=list(OUTTYPES), default="f16", help="type of the weight matrices (default: f16)"
    )
    parser.add_argument(
        "--lazy-layers",
        default="none",
        metavar="SPEC",
        help="layers that share their leader's attention: none, or e.g. 9-15,18,20-31 (default: none)",
    )
    parser.add_argument("--lazy-mode", choices=MODES, default="visual", help="which tokens share (default: visual)")
    parser.add_argument(
        "--keep-qk",
        action="store_true",
        help="in global mode keep the q and k weights of lazy layers: the file then also runs as a plain model",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser


def _summary(result: ConversionResult, mode: str) -> str:
    lines = [f"{result.outfile}: {result.arch}, {result.n_layer} layers, {result.outfile_bytes / 2**20:.1f} MiB"]
    if result.mmproj is not None:
        lines.append(f"{result.mmproj}: vision tower and projector, {result.mmproj_bytes / 2**20:.1f} MiB")
    lazy = [layer for layer, leader in enumerate(result.leaders) if leader != layer]
    if lazy:
        lines.append(
            f"{len(lazy)} lazy layers, {mode} mode: "
            + ", ".join(f"{layer} ({result.leaders[layer]})" for layer in lazy)
            + " (leader)"
        )
    return "\n".join(lines)
