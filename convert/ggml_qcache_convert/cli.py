"""The command ``convert_to_gguf``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .calibration import METRICS, Calibration, CalibrationSettings, check_report, write_report
from .conversion import ConversionResult, check_targets, convert, plan_conversion
from .dry_run import draw, of_checkpoint, of_gguf
from .hub import fetch, is_hub_id
from .lazy_keys import MODES
from .lazy_layers import dropped_of, lazy_of
from .make_lazy import convert_auto, make_lazy
from .outtypes import OUTTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 converted, 1 refused or failed, 130 interrupted. In the last two nothing is left behind.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.dry_run:
            return _dry_run(args, parser.prog)
        result, chosen = _run(args)
        if chosen is not None and args.report is not None:
            write_report(chosen, result.outfile.stem, args.report)
    except (ValueError, OSError, RuntimeError) as error:  # the last is what the runtime raises
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, nothing written", file=sys.stderr)
        return 130
    for warning in result.warnings:
        print(f"{parser.prog}: warning: {warning}", file=sys.stderr)
    if not args.quiet:
        print(_summary(result, args.lazy_mode))
        if chosen is not None:
            print(_calibration_summary(chosen))
    return 0


def _run(args: argparse.Namespace) -> tuple[ConversionResult, Calibration | None]:
    """Does what the arguments ask for.

    Raises:
        ValueError: They don't go together.
    """
    progress = not (args.no_progress or args.quiet)
    settings = _calibration_settings(args)
    if args.report is not None:
        if settings is None:
            raise ValueError("--report shows what calibration found: it goes with --lazy-layers auto or a correction")
        check_report(args.report)
    model, outfile, mmproj, name = _paths(args, progress)
    if mmproj is None:
        return make_lazy(
            model, outfile, args.lazy_layers, args.lazy_mode, args.keep_qk, settings, args.mmproj_in, progress, args.outtype, args.imatrix
        )
    outtype = args.outtype or "f16"
    parts = _parts(args, progress)
    if settings is not None:
        return convert_auto(model, outfile, mmproj, settings, outtype, args.keep_qk, progress, name, *parts)
    return convert(model, outfile, mmproj, outtype, args.lazy_layers, args.lazy_mode, args.keep_qk, progress, name, *parts), None


def _paths(args: argparse.Namespace, progress: bool) -> tuple[Path, Path, Path | None, str]:
    """Gives the input, fetched from the Hub if need be, the outputs and the model's name; of a GGUF there is no mmproj.

    Raises:
        ValueError: The arguments don't go together.
    """
    model, on_hub = Path(args.model), is_hub_id(args.model)
    if args.revision is not None and not on_hub:
        raise ValueError(f"--revision goes with the name of a model on the Hub, and {args.model} is a path")
    if model.is_file():
        if args.mmproj is not None:
            raise ValueError("--mmproj goes with a Hugging Face directory: a text GGUF has no vision tower in it")
        for option, given in (("--lora", args.lora), ("--vision-tower", args.vision_tower)):
            if given:
                raise ValueError(f"{option} goes with a checkpoint, not with a GGUF")
        return model, args.outfile or Path(f"{model.stem}-lazy.gguf"), None, model.stem
    if args.mmproj_in is not None:
        raise ValueError("--mmproj-in goes with a GGUF: a directory has its vision tower in it")
    outtype = args.outtype or "f16"
    # an empty name, as of "/", leaves "model"
    name = model.resolve().name or "model"
    outfile = args.outfile or Path(f"{name}-{outtype}.gguf")
    mmproj = args.mmproj or Path(f"mmproj-{name}-{'f32' if outtype == 'f32' else 'f16'}.gguf")
    if on_hub:
        # before what may be a long download
        check_targets([outfile, mmproj])
        if missing := [path for path in (*args.lora, args.imatrix) if path is not None and not path.exists()]:
            raise ValueError(f"{missing[0]}: no such file or directory")
        model = fetch(args.model, args.revision, progress)
    return model, outfile, mmproj, name


def _parts(args: argparse.Namespace, progress: bool) -> tuple[list[Path], Path | None, Path | None]:
    """Gives what a checkpoint is completed with: adapters, a vision tower, fetched from the Hub if need be, an importance matrix."""
    tower = args.vision_tower
    if tower is not None:
        tower = fetch(tower, None, progress) if is_hub_id(tower) else Path(tower)
    return args.lora, tower, args.imatrix


def _dry_run(args: argparse.Namespace, prog: str) -> int:
    """Prints what would be written.

    Raises:
        ValueError: The arguments don't go together, or the input would be refused.
    """
    if _calibration_settings(args) is not None:
        raise ValueError("--dry-run goes with named layers: to choose or correct them the model has to run")
    progress = not (args.no_progress or args.quiet)
    model, outfile, mmproj, name = _paths(args, progress)
    if mmproj is None:
        shown = of_gguf(model, outfile, args.lazy_layers, args.lazy_mode, args.keep_qk, args.outtype, args.imatrix)
    else:
        plan = plan_conversion(
            model, outfile, mmproj, args.outtype or "f16", args.lazy_layers, args.lazy_mode, args.keep_qk, name, *_parts(args, progress)
        )
        shown = of_checkpoint(plan, args.lazy_mode)
    for warning in shown.warnings:
        print(f"{prog}: warning: {warning}", file=sys.stderr)
    if not args.quiet:
        # into a file or a pipe a line a tensor, however long
        draw(shown, Console() if sys.stdout.isatty() else Console(width=200))
    return 0


def _calibration_settings(args: argparse.Namespace) -> CalibrationSettings | None:
    """How layers are chosen and corrected; None where they are given and stay as they are."""
    choosing = {
        "--lazy-budget": args.lazy_budget,
        "--lazy-threshold": args.lazy_threshold,
        "--lazy-metric": args.lazy_metric,
        "--drop-attention": args.drop_attention or None,
    }
    running = {
        "--calibration-images": args.calibration_images,
        "--calibration-prompts": args.calibration_prompts,
        "--calibration-samples": args.calibration_samples,
        "--seed": args.seed,
    }
    automatic = args.lazy_layers.strip().lower() == "auto"
    corrects = args.align_heads or args.vis_bias or args.refit
    if not automatic:
        for option, given in (choosing if corrects else choosing | running).items():
            if given is not None:
                raise ValueError(f"{option} goes with --lazy-layers auto, got --lazy-layers {args.lazy_layers}")
        if not corrects:
            return None
    if args.calibration_images is None:
        why = "--lazy-layers auto shows" if automatic else "--align-heads, --vis-bias and --refit show"
        raise ValueError(f"{why} images to the model: name a folder of them with --calibration-images DIR")
    given = {
        "metric": args.lazy_metric,
        "layers": None if automatic else args.lazy_layers,
        "n_samples": args.calibration_samples,
        "seed": args.seed,
    }
    if args.calibration_prompts is not None:
        lines = args.calibration_prompts.read_text(encoding="utf-8").splitlines()
        given |= {"prompts": [line.strip() for line in lines if line.strip()]}
    settings = {name: value for name, value in given.items() if value is not None}
    if args.lazy_budget is not None or args.lazy_threshold is not None:
        settings |= {"budget": args.lazy_budget, "threshold": args.lazy_threshold}
    return CalibrationSettings(
        args.calibration_images, mode=args.lazy_mode, drop_attention=args.drop_attention, align_heads=args.align_heads,
        vis_bias=args.vis_bias, refit=args.refit, **settings,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_to_gguf",
        description="Convert a Hugging Face LLaVA checkpoint to a text GGUF and an mmproj GGUF, or a text GGUF to a lazy one.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory with config.json, weights (safetensors or .bin) and tokenizer; or the name of a model on the Hugging Face Hub, "
        "e.g. llava-hf/llava-1.5-7b-hf; or a text GGUF, copied with other lazy layers",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a model on the Hub (default: its main branch)")
    parser.add_argument("--outfile", type=Path, metavar="FILE", help="text GGUF (default: NAME-OUTTYPE.gguf; of a GGUF: NAME-lazy.gguf)")
    parser.add_argument("--mmproj", type=Path, metavar="FILE", help="vision GGUF (default: mmproj-NAME-f16.gguf, f32 with --outtype f32)")
    parser.add_argument(
        "--lora", type=Path, metavar="DIR", action="append", default=[], help="PEFT LoRA adapter to merge into the weights; repeatable"
    )
    parser.add_argument(
        "--vision-tower",
        metavar="DIR",
        help="CLIP vision tower, a directory or a name on the Hub: of a checkpoint in the original LLaVA's layout, which only names it",
    )
    parser.add_argument(
        "--outtype", choices=list(OUTTYPES), help="type of the weight matrices (default: f16; of a GGUF: as they are)"
    )
    parser.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="importance matrix in llama.cpp's GGUF form, for a quantised --outtype"
    )
    parser.add_argument(
        "--lazy-layers",
        default="none",
        metavar="SPEC",
        help="layers that share their leader's attention: none, auto, or e.g. 9-15,18,20-31; after drop: those that lose theirs, "
        "e.g. 9-15,drop:20-22 (default: none)",
    )
    parser.add_argument("--lazy-mode", choices=MODES, default="visual", help="which tokens share (default: visual)")
    parser.add_argument(
        "--keep-qk",
        action="store_true",
        help="keep the q and k weights of lazy layers in global mode, and the attention weights of dropped layers: the file then "
        "also runs as a plain model",
    )
    auto = parser.add_argument_group("--lazy-layers auto", "layers chosen by running the model on images")
    auto.add_argument("--lazy-budget", type=float, metavar="F", help="share of KV bytes to save (default: 0.35)")
    auto.add_argument("--lazy-threshold", type=float, metavar="EPS", help="instead: lazy below this JS divergence, in nats")
    auto.add_argument(
        "--lazy-metric",
        choices=METRICS,
        help="js: the paper's, attention of neighbouring layers (default); output: error of attention outputs; "
        "loss: change of the final logits, plan by plan: by far the slowest",
    )
    auto.add_argument(
        "--drop-attention",
        action="store_true",
        help="let a layer lose its attention, K and V where that costs less for the bytes it saves than sharing does; with "
        "--lazy-metric output or loss",
    )
    both = parser.add_argument_group("calibration", "for --lazy-layers auto and for corrections of lazy layers")
    both.add_argument("--calibration-images", type=Path, metavar="DIR", help="images like those the model will see; needed")
    both.add_argument("--report", type=Path, metavar="FILE", help="show what was found as .html or .png")
    both.add_argument("--align-heads", action="store_true", help="permute a lazy layer's heads to those of its leader")
    both.add_argument("--vis-bias", action="store_true", help="visual mode: balance text rows' attention to images by a bias a head")
    both.add_argument("--refit", action="store_true", help="refit W_o of lazy layers by ridge regression, and W_v where it helps; on 4 samples or more, better on a hundred")
    both.add_argument("--calibration-samples", type=int, metavar="N", help="pairs of image and prompt (default: 16)")
    both.add_argument("--calibration-prompts", type=Path, metavar="FILE", help="prompts, one a line (default: general ones)")
    both.add_argument("--seed", type=int, help="seed of the choice of pairs and rows (default: 0)")
    both.add_argument("--mmproj-in", type=Path, metavar="FILE", help="vision GGUF, where MODEL is a GGUF")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be written, tensor by tensor; read no weights, write nothing (a model on the Hub is fetched first)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser


def _summary(result: ConversionResult, mode: str) -> str:
    lines = [f"{result.outfile}: {result.arch}, {result.n_layer} layers, {result.outfile_bytes / 2**20:.1f} MiB"]
    if result.mmproj is not None:
        lines.append(f"{result.mmproj}: vision tower and projector, {result.mmproj_bytes / 2**20:.1f} MiB")
    lazy, dropped = lazy_of(result.leaders), dropped_of(result.leaders)
    if lazy:
        lines.append(
            f"{len(lazy)} lazy layers, {mode} mode: "
            + ", ".join(f"{layer} ({result.leaders[layer]})" for layer in lazy)
            + " (leader)"
        )
    if dropped:
        lines.append(f"{len(dropped)} layers without attention: {', '.join(map(str, dropped))}")
    return "\n".join(lines)


def _calibration_summary(chosen: Calibration) -> str:
    measured, settings = chosen.measured, chosen.settings
    corrected = f", {chosen.uncorrected_kl:.4f} uncorrected ({', '.join(settings.corrections)})" if settings.corrects else ""
    how = f"chosen by {settings.metric}" if settings.layers is None else "measured"
    return (
        f"{how} on {len(measured.samples)} samples ({measured.n_tokens} tokens, "
        f"{measured.visual_share:.0%} visual): {chosen.kv_saved:.1%} of the KV bytes saved, "
        f"KL divergence of the logits {chosen.logits_kl:.4f}{corrected}"
    )
