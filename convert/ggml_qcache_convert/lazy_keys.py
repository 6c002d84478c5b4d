"""The GGUF keys that make layers lazy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gguf import GGUFWriter

from .lazy_layers import leaders_of

if TYPE_CHECKING:
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
    if settings.corrects:
        writer.add_string("qcache.calibration.corrections", ",".join(settings.corrections))
        writer.add_float32("qcache.calibration.logits_kl_uncorrected", chosen.uncorrected_kl)
    writer.add_uint64("qcache.calibration.seed", settings.seed)
