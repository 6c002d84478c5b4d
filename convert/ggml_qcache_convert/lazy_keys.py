"""The GGUF keys that make layers lazy."""

from collections.abc import Sequence

from gguf import GGUFWriter

from .lazy_layers import leaders_of

VERSION = 1
MODES = ("visual", "global")


def add_lazy_keys(writer: GGUFWriter, lazy_layers: Sequence[int], mode: str, n_layer: int) -> None:
    """Adds the ``qcache.*`` keys, or none when no layer is lazy: such a file is a plain model."""
    if not lazy_layers:
        return
    writer.add_uint32("qcache.version", VERSION)
    writer.add_string("qcache.lazy.mode", mode)
    writer.add_array("qcache.lazy.leader", leaders_of(lazy_layers, n_layer))
