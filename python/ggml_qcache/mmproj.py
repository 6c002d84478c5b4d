"""What an mmproj file must hold before libmtmd gets it: a damaged one would end the process there."""

from __future__ import annotations

from gguf import GGUFReader

from .errors import ModelError
from .gguf_file import read_gguf, value


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
    for name in ("v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias"):
        if name in shapes:
            expect(name, (n_embd,), (n_embd, 1))
    return width
