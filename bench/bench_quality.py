"""What lazy layers cost in accuracy, on the mini-LLaVA's held-out scenes.

The layers are chosen on training scenes by each metric at each budget, then every plan answers the same questions: greedy,
through our own runtime, all questions of a scene on one prefilled image. One run gives one table, and JSON with `--json`.

    python bench/bench_quality.py --scenes 1000 --modes visual,global --budgets 0.1,0.2,0.3 --json quality.json

KV bytes saved are counted in the blocks that each question fills when asked alone. The loss is that of the mean over
the closed tasks, in points. KL divergence and top-1 agreement are those of the first answer token against the untouched
model's. `random` draws as many lazy layers as the metrics take; `q8_0` keeps every layer full and stores K and V in eight bits.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ggml_qcache import Llama
from ggml_qcache.native import Context
from ggml_qcache_convert import convert
from ggml_qcache_convert.calibration import CalibrationSettings, calibrate, measure
from ggml_qcache_convert.calibration.attention import kl_divergence, log_softmax
from ggml_qcache_convert.lazy_layers import leaders_of
from machine import commit, machine, versions
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

MINI_LLAVA = Path(__file__).resolve().parents[1] / "examples" / "mini-llava"
sys.path.insert(0, str(MINI_LLAVA))

from eval import MAX_NEW_TOKENS, score, test_set, write_json  # noqa: E402
from scenes import CLOSED_TASKS, TASKS, ask, make_scene, render  # noqa: E402

CALIBRATION_SEED = 2_000_000  # training scenes far from any that a training run reaches
SEQUENCES = len(TASKS)

Test = tuple[int, str, str, str]  # seed, task, question, answer


@dataclass(frozen=True)
class Prompt:
    """All questions about one picture.

    Attributes:
        tokens: [n] i32, what comes up to the end of the image; -1 for a visual token.
        embeddings: [n, n_embd] f32, read where there is no token.
        questions: By question, the tokens that follow, i32.
    """

    tokens: npt.NDArray[np.int32]
    embeddings: npt.NDArray[np.float32]
    questions: list[npt.NDArray[np.int32]]


@dataclass(frozen=True)
class Plan:
    """One row of the table."""

    method: str
    mode: str = "off"
    leaders: list[int] | None = None
    kv_type: str = "f16"
    seconds: float = 0.0  # to choose the layers

    @property
    def lazy_layers(self) -> list[int]:
        """The lazy layers, ascending."""
        return [layer for layer, leader in enumerate(self.leaders or []) if leader != layer]


@dataclass
class Answers:
    """What a plan answered.

    Attributes:
        texts: By test.
        log_probs: [n_tests, n_vocab] f32 of the first answer token.
        kv_bytes, kv_blocks: Over all tests, each as if asked alone.
        full_block_bytes: Of a block with every layer full, in the plan's types of K and V.
    """

    texts: list[str]
    log_probs: npt.NDArray[np.float32]
    kv_bytes: int = 0
    kv_blocks: int = 0
    full_block_bytes: int = 0
    seconds: float = 0.0


def make_prompts(llm: Llama, tests: Sequence[Test]) -> Iterator[tuple[list[int], Prompt]]:
    """Reads each picture once.

    Yields:
        The indices of a scene's tests, and their prompt.

    Raises:
        RuntimeError: The questions' tokens differ from those of a chat: the template isn't the mini-LLaVA's.
    """
    by_scene: dict[int, list[int]] = {}
    for i, test in enumerate(tests):
        by_scene.setdefault(test[0], []).append(i)
    with tempfile.TemporaryDirectory() as folder:
        for seed, indices in by_scene.items():
            path = Path(folder) / "scene.png"
            render(make_scene(seed, "heldout")).save(path)
            questions = [tests[i][2] for i in indices]
            content = [{"type": "image_url", "image_url": {"url": str(path)}}, {"type": "text", "text": questions[0]}]
            llm.create_chat_completion([{"role": "user", "content": content}], temperature=0.0, max_tokens=1)
            tokens, embeddings = llm.evaluated_rows()
            end = int(np.flatnonzero(tokens < 0)[-1]) + 1
            after = [np.array(llm.tokenize(f"\n{q} ASSISTANT:".encode(), add_bos=False), dtype=np.int32) for q in questions]
            if not np.array_equal(after[0], tokens[end : end + len(after[0])]):
                raise RuntimeError(f"the chat template asks {questions[0]!r} with other tokens: {tokens[end:]} and {after[0]}")
            start = tokens[:end]
            yield indices, Prompt(np.where(start < 0, -1, start).astype(np.int32), embeddings[:end], after)


def answer(context: Context, prompt: Prompt, eos: int) -> tuple[list[list[int]], npt.NDArray[np.float32]]:
    """Answers all questions of a prompt, greedily, in one sequence each.

    Returns:
        Tokens by question, and the log-probabilities of the first, [n_questions, n_vocab].
    """
    n = len(prompt.questions)
    context.clear()
    context.decode(prompt.tokens, prompt.embeddings, modality=prompt.tokens < 0)
    for i in range(1, n):
        context.seq_cp(0, i)
    lengths = [len(q) for q in prompt.questions]
    ends = np.cumsum(lengths) - 1
    wanted = np.isin(np.arange(sum(lengths)), ends)
    context.decode(np.concatenate(prompt.questions), seq_id=np.repeat(np.arange(n), lengths), logits=wanted)
    rows = np.stack([context.logits(int(end)) for end in ends])
    first = log_softmax(rows)
    said: list[list[int]] = [[] for _ in range(n)]
    going = list(range(n))
    for _ in range(MAX_NEW_TOKENS):
        chosen = dict(zip(going, rows.argmax(-1).tolist()))
        going = [i for i in going if chosen[i] != eos]
        for i in going:
            said[i].append(chosen[i])
        if not going:
            break
        context.decode(np.array([chosen[i] for i in going]), seq_id=np.array(going), logits=True)
        rows = np.stack([context.logits(row) for row in range(len(going))])
    return said, first


def run_plan(llm: Llama, plan: Plan, tests: Sequence[Test], prompts: Sequence[tuple[list[int], Prompt]]) -> Answers:
    """Answers every test with the lazy layers of a plan."""
    model = llm.native_model
    result = Answers([""] * len(tests), np.zeros((len(tests), model.info.n_vocab), dtype=np.float32))
    started = time.monotonic()
    lazy: dict[str, Any] = {"lazy_mode": plan.mode} | ({"lazy_leader": plan.leaders} if plan.leaders else {})
    with Context(model, n_ctx=1024, n_seq_max=SEQUENCES, type_k=plan.kv_type, type_v=plan.kv_type, **lazy) as context:
        usage = context.kv_usage()
        result.full_block_bytes = usage["bytes_block_full"]
        for indices, prompt in tqdm(prompts, desc=f"{plan.method} {plan.mode} {len(plan.lazy_layers)}", unit="scene", leave=False):
            said, first = answer(context, prompt, llm.token_eos())
            for i, tokens, question in zip(indices, said, prompt.questions):
                result.texts[i] = llm.detokenize(tokens).decode(errors="replace").strip()
                blocks = [-(-n // usage["n_block_tokens"]) for n in _runs(prompt.tokens < 0, len(question) + len(tokens))]
                kinds = ["bytes_block_text", "bytes_block_visual", "bytes_block_text"]
                result.kv_bytes += sum(n * usage[kind] for n, kind in zip(blocks, kinds, strict=True))
                result.kv_blocks += sum(blocks)
            result.log_probs[indices] = first
    result.seconds = time.monotonic() - started
    return result


def _runs(visual: npt.NDArray[np.bool_], n_after: int) -> tuple[int, int, int]:
    """Tokens before, of and after the image."""
    n_visual = int(visual.sum())
    return len(visual) - n_visual, n_visual, n_after


def make_plans(llm: Llama, args: argparse.Namespace) -> Iterator[Plan]:
    """Chooses the layers, on training scenes."""
    n_layer = llm.native_model.info.n_layer
    with tempfile.TemporaryDirectory() as folder:
        prompts = []
        for seed in range(CALIBRATION_SEED, CALIBRATION_SEED + args.calibration_samples):
            scene = make_scene(seed)
            render(scene).save(Path(folder) / f"scene-{seed}.png")
            rng = random.Random(seed)
            asked = [ask(scene, task, rng) for task in TASKS]
            prompts += [pair[0] for pair in asked if pair]
        for mode in args.modes:
            kept = dict(images=Path(folder), mode=mode, n_samples=args.calibration_samples, prompts=sorted(set(prompts)))
            measured = measure(llm, CalibrationSettings(metric="js", budget=0.2, **kept), progress=True)
            for budget in args.budgets:
                n_lazy = 0
                for metric in args.metrics:
                    started = time.monotonic()
                    settings = CalibrationSettings(metric=metric, budget=budget, **kept)
                    leaders = calibrate(llm, settings, measured, progress=True).leaders
                    plan = Plan(metric, mode, leaders, seconds=time.monotonic() - started)
                    n_lazy = len(plan.lazy_layers)
                    yield plan
                chosen = random.Random(f"random:{mode}:{budget}").sample(range(1, n_layer), n_lazy)
                yield Plan("random", mode, leaders_of(chosen, n_layer))


def row(plan: Plan, answers: Answers, untouched: Answers, tests: Sequence[Test]) -> dict[str, Any]:
    """One row of the JSON; bytes saved are against full layers in f16."""
    scored, full = score(list(tests), answers.texts), score(list(tests), untouched.texts)
    return {
        "method": plan.method,
        "mode": plan.mode,
        "lazy_layers": plan.lazy_layers,
        "leaders": plan.leaders,
        "kv_type": plan.kv_type,
        "kv_saved": 1 - answers.kv_bytes / (answers.kv_blocks * untouched.full_block_bytes),
        "mean_loss_points": 100 * (full["closed_mean"] - scored["closed_mean"]),
        "closed_mean": scored["closed_mean"],
        "tasks": scored["tasks"],
        "caption": scored["caption"],
        "kl_first_token": float(kl_divergence(untouched.log_probs, answers.log_probs).mean()),
        "top1_agreement": float((answers.log_probs.argmax(-1) == untouched.log_probs.argmax(-1)).mean()),
        "seconds": round(answers.seconds, 1),
        "seconds_to_choose": round(plan.seconds, 1),
    }


def table(rows: Sequence[dict[str, Any]], n_scenes: int) -> Table:
    """The rows as a rich table."""
    shown = Table(title=f"{n_scenes} held-out scenes; accuracy in percent, loss in points of the closed tasks' mean")
    for heading in ("method", "mode", "lazy", "KV saved", *CLOSED_TASKS, "caption", "recalled", "loss", "KL", "top-1"):
        shown.add_column(heading, justify="left" if heading in ("method", "mode") else "right")
    for r in rows:
        accuracies = [f"{100 * r['tasks'][task]['accuracy']:.1f}" for task in (*CLOSED_TASKS, "caption")]
        shown.add_row(
            r["method"], r["mode"], str(len(r["lazy_layers"])), f"{r['kv_saved']:.1%}", *accuracies,
            f"{100 * r['caption']['recalled']:.1f}", f"{r['mean_loss_points']:.1f}", f"{r['kl_first_token']:.4f}",
            f"{r['top1_agreement']:.1%}",
        )  # fmt: skip
    return shown


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=MINI_LLAVA / "model", help="checkpoint folder")
    p.add_argument("--outtype", default="f16", help="weight type to convert to")
    p.add_argument("--scenes", type=int, default=1000, help="number of held-out scenes; each has a question of every task")
    p.add_argument("--modes", default="visual,global", help="lazy modes")
    p.add_argument("--metrics", default="js,output,loss", help="what chooses the lazy layers")
    p.add_argument("--budgets", default="0.1,0.2,0.3", help="shares of the KV bytes to save")
    p.add_argument("--calibration-samples", type=int, default=16, help="training scenes to choose on")
    p.add_argument("--json", type=Path, help="write the rows here too, after each of them")
    args = p.parse_args(argv)
    args.modes, args.metrics = args.modes.split(","), args.metrics.split(",")
    args.budgets = [float(budget) for budget in args.budgets.split(",")]
    if args.scenes < 1 or args.calibration_samples < 1:
        p.error(f"--scenes {args.scenes} and --calibration-samples {args.calibration_samples} must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse_args(argv)
    tests = test_set(args.scenes)
    result: dict[str, Any] = {
        "benchmark": "quality", "commit": commit(), "machine": machine(), "versions": versions(),
        "command": " ".join(["bench_quality.py", *(sys.argv[1:] if argv is None else argv)]), "scenes": args.scenes, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model, mmproj = Path(folder) / "model.gguf", Path(folder) / "mmproj.gguf"
        convert(args.model, model, mmproj, outtype=args.outtype)
        with contextlib.closing(
            Llama(str(model), mmproj_path=str(mmproj), n_ctx=1024, lazy_layers="none", verbose=False)
        ) as llm:
            prompts = list(tqdm(make_prompts(llm, tests), desc="pictures", total=args.scenes, unit="scene"))
            untouched = run_plan(llm, Plan("none"), tests, prompts)

            def add(plan: Plan, answers: Answers) -> None:
                result["rows"].append(row(plan, answers, untouched, tests))
                if args.json:
                    write_json(result, args.json)

            add(Plan("none"), untouched)
            q8_0 = Plan("q8_0", kv_type="q8_0")
            add(q8_0, run_plan(llm, q8_0, tests, prompts))
            for plan in make_plans(llm, args):
                add(plan, run_plan(llm, plan, tests, prompts))
    Console(width=160).print(table(result["rows"], args.scenes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
