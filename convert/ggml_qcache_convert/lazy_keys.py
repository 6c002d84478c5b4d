"""The GGUF keys that make layers lazy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gguf import GGUFWriter

from .lazy_layers import leaders_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .calibration import Calibration

VERSION = 1
MODES = ("visual", "global")


def add_lazy_keys(writer: GGUFWriter, lazy_layers: Sequence[int], mode: str, n_layer: int) -> None:
    """Adds the ``qcache.*`` keys, or none when no layer is lazy: such a file is a plain model."""
    if not lazy_layers:
        return
    writer.add_uint32("qcache.version", VERSION)
    writer.add_string("qcache.lazy.mode", mode)
    writer.add_array("qcache.lazy.leader", leaders_of(lazy_layers, n_layer))


def add_calibration_keys(writer: GGUFWriter, chosen: "Calibration") -> None:
    """Adds what the choice of the lazy layers rests on: the divergence by layer, and what was run."""
    settings, measured = chosen.settings, chosen.measured
    writer.add_array("qcache.lazy.js_divergence", [float(value) for value in measured.js_divergence])
    writer.add_array("qcache.calibration.pair_divergence", [float(value) for value in measured.pair_divergence.ravel()])
    writer.add_array("qcache.calibration.output_error", _by_layer(chosen, measured.output_error))
    writer.add_string("qcache.calibration.metric", "given" if settings.layers is not None else settings.metric)
    writer.add_uint32("qcache.calibration.samples", len(measured.samples))
    writer.add_uint32("qcache.calibration.tokens", measured.n_tokens)
    writer.add_float32("qcache.calibration.visual_share", measured.visual_share)
    if settings.layers is None and settings.budget is not None:
        writer.add_float32("qcache.calibration.budget", settings.budget)
    if chosen.threshold is not None:
        writer.add_float32("qcache.calibration.threshold", chosen.threshold)
    writer.add_float32("qcache.calibration.kv_saved", chosen.kv_saved)
    writer.add_float32("qcache.calibration.logits_kl", chosen.logits_kl)
    if chosen.corrections is not None:
        writer.add_string("qcache.calibration.corrections", ",".join(settings.corrections))
        writer.add_float32("qcache.calibration.logits_kl_uncorrected", chosen.uncorrected_kl)
        last = {error.layer: error.last for error in chosen.corrections.errors}
        writer.add_array("qcache.calibration.corrected_error", [last.get(layer, 0.0) for layer in range(len(chosen.leaders))])
    writer.add_uint64("qcache.calibration.seed", settings.seed)


def _by_layer(chosen: "Calibration", errors: "npt.NDArray[np.float64]") -> list[float]:
    """Each lazy layer's error with its leader, 0 for a full layer."""
    return [float(errors[leader, layer]) if leader != layer else 0.0 for layer, leader in enumerate(chosen.leaders)]
