"""Tables and charts from the JSON files of bench_decode, bench_quality and bench_conversion.

`--write README.md` replaces what lies between `<!-- bench:decode -->` and `<!-- /bench:decode -->` there, and likewise for
`bench:quality` and `bench:conversion`: the numbers of the README come from nowhere else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import quality_report

KINDS = ("decode", "quality", "conversion")
_COLUMNS = (
    "context", "sequences", "method", "ms per step", "IQR", "tokens/s", "KV MB", "KV GB/s", "of bandwidth",
    "x llama.cpp's best", "its limit", "x lazy off",
)  # fmt: skip


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reads results.

    Raises:
        ValueError: A file isn't a result of one of them.
    """
    results = []
    for path in paths:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("benchmark") not in KINDS:
            raise ValueError(f"{path} is not a result of bench_decode, bench_quality or bench_conversion")
        results.append(content)
    return results


def markdown(result: dict[str, Any]) -> str:
    """One result as tables, with what it was measured on."""
    if result["benchmark"] == "quality":
        return "\n".join([quality_report.facts(result), "", *_table(quality_report.COLUMNS, quality_report.cells(result))])
    if result["benchmark"] == "conversion":
        return _conversion(result)
    machine, versions, model = result["machine"], result["versions"], result["model"]
    lines = [
        f"{model['file']}: {model['architecture']}, {model['n_layer']} layers, {model['n_head']} heads, {model['n_head_kv']} KV heads of "
        f"{model['head_dim']}, {model['n_bytes'] / 1e9:.2f} GB of weights. {machine['cpu']}, {result['threads']} threads, memory read at "
        f"{result['read_bandwidth'] / 1e9:.1f} GB/s. Commit {result['commit']}, ggml {versions['ggml']}, llama-cpp-python "
        f"{versions['llama_cpp_python']}; `{result['command']}`. Load at the start {machine['load'][0]}.",
        "",
        *_table(_COLUMNS, map(_decode_cells, result["rows"])),
        "",
        *_table(
            ("prefilled tokens", "method", "tokens/s"),
            ([str(one["n_tokens"]), _method(one), f"{one['tokens_per_s']:.1f}"] for one in result["prefill"]),
        ),
        "",
        "Loaded in " + ", ".join(f"{seconds:.1f} s ({name})" for name, seconds in result["load_seconds"].items()) + ".",
    ]
    return "\n".join(lines)


def _conversion(result: dict[str, Any]) -> str:
    machine, disk = result["machine"], result["disk"]
    facts = (
        f"Shapes of {result['preset']}, f16 checkpoint. {machine['cpu']}, {machine['cores']} cores; the disk reads {disk['read'] / 1e6:.0f} MB/s "
        f"and writes {disk['write'] / 1e6:.0f} MB/s. Commit {result['commit']}; `{result['command']}`. Load at the start {machine['load'][0]}."
    )
    columns = ("layers", "outtype", "read GB", "written GB", "seconds", "MB/s read", "of the disk's speed", "peak memory MB")
    cells = (
        [
            str(row["n_layer"]), row["outtype"], f"{row['read_bytes'] / 1e9:.2f}", f"{row['written_bytes'] / 1e9:.2f}", f"{row['seconds']:.1f}",
            f"{row['read_bytes'] / row['seconds'] / 1e6:.0f}", f"{100 * row['disk_share']:.0f} %", f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in result["rows"]
    )  # fmt: skip
    return "\n".join([facts, "", *_table(columns, cells)])


def _method(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['setting']}"


def _decode_cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, digits: int, factor: float = 1.0, unit: str = "") -> str:
        return "" if row.get(key) is None else f"{factor * row[key]:.{digits}f}{unit}"

    return [
        str(row["context"]), str(row["n_seq"]), _method(row), shown("ms_per_step", 1), shown("ms_iqr", 1), shown("tokens_per_s", 1),
        shown("kv_bytes", 0, 1e-6), shown("kv_gbps", 1), shown("bandwidth_share", 0, 100, " %"), shown("ratio_peer", 2),
        shown("ratio_peer_limit", 2), shown("ratio_lazy_off", 2),
    ]  # fmt: skip


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    align = ["---" if column in ("method", "mode") else "---:" for column in columns]
    return [f"| {' | '.join(cells)} |" for cells in (columns, align, *rows)]


def draw(result: dict[str, Any], path: Path) -> None:
    """A chart of milliseconds per step over the context, one panel for each number of sequences, one line a method."""
    from matplotlib.figure import Figure

    counts = sorted({row["n_seq"] for row in result["rows"]})
    figure = Figure(figsize=(5.5 * len(counts), 4.2), layout="constrained")
    for axes, n_seq in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts):
        rows = sorted((row for row in result["rows"] if row["n_seq"] == n_seq), key=lambda row: row["context"])
        for method in dict.fromkeys(_method(row) for row in rows):
            points = [(row["context"], row["ms_per_step"]) for row in rows if _method(row) == method]
            style = "--" if method.startswith("llama.cpp") else "-"
            axes.plot(*zip(*points), style, marker="o", label=method)
        axes.set(title=f"{n_seq} sequence{'s' if n_seq > 1 else ''}", xlabel="context, tokens", ylabel="ms per step", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def replace_between_markers(path: Path, kind: str, text: str) -> None:
    """Puts a text between the markers of a file.

    Raises:
        ValueError: The file doesn't have them.
    """
    begin, end = f"<!-- bench:{kind} -->", f"<!-- /bench:{kind} -->"
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path} has no {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


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
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the part between the markers of this file")
    args = parser.parse_args(argv)
    try:
        loaded = load(args.files or sorted(results.glob("*.json")))
        if not loaded:
            raise ValueError(f"no results in {results}")
        by_kind = {kind: [result for result in loaded if result["benchmark"] == kind] for kind in KINDS}
        if args.png is not None and by_kind["decode"]:
            draw(by_kind["decode"][-1], args.png)
        if args.pareto is not None and by_kind["quality"]:
            quality_report.draw(by_kind["quality"], args.pareto)
        for kind, of_kind in by_kind.items():
            text = "\n\n".join(map(markdown, of_kind))
            if of_kind and args.write is None:
                print(text)
            elif of_kind:
                replace_between_markers(args.write, kind, text)
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
