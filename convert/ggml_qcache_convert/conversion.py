"""Converts a Hugging Face LLaVA directory: checks everything that can be checked first, then streams both files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter
from tqdm import tqdm

from .checkpoint import Checkpoint
from .errors import ConversionError
from .hparams import LlavaParams, read_hparams
from .imatrix import add_imatrix_keys, checked_imatrix, with_importance
from .lazy_keys import MODES, add_lazy_keys, left_out
from .lazy_layers import leaders_of
from .lora import merge_adapters
from .mmproj import add_vision_keys, read_image_params, vision_tensors
from .original_llava import find_source
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
    name: str | None = None,
    adapters: Sequence[Path] = (),
    vision_tower: Path | None = None,
    imatrix: Path | None = None,
) -> ConversionResult:
    """Converts a Hugging Face ``LlavaForConditionalGeneration`` directory, or an original LLaVA one, to a text GGUF and an mmproj GGUF.

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
        name: ``general.name``; the directory's by default.
        adapters: Directories of PEFT LoRA adapters, merged in this order.
        vision_tower: Directory of the CLIP vision tower, for a checkpoint in the original LLaVA's layout.
        imatrix: Importance matrix in llama.cpp's GGUF form, for quantised types.

    Returns:
        What was written.

    Raises:
        ConversionError: The input is unsupported, damaged or inconsistent.
        ValueError: An argument is invalid.
        OSError: A file can't be written.
    """
    targets = [outfile] if mmproj is None else [outfile, mmproj]
    plan = plan_conversion(directory, outfile, mmproj, outtype, lazy_layers, lazy_mode, keep_qk, name, adapters, vision_tower, imatrix)
    total = sum(tensor.source.nbytes for file in plan.files for tensor in file.tensors)
    with (
        AtomicFiles(targets) as files,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="converting", disable=not progress) as bar,
    ):
        for file in plan.files:
            write_gguf(files.path(file.path), file.arch, file.add_keys, file.tensors, plan.checkpoint, bar.update)
        files.commit()
    return ConversionResult(
        outfile,
        mmproj,
        plan.files[0].arch,
        len(plan.leaders),
        plan.leaders,
        outfile.stat().st_size,
        0 if mmproj is None else mmproj.stat().st_size,
        plan.warnings,
    )


@dataclass(frozen=True)
class PlannedFile:
    """A GGUF to write: its keys, and its tensors in order."""

    path: Path
    arch: str
    add_keys: Callable[[GGUFWriter], None]
    tensors: list[OutputTensor]


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that is known before weights are read.

    Attributes:
        checkpoint: Where they will be read from.
        files: The text GGUF, and the mmproj if one is asked for.
        leaders: Leader of each layer.
        warnings: Remarks about what is converted but behaves differently.
    """

    checkpoint: Checkpoint
    files: tuple[PlannedFile, ...]
    leaders: tuple[int, ...]
    warnings: tuple[str, ...]


def plan_conversion(
    directory: Path,
    outfile: Path,
    mmproj: Path | None,
    outtype: str,
    lazy_layers: str | Sequence[int],
    lazy_mode: str,
    keep_qk: bool,
    name: str | None,
    adapters: Sequence[Path],
    vision_tower: Path | None,
    imatrix: Path | None,
) -> ConversionPlan:
    """Checks everything that can be checked without weights, and plans both files. The arguments are those of ``convert``.

    Raises:
        ConversionError: The input is unsupported, damaged or inconsistent.
        ValueError: An argument is invalid.
    """
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype {outtype!r} isn't one of {', '.join(OUTTYPES)}")
    if lazy_mode not in MODES:
        raise ValueError(f"lazy_mode {lazy_mode!r} isn't one of {', '.join(MODES)}")
    if not directory.is_dir():
        raise ConversionError(f"{directory}: isn't a directory" if directory.exists() else f"{directory}: no such file or directory")
    targets = [outfile] if mmproj is None else [outfile, mmproj]
    check_targets(targets)

    source = find_source(directory, vision_tower, adapters)
    params = read_hparams(source.config_path, source.config)
    warnings = list(params.warnings)
    n_layer = params.text.n_layer
    checkpoint = Checkpoint(directory)
    tensors = merge_adapters({**source.tower, **canonical_tensors(checkpoint.tensors)}, adapters)
    inputs = {path.resolve() for entry in tensors.values() for path in entry.paths}
    if overwritten := [target for target in targets if target.resolve() in inputs]:
        raise ValueError(f"{overwritten[0]}: is part of the checkpoint itself")
    # before anything is sized by the configuration's numbers: the weights bear them out
    picker = TensorPicker(tensors)
    norms = (f"text.layers.{layer}.input_layernorm.weight" for layer in range(n_layer))
    if missing := next((name for name in norms if name not in tensors), None):
        picker.take(missing, (params.text.n_embd,))  # raises
    leaders = leaders_of(lazy_layers, n_layer)
    text_plan, vision_plan = _plans(picker, params, outtype, left_out(leaders, lazy_mode, keep_qk))
    importance = None if imatrix is None else checked_imatrix(imatrix, outtype)
    if importance is not None:
        text_plan = with_importance(text_plan, importance)
    vocab = read_vocab(directory, params.text.n_vocab, params.token_ids, warnings)
    images = read_image_params(source.images_path, params.vision, warnings)
    title = name or directory.resolve().name

    def text_keys(writer: GGUFWriter) -> None:
        add_text_keys(writer, params.text, title, OUTTYPES[outtype].file_type)
        add_vocab_keys(writer, vocab)
        add_lazy_keys(writer, leaders, lazy_mode)
        if importance is not None:
            add_imatrix_keys(writer, importance)

    def vision_keys(writer: GGUFWriter) -> None:
        add_vision_keys(writer, params.vision, images, params.text.n_embd, title, OUTTYPES[_vision_outtype(outtype)].file_type)

    files = [PlannedFile(outfile, params.text.arch, text_keys, text_plan)]
    if mmproj is not None:
        files.append(PlannedFile(mmproj, "clip", vision_keys, vision_plan))
    return ConversionPlan(checkpoint, tuple(files), tuple(leaders), tuple(warnings))


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
    picker: TensorPicker, params: LlavaParams, outtype: str, without: Mapping[int, Sequence[str]]
) -> tuple[list[OutputTensor], list[OutputTensor]]:
    """Plans both files; together they must account for every tensor of the checkpoint."""
    text = text_tensors(params.text, picker, OUTTYPES[outtype], without)
    vision = vision_tensors(params.vision, params.text.n_embd, picker, OUTTYPES[_vision_outtype(outtype)].matrix)
    picker.refuse_leftovers()
    return text, vision
