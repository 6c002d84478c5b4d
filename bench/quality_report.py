"""What report.py makes of a result of bench_quality: a table, and a chart of accuracy lost over KV bytes saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "method", "mode", "lazy layers", "dropped layers", "KV saved", "mean loss, points", "closed tasks", "caption, exact", "objects recalled",
    "objects made up", "caption perplexity", "KL, nats", "top-1 agreement",
)  # fmt: skip


def facts(result: dict[str, Any]) -> str:
    """What was measured, on what; rows may have been taken from a run at an earlier commit."""
    begun = f", with rows of {result['begun_at_commit']}" if "begun_at_commit" in result else ""
    return (
        f"{result['scenes']} held-out scenes with one question of each task; accuracies in percent, a task's standard error is at most "
        f"{100 * 0.5 / result['scenes'] ** 0.5:.1f}. {result['machine']['cpu']}. Commit {result['commit']}{begun}; "
        f"`{result['command']}`."
    )


def cells(result: dict[str, Any]) -> Iterator[list[str]]:
    """One row of ``COLUMNS`` for each plan; accuracies in percent."""
    for row in result["rows"]:
        caption = row["tasks"]["caption"]
        yield [
            row["method"], row["mode"], str(len(row["lazy_layers"])), str(len(row["dropped_layers"])), f"{row['kv_saved']:.1%}",
            f"{row['mean_loss_points']:.1f}",
            f"{100 * row['closed_mean']:.1f}", f"{100 * caption['accuracy']:.1f} ± {100 * caption['stderr']:.1f}",
            f"{100 * row['caption']['recalled']:.1f}", f"{100 * row['caption']['hallucinated']:.1f}",
            f"{row['caption_perplexity']:.3f}", f"{row['kl']:.4f}", f"{row['top1_agreement']:.1%}",
        ]  # fmt: skip


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each lazy mode, a line for each method, of all results; methods without lazy layers are in both panels.

    The scale of the loss is logarithmic above one point, so that both what hardly loses and what loses all can be told apart.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # more methods than a colour cycle has; one colour in both panels
    all_rows = [row for result in results for row in result["rows"]]
    methods = list(dict.fromkeys(row["method"] for row in all_rows))
    colours = dict(zip(methods, [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]]))
    modes = sorted({row["mode"] for row in all_rows} - {"off"}) or ["off"]
    figure = Figure(figsize=(5.0 * len(modes) + 2.0, 4.5), layout="constrained")
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    for axes, mode in zip(panels, modes):
        rows = [row for row in all_rows if row["mode"] in (mode, "off")]
        for method in dict.fromkeys(row["method"] for row in rows):
            points = sorted((100 * row["kv_saved"], row["mean_loss_points"]) for row in rows if row["method"] == method)
            lazy = any(row["lazy_layers"] for row in rows if row["method"] == method)
            style = {"marker": "o" if lazy else "s", "linestyle": "-" if lazy and method != "random" else ":"}
            axes.plot(*zip(*points), label=method, color=colours[method], **style)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(title=mode, xlabel="KV bytes saved, %", yscale="symlog")
        axes.set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean loss over six tasks, points")
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
