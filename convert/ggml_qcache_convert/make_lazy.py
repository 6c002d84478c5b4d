"""Makes a text GGUF lazy: layers given, or chosen by calibration on the file itself."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tqdm import tqdm

from .calibration import LOOK_BLOCK_TOKENS, N_SEQ_MAX, Calibration, CalibrationSettings, calibrate
from .conversion import ConversionResult, check_targets, convert
from .errors import ConversionError
from .gguf_copy import architecture, copy_with_keys, n_layers, open_text_gguf
from .imatrix import Imatrix, checked_imatrix
from .lazy_keys import MODES, add_calibration_keys, add_lazy_keys, left_out
from .lazy_layers import leaders_of
from .outtypes import OUTTYPES, OutType
from .writer import AtomicFiles


def convert_auto(
    directory: Path,
    outfile: Path,
    mmproj: Path,
    settings: CalibrationSettings,
    outtype: str = "f16",
    keep_qk: bool = False,
    progress: bool = False,
    name: str | None = None,
    adapters: Sequence[Path] = (),
    vision_tower: Path | None = None,
    imatrix: Path | None = None,
) -> tuple[ConversionResult, Calibration]:
    """Converts a Hugging Face LLaVA directory with lazy layers chosen by calibration on the converted model.

    Needs room for the text model twice. Both files appear together when both are complete, or neither does.

    Args:
        directory: The checkpoint directory.
        outfile: Text GGUF to write.
        mmproj: Vision GGUF to write.
        settings: How layers are chosen.
        outtype: As for ``convert``.
        keep_qk: As for ``convert``.
        progress: Show progress bars on stderr.
        name: As for ``convert``.
        adapters: As for ``convert``.
        vision_tower: As for ``convert``.
        imatrix: As for ``convert``.

    Returns:
        What was written, and what the choice rests on.

    Raises:
        ConversionError: The input is unsupported, there are no images, or the budget can't be met.
        ValueError: An argument is invalid.
        QCacheError: The runtime can't run the converted model.
        OSError: A file can't be written.
    """
    settings.check()
    check_targets([outfile, mmproj])
    with tempfile.TemporaryDirectory(dir=outfile.parent, prefix=f".{outfile.name}.") as folder:
        plain = Path(folder) / outfile.name
        with AtomicFiles([mmproj, outfile]) as files:
            parts = {"name": name, "adapters": adapters, "vision_tower": vision_tower, "imatrix": imatrix}
            result = convert(directory, plain, files.path(mmproj), outtype, progress=progress, **parts)
            chosen = _calibrated(plain, files.path(mmproj), settings, progress)
            made = _lazy_copy(plain, files.path(outfile), chosen.leaders, settings.mode, keep_qk, chosen, progress)
            files.commit()
    leaders, size = made
    written = ConversionResult(
        outfile, mmproj, result.arch, result.n_layer, leaders, size, mmproj.stat().st_size, (*result.warnings, *chosen.warnings)
    )
    return written, chosen


def make_lazy(
    model: Path,
    outfile: Path,
    lazy_layers: str | Sequence[int] = (),
    lazy_mode: str = "visual",
    keep_qk: bool = False,
    settings: CalibrationSettings | None = None,
    mmproj_in: Path | None = None,
    progress: bool = False,
    outtype: str | None = None,
    imatrix: Path | None = None,
) -> tuple[ConversionResult, Calibration | None]:
    """Copies a text GGUF with lazy layers given or chosen; its weights stay as they are, quantised ones too.

    Args:
        model: Text GGUF.
        outfile: Text GGUF to write.
        lazy_layers: Layer numbers or a specification; with ``settings`` they are chosen instead.
        lazy_mode: ``visual`` or ``global``; with ``settings`` it is theirs.
        keep_qk: As for ``convert``.
        settings: How layers are chosen, or None.
        mmproj_in: Vision GGUF of the model; needed with ``settings``.
        progress: Show progress bars on stderr.
        outtype: Store the weight matrices so, a key of ``OUTTYPES``; None: as they are. With ``settings`` the file is written
            twice.
        imatrix: Importance matrix for ``outtype``, in llama.cpp's GGUF form.

    Returns:
        What was written (no mmproj), and what the choice rests on.

    Raises:
        ConversionError: A damaged file, no images, or a budget that can't be met.
        ValueError: An argument is invalid.
        QCacheError: The runtime can't run the model.
        OSError: A file can't be read or written.
    """
    mode = settings.mode if settings else lazy_mode
    if mode not in MODES:
        raise ValueError(f"lazy_mode {mode!r} isn't one of {', '.join(MODES)}")
    if outtype is not None and outtype not in OUTTYPES:
        raise ValueError(f"outtype {outtype!r} isn't one of {', '.join(OUTTYPES)}")
    check_targets([outfile])
    reader = open_text_gguf(model)
    types = None if outtype is None else OUTTYPES[outtype]
    importance = None if imatrix is None else checked_imatrix(imatrix, outtype)
    chosen = None
    with AtomicFiles([outfile]) as files, contextlib.ExitStack() as stack:
        if settings is not None:
            settings.check()
            if mmproj_in is None:
                raise ValueError("calibration shows images to the model: name its mmproj with --mmproj-in")
            if types is not None:
                # it is calibrated as it will be
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir=outfile.parent, prefix=f".{outfile.name}."))
                plain = Path(folder) / outfile.name
                _lazy_copy(model, plain, range(n_layers(reader)), mode, keep_qk, None, progress, types, importance)
                model, types, importance = plain, None, None
            chosen = _calibrated(model, mmproj_in, settings, progress)
            leaders: Sequence[int] = chosen.leaders
        else:
            leaders = leaders_of(lazy_layers, n_layers(reader))
        made = _lazy_copy(model, files.path(outfile), leaders, mode, keep_qk, chosen, progress, types, importance)
        files.commit()
    warnings = () if chosen is None else chosen.warnings
    return ConversionResult(outfile, None, architecture(reader), n_layers(reader), *made, 0, warnings), chosen


def _calibrated(model: Path, mmproj: Path, settings: CalibrationSettings, progress: bool) -> Calibration:
    """Loads a model with every layer full and chooses its lazy layers."""
    try:
        from ggml_qcache import Llama
    except ImportError as error:
        raise ConversionError(f"calibration runs the model, and the runtime can't be imported: {error}") from error

    params: dict[str, Any] = {"lazy_layers": "none", "n_ctx": 0, "n_seq_max": N_SEQ_MAX, "block_tokens": LOOK_BLOCK_TOKENS}
    with contextlib.closing(Llama(str(model), mmproj_path=str(mmproj), **params)) as llm:
        return calibrate(llm, settings, progress=progress)


def _lazy_copy(
    source: Path,
    target: Path,
    leaders: Sequence[int],
    mode: str,
    keep_qk: bool,
    chosen: Calibration | None,
    progress: bool,
    outtype: OutType | None = None,
    imatrix: Imatrix | None = None,
) -> tuple[tuple[int, ...], int]:
    """Writes the copy; returns its leaders and its size in bytes."""
    reader = open_text_gguf(source)

    def keys(writer: GGUFWriter) -> None:
        add_lazy_keys(writer, leaders, mode)
        if chosen is not None:
            add_calibration_keys(writer, chosen)

    total = sum(tensor.data.nbytes for tensor in reader.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="writing", disable=not progress) as bar:
        corrections = None if chosen is None else chosen.corrections
        copy_with_keys(reader, target, keys, left_out(leaders, mode, keep_qk), bar.update, corrections, outtype, imatrix)
    return tuple(leaders), target.stat().st_size
