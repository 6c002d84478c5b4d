"""What lazy and dropped layers cost in accuracy, on the mini-LLaVA's held-out scenes, beside other ways to save KV bytes.

The layers are chosen on training scenes by each metric at each budget, then every plan answers the same questions: greedy,
through our own runtime. One run gives one table, and JSON with `--json`; `--resume` goes on with one that was interrupted, or makes
corrections again.

    python bench/bench_quality.py --scenes 1000 --modes visual,global --budgets 0.2,0.3 --mixed-budgets 0.35 --json quality.json

KV bytes saved are counted in the blocks that each question fills when asked alone. The mean loss is over all six tasks, in
points; a caption counts when it is right to the letter. Perplexity, KL divergence and top-1 agreement are over every token of
the right answers, the last two against the untouched model.

Mixed plans may also drop layers' attention, so that `output` and `loss` choose among full, lazy and dropped for each layer.

Controls: `random` draws as many lazy layers; `dropped` only drops layers, those whose loss alone changes the logits least;
`pruned` keeps the visual tokens of highest attention after two layers (FastV); `scaled` resamples the grid of visual tokens
to a smaller one; `quantised` stores K and V in eight and in four bits; `corrections` corrects the choice of the last metric in
each way and in all, `corrected` in all only (as it is for mixed plans, and for the paper's `js` where it isn't the last).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ggml_qcache import Llama
from ggml_qcache_convert import convert
from ggml_qcache_convert.calibration import N_SEQ_MAX
from machine import facts, write_result
from quality_plans import CORRECTIONS, make_plans
from quality_runs import Answers, Plan, Test, make_prompts, run_plan
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from eval import score, test_set  # isort: skip  # quality_runs put its folder on the path
from scenes import CLOSED_TASKS, TASKS  # isort: skip

MODEL = Path(__file__).resolve().parents[1] / "examples" / "mini-llava" / "model"
CONTROLS = ("corrections", "corrected", "random", "dropped", "pruned", "scaled", "quantised")


def row(plan: Plan, answers: Answers, untouched: Answers, tests: Sequence[Test]) -> dict[str, Any]:
    """One row of the JSON; bytes saved are against full layers in f16."""
    scored, full = score(list(tests), answers.texts), score(list(tests), untouched.texts)
    losses = {task: 100 * (full["tasks"][task]["accuracy"] - scored["tasks"][task]["accuracy"]) for task in full["tasks"]}
    captions = np.array([test[1] == "caption" for test in tests])
    n = answers.n_tokens.sum()
    return {
        **plan.facts(),
        "refit_step": plan.refit_step,
        "kv_saved": 1 - answers.kv_bytes / answers.full_bytes,
        "mean_loss_points": float(np.mean(list(losses.values()))),
        "closed_mean": scored["closed_mean"],
        "tasks": scored["tasks"],
        "caption": scored["caption"],
        "caption_perplexity": float(np.exp(answers.nll[captions].sum() / answers.n_tokens[captions].sum())),
        "kl": float(answers.kl.sum() / n),
        "top1_agreement": float(answers.agreement.sum() / n),
        "seconds": round(answers.seconds, 1),
        "seconds_to_choose": round(plan.seconds, 1),
    }


def table(rows: Sequence[dict[str, Any]], n_scenes: int) -> Table:
    """The rows as a rich table."""
    shown = Table(title=f"{n_scenes} held-out scenes; accuracy in percent, loss in points of the mean over all tasks")
    headings = ("method", "mode", "lazy", "dropped", "KV saved", "loss", *CLOSED_TASKS, "caption", "recalled", "perplexity", "KL", "top-1")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("method", "mode") else "right")
    for r in rows:
        accuracies = [f"{100 * r['tasks'][task]['accuracy']:.1f}" for task in TASKS if task in r["tasks"]]
        shown.add_row(
            r["method"], r["mode"], str(len(r["lazy_layers"])), str(len(r["dropped_layers"])), f"{r['kv_saved']:.1%}",
            f"{r['mean_loss_points']:.1f}", *accuracies,
            f"{100 * r['caption']['recalled']:.1f}", f"{r['caption_perplexity']:.3f}", f"{r['kl']:.4f}", f"{r['top1_agreement']:.1%}",
        )  # fmt: skip
    return shown


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    p.add_argument("--outtype", default="f16", help="weight type to convert to")
    p.add_argument("--scenes", type=int, default=1000, help="number of held-out scenes; each has a question of every task")
    p.add_argument("--modes", default="visual,global", help="lazy modes")
    p.add_argument("--metrics", default="js,loss,output", help="what chooses the lazy layers; the last one's choice is corrected too")
    p.add_argument("--budgets", default="0.2,0.3", help="shares of the KV bytes to save")
    p.add_argument("--mixed-budgets", default="", help="shares to save where layers may also lose their attention")
    p.add_argument("--controls", default=",".join(CONTROLS), help="what else to compare (default: all)")
    p.add_argument("--calibration-samples", type=int, default=32, help="training scenes to choose on")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="threads, a context each")
    p.add_argument("--json", type=Path, help="write the rows here too, after each of them")
    p.add_argument("--resume", action="store_true", help="take rows from --json's file where it has them, and the layers that were chosen")
    p.add_argument("--again", default="", help="with --resume, corrections to make again: align_heads, vis_bias, refit, all")
    args = p.parse_args(argv)
    for name in ("modes", "metrics", "budgets", "mixed_budgets", "controls", "again"):
        setattr(args, name, [part for part in getattr(args, name).split(",") if part])
    args.budgets, args.mixed_budgets = ([float(budget) for budget in budgets] for budgets in (args.budgets, args.mixed_budgets))
    if unknown := sorted(set(args.controls) - set(CONTROLS)):
        p.error(f"--controls {','.join(unknown)} isn't among {','.join(CONTROLS)}")
    if unknown := sorted(set(args.again) - {*CORRECTIONS, "all"}):
        p.error(f"--again {','.join(unknown)} isn't among {','.join(CORRECTIONS)},all")
    if args.resume and not (args.json and args.json.is_file()):
        p.error(f"--resume goes on with the file of --json, got {args.json}")
    if args.scenes < 1 or args.calibration_samples < 1 or args.threads < 1:
        p.error(f"--scenes {args.scenes}, --calibration-samples {args.calibration_samples}, --threads {args.threads} must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse_args(argv)
    tests = test_set(args.scenes)
    weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(args.model.glob("*.safetensors")))).hexdigest()
    result = {**facts("quality", argv), "scenes": args.scenes, "weights_sha256": weights, "rows": []}
    earlier: list[dict[str, Any]] = []
    if args.resume:
        begun = json.loads(args.json.read_text())
        if begun["scenes"] != args.scenes:
            raise SystemExit(f"{args.json} is of {begun['scenes']} scenes, not {args.scenes}")
        if begun["weights_sha256"] != weights:
            raise SystemExit(f"{args.json} is of other weights than those in {args.model}: sha256 {begun['weights_sha256']}, not {weights}")
        earlier = [r for r in begun["rows"] if not r["method"].endswith(tuple(f" + {name}" for name in args.again))]
        result["begun_at_commit"] = begun["commit"]
    with tempfile.TemporaryDirectory() as folder:
        model, mmproj = Path(folder) / "model.gguf", Path(folder) / "mmproj.gguf"
        convert(args.model, model, mmproj, outtype=args.outtype)
        with contextlib.closing(
            Llama(str(model), mmproj_path=str(mmproj), n_ctx=1024, n_seq_max=N_SEQ_MAX, lazy_layers="none", verbose=False)
        ) as llm:
            prompts = list(tqdm(make_prompts(llm, tests), desc="pictures", total=args.scenes, unit="scene"))
            untouched = run_plan(llm, Plan("none"), tests, prompts, None, args.threads)

            def add(made: dict[str, Any]) -> None:
                result["rows"].append(made)
                if args.json:
                    write_result(result, args.json)

            add(row(Plan("none"), untouched, untouched, tests))
            plans = make_plans(llm, args.modes, args.metrics, args.budgets, args.mixed_budgets, args.controls, args.calibration_samples, earlier)
            for plan in plans:
                known = next((r for r in earlier if plan.facts().items() <= r.items()), None)
                add(known or row(plan, run_plan(llm, plan, tests, prompts, untouched, args.threads), untouched, tests))
    Console(width=180).print(table(result["rows"], args.scenes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
