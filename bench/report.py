"""Tables and a chart from the JSON files of bench_decode.

`--write README.md` replaces what lies between `<!-- bench:decode -->` and `<!-- /bench:decode -->` there: the numbers of the
README come from nowhere else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:decode -->", "<!-- /bench:decode -->"
_COLUMNS = (
    "context", "sequences", "method", "ms per step", "IQR", "tokens/s", "KV MB", "KV GB/s", "of bandwidth",
    "x llama.cpp's best", "x lazy off",
)  # fmt: skip


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reads results.

    Raises:
        ValueError: A file isn't a result of bench_decode.
    """
    results = []
    for path in paths:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("benchmark") != "decode":
            raise ValueError(f"{path} is not a result of bench_decode")
        results.append(content)
    return results


def markdown(result: dict[str, Any]) -> str:
    """One result as tables, with what it was measured on."""
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


def _method(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['setting']}"


def _decode_cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, digits: int, factor: float = 1.0, unit: str = "") -> str:
        return "" if row[key] is None else f"{factor * row[key]:.{digits}f}{unit}"

    return [
        str(row["context"]), str(row["n_seq"]), _method(row), shown("ms_per_step", 1), shown("ms_iqr", 1), shown("tokens_per_s", 1),
        shown("kv_bytes", 0, 1e-6), shown("kv_gbps", 1), shown("bandwidth_share", 0, 100, " %"), shown("ratio_peer", 2),
        shown("ratio_lazy_off", 2),
    ]  # fmt: skip


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    align = ["---" if column == "method" else "---:" for column in columns]
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


def replace_between_markers(path: Path, text: str) -> bool:
    """Puts a text between the markers of a file; returns whether it has them."""
    content = path.read_text()
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 done, 1 failed.
    """
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description="Show results of bench_decode as markdown and a chart.")
    parser.add_argument("files", type=Path, nargs="*", metavar="JSON", help="results (default: bench/results/*.json)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the last result there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the part between the markers of this file")
    args = parser.parse_args(argv)
    try:
        loaded = load(args.files or sorted(results.glob("*.json")))
        if not loaded:
            raise ValueError(f"no results in {results}")
        text = "\n\n".join(map(markdown, loaded))
        if args.png is not None:
            draw(loaded[-1], args.png)
        if args.write is None:
            print(text)
        elif not replace_between_markers(args.write, text):
            raise ValueError(f"{args.write} has no {BEGIN} ... {END}")
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
