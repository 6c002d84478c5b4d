"""Converts a Hugging Face LLaVA directory: checks everything that can be checked first, then streams both files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter
from tqdm import tqdm

from .checkpoint import Checkpoint
from .errors import ConversionError
from .hparams import LlavaParams, read_hparams
from .lazy_keys import MODES, add_lazy_keys, left_out
from .lazy_layers import leaders_of
from .mmproj import add_vision_keys, read_image_params, vision_tensors
from .outtypes import OUTTYPES
from .plan import OutputTensor, TensorPicker
from .tensor_names import canonical_tensors
from .text_model import add_text_keys, text_tensors
from .vocab import add_vocab_keys, read_vocab
from .writer import AtomicFiles, write_gguf


@dataclass(frozen=True)
class ConversionResult:
    """What was written.

    Attributes:
        outfile: The text GGUF.
        mmproj: The vision GGUF, or None when it wasn't asked for.
        arch: ``llama`` or ``qwen2``.
        n_layer: Number of decoder layers.
        leaders: Leader of each layer: its own number for a full layer, -1 for one without attention.
        outfile_bytes: Size of the text GGUF.
        mmproj_bytes: Size of the vision GGUF, 0 without one.
        warnings: Remarks about what is converted but behaves differently.
    """

    outfile: Path
    mmproj: Path | None
    arch: str
    n_layer: int
    leaders: tuple[int, ...]
    outfile_bytes: int
    mmproj_bytes: int
    warnings: tuple[str, ...]


def convert(
    directory: Path,
    outfile: Path,
    mmproj: Path | None,
    outtype: str = "f16",
    lazy_layers: str | Sequence[int] = (),
    lazy_mode: str = "visual",
    keep_qk: bool = False,
    progress: bool = False,
) -> ConversionResult:
    """Converts a Hugging Face ``LlavaForConditionalGeneration`` directory to a text GGUF and an mmproj GGUF.

    Both files appear together when both are complete; on any failure neither does and existing ones stay as they were.

    Args:
        directory: The checkpoint directory.
        outfile: Text GGUF to write.
        mmproj: Vision GGUF to write, or None for none. Its matrices are f16, or f32 with ``outtype`` ``f32``.
        outtype: A key of ``OUTTYPES``; vectors stay f32.
        lazy_layers: Layer numbers, or a specification such as ``9-15,18,drop:20`` or ``none``.
        lazy_mode: ``visual`` or ``global``.
        keep_qk: Keep the q and k projections of lazy layers in global mode, and the whole attention of dropped layers, so that
            the file also runs as a plain model.
        progress: Show a progress bar on stderr.

    Returns:
        What was written.

    Raises:
        ConversionError: The input is unsupported, damaged or inconsistent.
        ValueError: An argument is invalid.
        OSError: A file can't be written.
    """
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype {outtype!r} isn't one of {', '.join(OUTTYPES)}")
    if lazy_mode not in MODES:
        raise ValueError(f"lazy_mode {lazy_mode!r} isn't one of {', '.join(MODES)}")
    if not directory.is_dir():
        raise ConversionError(f"{directory}: isn't a directory")
    targets = [outfile] if mmproj is None else [outfile, mmproj]
    check_targets(targets)

    params = read_hparams(directory)
    warnings = list(params.warnings)
    n_layer = params.text.n_layer
    leaders = leaders_of(lazy_layers, n_layer)
    vocab = read_vocab(directory, params.text.n_vocab, params.token_ids, warnings)
    images = read_image_params(directory, params.vision, warnings)

    with Checkpoint(directory) as checkpoint:
        inputs = {entry.path.resolve() for entry in checkpoint.tensors.values()}
        if overwritten := [target for target in targets if target.resolve() in inputs]:
            raise ValueError(f"{overwritten[0]}: is part of the checkpoint itself")
        text_plan, vision_plan = _plans(checkpoint, params, outtype, left_out(leaders, lazy_mode, keep_qk))
        name = directory.resolve().name

        def text_keys(writer: GGUFWriter) -> None:
            add_text_keys(writer, params.text, name, OUTTYPES[outtype].file_type)
            add_vocab_keys(writer, vocab)
            add_lazy_keys(writer, leaders, lazy_mode)

        def vision_keys(writer: GGUFWriter) -> None:
            add_vision_keys(
                writer, params.vision, images, params.text.n_embd, name, OUTTYPES[_vision_outtype(outtype)].file_type
            )

        plans = text_plan if mmproj is None else text_plan + vision_plan
        total = sum(tensor.source.nbytes for tensor in plans)
        with (
            AtomicFiles(targets) as files,
            tqdm(
                total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="converting", disable=not progress
            ) as bar,
        ):
            write_gguf(files.path(outfile), params.text.arch, text_keys, text_plan, checkpoint, bar.update)
            if mmproj is not None:
                write_gguf(files.path(mmproj), "clip", vision_keys, vision_plan, checkpoint, bar.update)
            files.commit()
    return ConversionResult(
        outfile,
        mmproj,
        params.text.arch,
        n_layer,
        tuple(leaders),
        outfile.stat().st_size,
        0 if mmproj is None else mmproj.stat().st_size,
        tuple(warnings),
    )


def check_targets(targets: Sequence[Path]) -> None:
    """Refuses what would fail after minutes of work."""
    if len({target.resolve() for target in targets}) < len(targets):
        raise ValueError(f"{targets[0]}: can't be both the text model and the mmproj")
    for target in targets:
        if target.is_dir():
            raise ValueError(f"{target}: is a directory, expected the name of a file to write")
        if not target.parent.is_dir():
            raise ValueError(f"{target}: its directory {target.parent} doesn't exist")


def _vision_outtype(outtype: str) -> str:
    # quantising the tower saves little and costs accuracy that every answer rests on
    return "f32" if outtype == "f32" else "f16"


def _plans(
    checkpoint: Checkpoint, params: LlavaParams, outtype: str, without: Mapping[int, Sequence[str]]
) -> tuple[list[OutputTensor], list[OutputTensor]]:
    """Plans both files; together they must account for every tensor of the checkpoint."""
    picker = TensorPicker(canonical_tensors(checkpoint.tensors))
    text = text_tensors(params.text, picker, OUTTYPES[outtype], without)
    vision = vision_tensors(params.vision, params.text.n_embd, picker, OUTTYPES[_vision_outtype(outtype)].matrix)
    picker.refuse_leftovers()
    return text, vision
