"""What a calibration found, as a picture and as a web page of one file."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConversionError
from ..lazy_layers import NO_ATTENTION, dropped_of, lazy_of
from ..writer import AtomicFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .calibrate import Calibration

SUFFIXES = (".html", ".png")
STEPS = ("shared", "aligned", "biased", "refitted", "revalued")


def check_report(path: Path) -> None:
    """Refuses what would fail after minutes of work.

    Raises:
        ValueError: A name that ends otherwise, or a folder that doesn't exist.
        ConversionError: matplotlib isn't installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a report is a {' or a '.join(SUFFIXES)} file")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path}: can't be written there")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConversionError("a report is drawn with matplotlib: pip install matplotlib") from None


def write_report(chosen: Calibration, name: str, path: Path) -> None:
    """Writes the report; atomically.

    Args:
        chosen: What was found.
        name: The model's.
        path: A ``.png`` or ``.html`` file; the latter has the picture in it.

    Raises:
        OSError: It can't be written.
    """
    picture = io.BytesIO()
    draw(chosen, name).savefig(picture, dpi=110, format="png")
    with AtomicFiles([path]) as files:
        if path.suffix.lower() == ".png":
            files.path(path).write_bytes(picture.getvalue())
        else:
            files.path(path).write_text(_page(chosen, name, picture.getvalue()), encoding="utf-8")
        files.commit()


def draw(chosen: Calibration, name: str) -> Figure:
    """The picture: divergence by pair of layers with the Lazy Blocks, error by layer, KV bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(f"{name}: {facts(chosen)['lazy layers']}, {facts(chosen)['KV bytes saved']} of the KV bytes saved")
    pairs, errors, kv = figure.subplots(1, 3, width_ratios=(1.1, 1.4, 0.8))
    _draw_pairs(pairs, chosen)
    _draw_errors(errors, chosen)
    _draw_kv(kv, chosen)
    return figure


def _draw_pairs(axes: Axes, chosen: Calibration) -> None:
    from matplotlib.patches import Rectangle

    shown = axes.imshow(chosen.measured.pair_divergence, cmap="viridis", vmin=0, vmax=np.log(2))
    axes.figure.colorbar(shown, ax=axes, shrink=0.8, label="Jensen-Shannon divergence, nats")
    for first, end in lazy_blocks(chosen.leaders):
        axes.add_patch(Rectangle((first - 0.5, first - 0.5), end - first, end - first, fill=False, edgecolor="red", linewidth=1.5))
    axes.set(title="attention of the last row, by pair of layers\n(red: Lazy Blocks)", xlabel="layer", ylabel="layer")


def _draw_errors(axes: Axes, chosen: Calibration) -> None:
    dropped = set(dropped_of(chosen.leaders))
    shown = sorted({*lazy_of(chosen.leaders), *dropped})
    alone = chosen.measured.errors_of(chosen.leaders)
    bars: dict[str, dict[int, float]] = {"alone": {layer: alone[layer] for layer in shown}}
    if chosen.corrections is not None:
        for step in STEPS:
            values = {error.layer: getattr(error, step) for error in chosen.corrections.errors}
            if all(value is not None for value in values.values()):
                bars["together, " + step if step == "shared" else step] = values
    width = 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        at = np.array([shown.index(layer) for layer in values])
        axes.bar(at + (i + 0.5) * width - 0.4, np.maximum(list(values.values()), 1e-12), width, label=label)
    axes.set_xticks(range(len(shown)), [f"{layer}\ndropped" if layer in dropped else str(layer) for layer in shown])
    axes.set(title="error of the residual stream after a layer's attention\n(relative, squared)", xlabel="lazy or dropped layer", yscale="log")
    axes.legend(fontsize="small")


def _draw_kv(axes: Axes, chosen: Calibration) -> None:
    full, kept = 100.0, 100 * (1 - chosen.kv_saved)
    axes.bar(["every layer\nfull", "as chosen"], [full, kept], color=["tab:gray", "tab:cyan"])
    axes.bar_label(axes.containers[0], fmt="%.1f %%")
    axes.set(title="KV bytes of the samples", ylabel="% of a full cache", ylim=(0, 110))


def lazy_blocks(leaders: list[int]) -> list[tuple[int, int]]:
    """Lazy Blocks of more than their leader, as first layer and layer after the last lazy one."""
    last = {leader: layer for layer, leader in enumerate(leaders) if leader != NO_ATTENTION}
    return [(first, layer + 1) for first, layer in last.items() if layer > first]


def facts(chosen: Calibration) -> dict[str, str]:
    """What was run and what came of it."""
    settings, measured = chosen.settings, chosen.measured
    dropped = dropped_of(chosen.leaders)
    result = {
        "lazy layers": f"{len(lazy_of(chosen.leaders))} of {len(chosen.leaders)} layers lazy, {settings.mode} mode"
        + (f", {len(dropped)} without attention" if dropped else ""),
        "chosen by": "given" if settings.layers is not None else settings.metric,
        "samples": f"{len(measured.samples)}, {measured.n_tokens} tokens, {measured.visual_share:.0%} visual",
        "KV bytes saved": f"{chosen.kv_saved:.1%}",
        "KL divergence of the logits": f"{chosen.logits_kl:.5f} nats",
    }
    if settings.corrects:
        result["uncorrected"] = f"{chosen.uncorrected_kl:.5f} nats"
        result["corrections"] = ", ".join(settings.corrections)
    if chosen.corrections is not None and chosen.corrections.refit_step is not None:
        result["refitted weights go"] = f"{chosen.corrections.refit_step:.0%} of the way"
    return result


def _page(chosen: Calibration, name: str, picture: bytes) -> str:
    title = html.escape(f"Lazy layers of {name}")
    rows = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in facts(chosen).items())
    headings = ("layer", "leader", "JS divergence from the layer before", "error if dropped", "error alone", *STEPS)
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in _layer_rows(chosen))
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:1500px}img{width:100%}table{border-collapse:collapse;margin:1em 0}"
        "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}th:first-child{text-align:left}"
    )
    image = base64.b64encode(picture).decode()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style><h1>{title}</h1>'
        f'<table>{rows}</table><img alt="divergence by pair of layers, error by layer, KV bytes" src="data:image/png;base64,{image}">'
        f"<table><tr>{head}</tr>{body}</table><p>Errors are relative and squared, of the residual stream after the layer's attention. "
        "If dropped, and alone: in the untouched model, at rows of text and some visual ones. Shared and later: over all rows, with all lazy layers "
        "before it, and after each correction; refitted: W_o, revalued: W_v too, all the way.</p></html>\n"
    )


def _layer_rows(chosen: Calibration) -> list[list[Any]]:
    errors = {error.layer: error for error in (chosen.corrections.errors if chosen.corrections else [])}

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2e}"

    rows = []
    measured = chosen.measured
    alone = measured.errors_of(chosen.leaders)
    for layer, leader in enumerate(chosen.leaders):
        full = leader == layer
        steps = [shown(getattr(errors[layer], step)) for step in STEPS] if layer in errors else [""] * len(STEPS)
        of = "" if full else "no attention" if leader == NO_ATTENTION else leader
        rows.append([layer, of, f"{measured.js_divergence[layer]:.4f}", shown(measured.drop_error[layer]), "" if full else shown(alone[layer]), *steps])
    return rows
