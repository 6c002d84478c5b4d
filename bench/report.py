"""Tables and charts from the JSON files of the benchmarks.

`--write README.md --write docs/speed.md` replaces what lies between the markers `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` there, for
each name of `TEXTS` that a file has: the numbers of the README come from nowhere else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import decode_report
import quality_report
from decode_report import table

Results = Sequence[dict[str, Any]]


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reads results.

    Raises:
        ValueError: A file isn't a result of one of the benchmarks.
    """
    results = []
    for path in paths:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("benchmark") not in KINDS:
            raise ValueError(f"{path} is not a result of a benchmark: {', '.join(KINDS)}")
        results.append(content)
    return results


def quality(result: dict[str, Any]) -> str:
    """One result of bench_quality."""
    return "\n".join([quality_report.facts(result), "", *table(quality_report.COLUMNS, quality_report.cells(result))])


def conversion(result: dict[str, Any]) -> str:
    """One result of bench_conversion."""
    machine, disk = result["machine"], result["disk"]
    facts = (
        f"Shapes of {result['preset']}, f16 checkpoint. {machine['cpu']}, {machine['cores']} cores; the disk reads {disk['read'] / 1e6:.0f} MB/s "
        f"and writes {disk['write'] / 1e6:.0f} MB/s. Commit {result['commit']}; `{result['command']}`. Load at the start {machine['load'][0]}."
    )
    columns = ("layers", "outtype", "read GB", "written GB", "seconds, median", "least to most", "MB/s read", "of the disk's speed", "peak memory MB")
    cells = (
        [
            str(row["n_layer"]), row["outtype"], f"{row['read_bytes'] / 1e9:.2f}", f"{row['written_bytes'] / 1e9:.2f}", f"{row['seconds']:.1f}",
            "{:.1f} to {:.1f}".format(*row["seconds_range"]), f"{row['read_bytes'] / row['seconds'] / 1e6:.0f}", f"{100 * row['disk_share']:.0f} %", f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in result["rows"]
    )  # fmt: skip
    return "\n".join([facts, "", *table(columns, cells)])


def calibration(result: dict[str, Any]) -> str:
    """One result of bench_calibration."""
    minutes, layers = result["minutes"], ", ".join(map(str, result["layers"]))
    facts = (
        f"Worked out for {result['n_layer']} layers and {result['images']} images from models with {layers} layers. {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores. Commit {result['commit']}; `{result['command']}`. Load at the start {result['machine']['load'][0]}."
    )
    columns = ("answers, minutes", "measuring layers", "checking the plan", "all", "peak memory over weights")
    parts = [minutes[part] for part in ("answer", "measure", "check")]
    cells = [*(f"{part:.1f}" for part in (*parts, sum(parts))), f"{result['peak_over_model']:.2f}"]
    if "correct" in minutes:
        columns, cells = (*columns, "all corrections, 4 images"), [*cells, f"{minutes['correct']:.1f}"]
    return "\n".join([facts, "", *table(columns, [cells])])


def _each(render: Callable[[dict[str, Any]], str]) -> Callable[[Results], str]:
    return lambda results: "\n\n".join(map(render, results))


# by name of the markers: the benchmark whose results they show, and how
TEXTS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "speed": ("decode", decode_report.summary),
    "decode": ("decode", _each(decode_report.full)),
    "lazy_attn": ("lazy_attn", _each(decode_report.lazy_attn)),
    "matmul": ("matmul", _each(decode_report.matmul)),
    "quality": ("quality", _each(quality)),
    "calibration": ("calibration", _each(calibration)),
    "conversion": ("conversion", _each(conversion)),
}
KINDS = tuple(dict.fromkeys(kind for kind, _ in TEXTS.values()))


def write(path: Path, texts: dict[str, str]) -> None:
    """Puts texts between the markers that a file has.

    Raises:
        ValueError: The file has none of them, or one that doesn't end.
    """
    content, found = path.read_text(), False
    for name, text in texts.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        before, has_begin, rest = content.partition(begin)
        if has_begin:
            _, has_end, after = rest.partition(end)
            if not has_end:
                raise ValueError(f"{path} has no {end}")
            content, found = f"{before}{begin}\n{text}\n{end}{after}", True
    if not found:
        raise ValueError(f"{path} has no <!-- bench:NAME --> with NAME one of {', '.join(texts)}")
    path.write_text(content)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 done, 1 failed.
    """
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description="Show benchmark results as markdown and charts.")
    parser.add_argument("files", type=Path, nargs="*", metavar="JSON", help="results (default: bench/results/*.json)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the last result of bench_decode there")
    parser.add_argument("--pareto", type=Path, metavar="FILE", help="draw the results of bench_quality there")
    parser.add_argument("--write", type=Path, action="append", metavar="FILE", help="replace the parts between the markers of this file; may be repeated")
    args = parser.parse_args(argv)
    try:
        loaded = load(args.files or sorted(results.glob("*.json")))
        if not loaded:
            raise ValueError(f"no results in {results}")
        by_kind = {kind: [result for result in loaded if result["benchmark"] == kind] for kind in KINDS}
        if args.png is not None and by_kind["decode"]:
            decode_report.draw(by_kind["decode"][-1], args.png)
        if args.pareto is not None and by_kind["quality"]:
            quality_report.draw(by_kind["quality"], args.pareto)
        texts = {name: render(by_kind[kind]) for name, (kind, render) in TEXTS.items() if by_kind[kind]}
        if args.write is None:
            print("\n\n".join(texts.values()))
        for path in args.write or ():
            write(path, texts)
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
