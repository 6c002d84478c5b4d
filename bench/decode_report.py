"""Results of bench_decode, bench_lazy_attn and bench_matmul as tables and a chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_COLUMNS = (
    "context", "sequences", "method", "ms per step", "IQR", "tokens/s", "KV MB", "KV GB/s", "of bandwidth",
    "x llama.cpp's best", "its limit", "x lazy off", "its limit",
)  # fmt: skip
_MODES = ("none", "visual", "global")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table; names to the left, numbers to the right."""
    align = ["---" if column in ("method", "mode", "model", "shape", "type", "our KV") else "---:" for column in columns]
    return [f"| {' | '.join(cells)} |" for cells in (columns, align, *rows)]


def full(result: dict[str, Any]) -> str:
    """One result of bench_decode, every row, with what it was measured on."""
    machine, versions, model = result["machine"], result["versions"], result["model"]
    lines = [
        f"{model['file']}: {model['architecture']}, {model['n_layer']} layers, {model['n_head']} heads, {model['n_head_kv']} KV heads of "
        f"{model['head_dim']}, {model['n_bytes'] / 1e9:.2f} GB of weights. {machine['cpu']}, {result['threads']} threads, {result['kernel']}, memory read at "
        f"{result['read_bandwidth'] / 1e9:.1f} GB/s. Commit {result['commit']}, ggml {versions['ggml']}, llama-cpp-python "
        f"{versions['llama_cpp_python']}; `{result['command']}`. Load at the start {machine['load'][0]}.",
        "",
        *table(_COLUMNS, map(_cells, result["rows"])),
        "",
        *table(
            ("prefilled tokens", "method", "tokens/s"),
            ([str(one["n_tokens"]), _method(one), f"{one['tokens_per_s']:.1f}"] for one in result["prefill"]),
        ),
        "",
        f"Loaded in {', '.join(f'{seconds:.1f} s ({name})' for name, seconds in result['load_seconds'].items())}. "
        f"Python adds {1e6 * result['python_seconds_per_token']:.0f} us to a generated token.",
    ]
    return "\n".join(lines)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """All results of bench_decode, a line for each context and number of sequences."""
    rows = []
    for result in results:
        for context, n_seq in dict.fromkeys((row["context"], row["n_seq"]) for row in result["rows"]):
            case = [row for row in result["rows"] if (row["context"], row["n_seq"]) == (context, n_seq)]
            peer = next(row for row in case if row["lazy"] is None and row["setting"] == row["peer"])
            for kv in dict.fromkeys(row["kv"] for row in case if row["lazy"] is not None):
                ours = {row["lazy"]: row for row in case if row["kv"] == kv and row["lazy"] is not None}
                cells = [_model(result), str(context), str(n_seq), f"{peer['ms_per_step']:.1f} ({peer['kv']})", kv]
                for mode in _MODES:
                    row = ours.get(mode)
                    cells.append("" if row is None else f"{row['ms_per_step']:.1f} ({row['ratio_peer']:.2f} x)")
                rows.append(cells)
    columns = ("model", "context", "sequences", "llama.cpp's best, ms (its KV)", "our KV", *(f"lazy {mode}, ms" for mode in _MODES))
    return "\n".join(table(columns, rows))


def lazy_attn(result: dict[str, Any]) -> str:
    """The operation alone, a line for each shape, type and number of sequences."""
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        shape = f"{row['n_head']} heads, {row['n_head_kv']} KV heads of {row['head_dim']}"
        rows.setdefault((shape, row["type"], str(row["n_seq"])), {})[row["mode"]] = row
    facts = (
        f"Kernel {result['kernel']}, {result['threads']} threads, {result['keys']} keys a sequence. KV in GB/s, and its share of "
        "what a loop of plain loads reads of the same memory; what the kernel gets through with few keys, again and again from the caches."
    )
    cells = (
        [
            *case,
            *(f"{modes[mode]['gbps']:.1f} ({100 * modes[mode]['bandwidth_share']:.0f} %)" for mode in ("off", "visual", "global")),
            f"{modes['off']['cached_gbps']:.1f}" if "cached_gbps" in modes["off"] else "",
        ]
        for case, modes in rows.items()
    )
    return "\n".join([facts, "", *table(("shape", "type", "sequences", "lazy off", "lazy visual", "lazy global", "off, from the caches"), cells)])


def matmul(result: dict[str, Any]) -> str:
    """Products with quantised weights, a line for each type."""
    columns = list(dict.fromkeys(row["columns"] for row in result["rows"]))
    ours = {(row["type"], row["columns"]): row for row in result["rows"] if row["weights"] == "ours"}
    facts = f"Kernel {result['kernel']}, {result['threads']} threads, weights of {result['k']} x {result['m']}. GFLOP/s, and how many times ggml's best."
    cells = (
        [kind, *(f"{ours[kind, n]['gflops']:.0f} ({ours[kind, n]['ratio_best']:.1f} x)" for n in columns)]
        for kind in dict.fromkeys(row["type"] for row in result["rows"])
    )
    return "\n".join([facts, "", *table(("type", *(f"{n} row{'s' if n > 1 else ''}" for n in columns)), cells)])


def draw(result: dict[str, Any], path: Path) -> None:
    """A chart of milliseconds per step over the context, one panel for each number of sequences; of llama.cpp the best setting."""
    from matplotlib.figure import Figure

    counts = sorted({row["n_seq"] for row in result["rows"]})
    figure = Figure(figsize=(5.5 * len(counts), 4.2), layout="constrained")
    for axes, n_seq in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts):
        rows = sorted((row for row in result["rows"] if row["n_seq"] == n_seq), key=lambda row: row["context"])
        peers = [row for row in rows if row["lazy"] is None and row["setting"] == row["peer"]]
        lines = {"llama.cpp's best": peers}
        for row in rows:
            if row["lazy"] is not None:
                lines.setdefault(row["setting"], []).append(row)
        colours: dict[str, str] = {}
        for label, points in lines.items():
            kv, mode = points[0]["kv"], points[0]["lazy"]
            colour = "black" if mode is None else colours.setdefault(mode, f"C{len(colours)}")
            style = {"q8_0": "--", "q4_0": ":"}.get(kv, "-") if mode is not None else "-"
            axes.plot(*zip(*((row["context"], row["ms_per_step"]) for row in points)), style, marker="o", color=colour, label=label)
        axes.set(title=f"{n_seq} sequence{'s' if n_seq > 1 else ''}", xlabel="context, tokens", ylabel="ms per step", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _method(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['setting']}"


def _model(result: dict[str, Any]) -> str:
    model = result["model"]
    name = model["file"].rpartition(".")[0]
    return f"{name}: {model['n_head']} heads, {model['n_head_kv']} KV heads of {model['head_dim']}; {result['kernel']}"


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, digits: int, factor: float = 1.0, unit: str = "") -> str:
        return "" if row.get(key) is None else f"{factor * row[key]:.{digits}f}{unit}"

    return [
        str(row["context"]), str(row["n_seq"]), _method(row), shown("ms_per_step", 1), shown("ms_iqr", 1), shown("tokens_per_s", 1),
        shown("kv_bytes", 0, 1e-6), shown("kv_gbps", 1), shown("bandwidth_share", 0, 100, " %"), shown("ratio_peer", 2),
        shown("ratio_peer_limit", 2), shown("ratio_lazy_off", 2), shown("ratio_lazy_off_limit", 2),
    ]  # fmt: skip
