"""What ``--dry-run`` prints: the files, tensors and Lazy Blocks a conversion would write, known without reading weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .conversion import ConversionPlan, check_targets
from .gguf_copy import architecture, n_layers, open_text_gguf, plan_copy
from .imatrix import checked_imatrix, importance_of
from .lazy_keys import left_out
from .lazy_layers import dropped_of, lazy_of, leaders_of
from .outtypes import OUTTYPES
from .tensor_entry import TensorEntry
from .writer import stored_bytes


@dataclass(frozen=True)
class TensorLine:
    """A tensor: name in the GGUF, name where it comes from, stored type, shape (outermost dimension first)."""

    name: str
    source: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return stored_bytes(self.shape, self.qtype)


@dataclass(frozen=True)
class DryRun:
    """Files with their architectures and tensors, leader of each layer, remarks."""

    files: tuple[tuple[Path, str, list[TensorLine]], ...]
    leaders: Sequence[int]
    mode: str
    warnings: Sequence[str] = ()


def of_checkpoint(plan: ConversionPlan, mode: str) -> DryRun:
    """Shows the conversion of a checkpoint.

    Args:
        plan: What it would do.
        mode: Of its lazy layers.
    """
    files = []
    for file in plan.files:
        lines = []
        for tensor in file.tensors:
            source = tensor.source.name + " + LoRA" * len(tensor.source.deltas) if isinstance(tensor.source, TensorEntry) else "(computed)"
            lines.append(TensorLine(tensor.name, source, tensor.qtype, tensor.shape))
        files.append((file.path, file.arch, lines))
    return DryRun(tuple(files), plan.leaders, mode, plan.warnings)


def of_gguf(
    model: Path, outfile: Path, lazy_layers: str, mode: str, keep_qk: bool, outtype: str | None, imatrix: Path | None
) -> DryRun:
    """Shows the copy of a text GGUF; the arguments are those of ``make_lazy``.

    Raises:
        ConversionError: A damaged file, one that lacks q and k of a layer that is to keep them, or an importance matrix of another
            model.
        ValueError: An argument is invalid.
        OSError: The file can't be read.
    """
    check_targets([outfile])
    reader = open_text_gguf(model)
    leaders = leaders_of(lazy_layers, n_layers(reader))
    tensors = plan_copy(reader, left_out(leaders, mode, keep_qk), None if outtype is None else OUTTYPES[outtype])
    if imatrix is not None:
        importance_of(checked_imatrix(imatrix, outtype), ((tensor.name, shape, qtype) for tensor, shape, qtype in tensors))
    lines = [TensorLine(tensor.name, tensor.name, GGMLQuantizationType(qtype), shape) for tensor, shape, qtype in tensors]
    return DryRun(((outfile, architecture(reader) or "", lines),), leaders, mode)


def draw(shown: DryRun, console: Console) -> None:
    """Prints the plan: a table a file, then totals and Lazy Blocks."""
    totals = []
    for path, arch, lines in shown.files:
        table = Table(title=Text(f"{path} ({arch})"), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("tensor", "from", "type", "shape", "bytes"):
            table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
        for line in lines:
            cells = line.name, line.source, line.qtype.name.lower(), str(list(line.shape)), f"{line.nbytes:,}"
            table.add_row(*map(Text, cells))  # no markup: names may have brackets
        console.print(table)
        console.print()
        n_bytes = sum(line.nbytes for line in lines)
        totals.append(f"{path}: {len(lines)} tensors, {n_bytes:,} bytes ({n_bytes / 2**20:,.1f} MiB), besides keys and vocabulary")
    blocks: dict[int, list[int]] = {}
    for layer in lazy_of(shown.leaders):
        blocks.setdefault(shown.leaders[layer], []).append(layer)
    for leader, lazy in blocks.items():
        span = f"{lazy[0]}-{lazy[-1]}" if len(lazy) > 1 else str(lazy[0])
        totals.append(f"Lazy Block of leader {leader}: {span}")
    n_lazy = sum(map(len, blocks.values()))
    totals.append(f"{n_lazy} of {len(shown.leaders)} layers lazy" + (f", {shown.mode} mode" if n_lazy else ""))
    if dropped := dropped_of(shown.leaders):
        totals.append(f"without attention: {', '.join(map(str, dropped))}")
    for line in totals:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
