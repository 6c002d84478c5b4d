"""What an mmproj file must hold before libmtmd gets it: a damaged one would end the process there."""

from __future__ import annotations

import numpy as np
from gguf import GGUFReader, dequantize

from .anyres import Anyres
from .errors import ModelError, UnsupportedError
from .gguf_file import read_gguf, value

# llama.cpp's older converter wrote the second
_NEWLINE = ("v.image_newline", "model.image_newline")
_LAYOUTS = ("llava_next", "llava_onevision")
_MAX_TILES = 256  # as the converter's: a damaged file must not ask for memory without end


def mmproj_width(path: str) -> int:
    """Reads the width of the embeddings that an mmproj file gives.

    Raises:
        FileError: There is no such file.
        ModelError: Damaged, or not an mmproj file.
    """
    reader = read_gguf(path)
    architecture = value(reader, "general.architecture")
    if architecture != "clip":
        raise ModelError(f"{path!r} is not an mmproj file: its architecture is {architecture!r}, not 'clip'")
    if projector(reader) == "mlp":
        # LLaVA's. Old files hold the CLIP projection width in the key below, so the weight itself is asked
        return _check_llava(reader, path)
    width = value(reader, "clip.vision.projection_dim")
    if not isinstance(width, int):
        raise ModelError(f"the mmproj {path!r} has no key 'clip.vision.projection_dim'")
    return width


def projector(reader: GGUFReader) -> str | None:
    """Names the projector of an mmproj file."""
    return value(reader, "clip.projector_type") or value(reader, "clip.vision.projector_type")


def _check_llava(reader: GGUFReader, path: str) -> int:
    """Checks every tensor that LLaVA's tower and projector read; returns the width of the output."""
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}  # as ggml has them

    def number(key: str) -> int:
        found = value(reader, f"clip.vision.{key}")
        if not isinstance(found, int) or found < 1:
            raise ModelError(f"the mmproj {path!r}: the key 'clip.vision.{key}' is missing or no positive number ({found!r})")
        return found

    def expect(name: str, *allowed: tuple[int, ...]) -> tuple[int, ...]:
        shape = shapes.get(name)
        if shape is None or (allowed and shape not in allowed):
            expected = " or ".join(str(list(one)) for one in allowed)
            raise ModelError(
                f"the mmproj {path!r} has no tensor {name!r}"
                if shape is None
                else f"the mmproj {path!r}: the tensor {name!r} has shape {list(shape)}, expected {expected}"
            )
        return shape

    n_layer, n_embd, n_ff = number("block_count"), number("embedding_length"), number("feed_forward_length")
    patch, n_head = number("patch_size"), number("attention.head_count")
    n_patches = number("image_size") // patch
    if n_patches < 1 or n_embd % n_head != 0:
        raise ModelError(f"the mmproj {path!r}: images of {n_patches} patches a side, {n_embd} values for {n_head} heads")
    expect("v.patch_embd.weight", (patch, patch, 3, n_embd))
    expect("v.position_embd.weight", (n_embd, n_patches**2 + ("v.class_embd" in shapes)))
    for layer in range(n_layer):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            expect(f"v.blk.{layer}.{name}.weight", (n_embd, n_embd))
        for name in ("ln1", "ln2"):
            expect(f"v.blk.{layer}.{name}.weight", (n_embd,))
        # old files have the two the other way round
        up = expect(f"v.blk.{layer}.ffn_up.weight", (n_embd, n_ff), (n_ff, n_embd))
        expect(f"v.blk.{layer}.ffn_down.weight", up[::-1])
    hidden = expect("mm.0.weight")[-1]
    expect("mm.0.weight", (n_embd, hidden))
    width = expect("mm.2.weight")[-1]
    expect("mm.2.weight", (hidden, width))
    for name in ("v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias", "v.patch_embd.bias"):
        if name in shapes:
            expect(name, (n_embd,), (n_embd, 1))
    return width


def read_anyres(path: str, width: int) -> Anyres | None:
    """Reads how an image becomes tiles, in a file whose embeddings are of the given width; None where it is encoded whole.

    Files of llama.cpp's own converter, which have no `qcache.vision.layout`, are LLaVA-NeXT's if they say `spatial_unpad`.

    Raises:
        FileError: There is no such file.
        ModelError: Damaged.
        UnsupportedError: A layout of a later version.
    """
    reader = read_gguf(path)
    unnamed = "llava_next" if value(reader, "clip.vision.mm_patch_merge_type") == "spatial_unpad" else None
    layout = value(reader, "qcache.vision.layout", unnamed)
    if projector(reader) != "mlp" or layout is None:
        return None
    if layout not in _LAYOUTS:
        raise UnsupportedError(f"the mmproj {path!r}: the layout {layout!r} of tiles is not one of {', '.join(_LAYOUTS)}")
    tile_size = value(reader, "clip.vision.image_size")
    key = "clip.vision.image_grid_pinpoints"
    sides = value(reader, key)
    if (
        not isinstance(sides, list)
        or not sides
        or len(sides) % 2
        or not all(isinstance(side, int) and side > 0 and side % tile_size == 0 for side in sides)
        or max(width * height for width, height in zip(sides[::2], sides[1::2])) > _MAX_TILES * tile_size**2
    ):
        raise ModelError(
            f"the mmproj {path!r}: the key {key!r} holds no widths and heights of up to {_MAX_TILES} tiles of {tile_size} pixels ({sides!r})"
        )
    newline = next((tensor for tensor in reader.tensors if tensor.name in _NEWLINE), None)
    if newline is None or newline.n_elements != width:
        found = "no tensor" if newline is None else f"{newline.n_elements} values in"
        raise ModelError(f"the mmproj {path!r} has {found} {_NEWLINE[0]!r}, expected {width} values")
    max_tiles, pad_color = 0, None
    if layout == "llava_onevision":
        max_tiles = value(reader, "qcache.vision.max_tiles")
        mean = value(reader, "clip.vision.image_mean")
        known_mean = isinstance(mean, list) and len(mean) == 3 and all(0 <= channel <= 1 for channel in mean)
        if not isinstance(max_tiles, int) or max_tiles < 1 or not known_mean:
            raise ModelError(
                f"the mmproj {path!r}: the keys 'qcache.vision.max_tiles' ({max_tiles!r}) and 'clip.vision.image_mean' ({mean!r}) "
                "must be a positive number and three from 0 to 1"
            )
        pad_color = tuple(int(channel * 255) for channel in mean)
    return Anyres(
        tile_size,
        tile_size // value(reader, "clip.vision.patch_size"),
        tuple(zip(sides[1::2], sides[::2])),
        np.array(dequantize(newline.data, newline.tensor_type), dtype=np.float32).reshape(width),
        max_tiles,
        pad_color,
    )
