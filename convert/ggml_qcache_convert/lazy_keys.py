"""The GGUF keys that make layers lazy or drop their attention, and the tensors that such layers do without."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gguf import GGUFWriter

from .lazy_layers import dropped_of, lazy_of

if TYPE_CHECKING:
    from .calibration import Calibration

MODES = ("visual", "global")
ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")  # tensors of a layer


def add_lazy_keys(writer: GGUFWriter, leaders: Sequence[int], mode: str) -> None:
    """Adds the ``qcache.*`` keys, or none when every layer is full: such a file is a plain model."""
    dropped = dropped_of(leaders)
    if not dropped and not lazy_of(leaders):
        return
    writer.add_uint32("qcache.version", 2 if dropped else 1)  # what reads version 1 alone knows no layer without attention
    writer.add_string("qcache.lazy.mode", mode)
    writer.add_array("qcache.lazy.leader", list(leaders))


def left_out(leaders: Sequence[int], mode: str, keep_qk: bool) -> dict[int, tuple[str, ...]]:
    """The tensors that a file does without, weights and biases, by layer.

    Args:
        leaders: ``[n_layer]``.
        mode: ``visual`` or ``global``.
        keep_qk: Leave out nothing.
    """
    if keep_qk:
        return {}
    unshared = lazy_of(leaders) if mode == "global" else []
    return dict.fromkeys(unshared, ("attn_q", "attn_k")) | dict.fromkeys(dropped_of(leaders), ATTENTION)


def add_calibration_keys(writer: GGUFWriter, chosen: "Calibration") -> None:
    """Adds what the choice of the lazy layers rests on: the divergence by layer, and what was run."""
    settings, measured = chosen.settings, chosen.measured
    writer.add_array("qcache.lazy.js_divergence", [float(value) for value in measured.js_divergence])
    writer.add_array("qcache.calibration.pair_divergence", [float(value) for value in measured.pair_divergence.ravel()])
    writer.add_array("qcache.calibration.output_error", [float(error) for error in measured.errors_of(chosen.leaders)])
    writer.add_array("qcache.calibration.drop_error", [float(error) for error in measured.drop_error])
    writer.add_string("qcache.calibration.metric", "given" if settings.layers is not None else settings.metric)
    writer.add_uint32("qcache.calibration.samples", len(measured.samples))
    writer.add_uint32("qcache.calibration.tokens", measured.n_tokens)
    writer.add_float32("qcache.calibration.visual_share", measured.visual_share)
    if settings.layers is None and settings.budget is not None:
        writer.add_float32("qcache.calibration.budget", settings.budget)
    if settings.drop_attention:
        writer.add_bool("qcache.calibration.drop_attention", True)
    if chosen.threshold is not None:
        writer.add_float32("qcache.calibration.threshold", chosen.threshold)
    writer.add_float32("qcache.calibration.kv_saved", chosen.kv_saved)
    writer.add_float32("qcache.calibration.logits_kl", chosen.logits_kl)
    if chosen.corrections is not None:
        writer.add_string("qcache.calibration.corrections", ",".join(settings.corrections))
        writer.add_float32("qcache.calibration.logits_kl_uncorrected", chosen.uncorrected_kl)
        if chosen.corrections.refit_step is not None:
            writer.add_float32("qcache.calibration.refit_step", chosen.corrections.refit_step)
        last = {error.layer: error.last for error in chosen.corrections.errors}
        writer.add_array("qcache.calibration.corrected_error", [last.get(layer, 0.0) for layer in range(len(chosen.leaders))])
    writer.add_uint64("qcache.calibration.seed", settings.seed)
