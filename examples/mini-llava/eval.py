"""Per-task accuracy on held-out scenes: a table, and JSON with ``--json``.

    python eval.py                       # 1,000 scenes, minutes on two cores
    python eval.py --scenes 100 --json accuracy.json
    python eval.py --questions DIR       # writes pictures and questions.jsonl for `qcache eval`, runs nothing

Another runtime is scored by the same rules: ``evaluate`` takes any callable that answers a list of
``(image, question)`` pairs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table
from scenes import CLOSED_TASKS, TASKS, make_scene, questions, render
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
MAX_NEW_TOKENS = 160  # the longest caption has about 100

Answerer = Callable[[list[tuple[Image.Image, str]]], list[str]]


def normalise(answer: str) -> str:
    """What is compared: lower case, one space between words, no full stop at the end."""
    return " ".join(answer.lower().split()).removesuffix(".")


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer counts as right."""
    return normalise(answer) == normalise(expected)


def caption_objects(text: str) -> list[str]:
    """The ``at the PLACE there is OBJECT`` statements of a caption."""
    return re.findall(r"at the ([a-z ]+? there is [a-z0-9 ]+)", normalise(text))


def caption_overlap(text: str, expected: str) -> tuple[int, int, int]:
    """Compares the objects of two captions.

    Returns:
        Objects of the expected caption that the text names (with place, size, colour and kind), objects of the expected
        caption, and objects the text names that aren't there.
    """
    said, true = collections.Counter(caption_objects(text)), collections.Counter(caption_objects(expected))
    return (said & true).total(), true.total(), (said - true).total()


def test_set(n_scenes: int, first_seed: int = 0) -> list[tuple[int, str, str, str]]:
    """One question of each task for each held-out scene: ``(seed, task, question, answer)``."""
    return [
        (seed, *asked)
        for seed in range(first_seed, first_seed + n_scenes)
        for asked in questions(make_scene(seed, "heldout"), random.Random(f"eval:{seed}"))
    ]


def evaluate(answer: Answerer, n_scenes: int = 1000, first_seed: int = 0, batch: int = 50) -> dict:
    """Scores a model on held-out scenes.

    Args:
        answer: gives one answer for each ``(image, question)`` of a list.
        n_scenes, first_seed: which held-out scenes.
        batch: questions a call; a call has questions of one task.

    Returns:
        ``tasks`` with n, accuracy, standard error and the accuracy of always giving the commonest answer;
        ``closed_mean`` over the closed tasks; ``caption`` with recalled and hallucinated shares of objects;
        ``wrong``, the mistakes as ``(seed, task, question, expected, answer)``.
    """
    tests = test_set(n_scenes, first_seed)
    answers: list[str] = [""] * len(tests)
    for task in TASKS:
        mine = [i for i, test in enumerate(tests) if test[1] == task]
        for at in tqdm(range(0, len(mine), batch), desc=task, leave=False):
            part = mine[at : at + batch]
            asked = [(render(make_scene(tests[i][0], "heldout")), tests[i][2]) for i in part]
            for i, said in zip(part, answer(asked), strict=True):
                answers[i] = said
    return {"scenes": n_scenes, "first_seed": first_seed, **score(tests, answers)}


def score(tests: list[tuple[int, str, str, str]], answers: list[str]) -> dict:
    """Scores answers to questions of ``test_set``.

    Returns:
        What ``evaluate`` returns but ``scenes`` and ``first_seed``; tasks without a question are left out.
    """
    result: dict = {"tasks": {}, "caption": {}, "wrong": []}
    for task in TASKS:
        mine = [(test, said) for test, said in zip(tests, answers, strict=True) if test[1] == task]
        if not mine:
            continue
        right = [is_right(said, test[3]) for test, said in mine]
        share = sum(right) / len(right)
        commonest = collections.Counter(test[3] for test, _ in mine).most_common(1)[0][1]
        result["tasks"][task] = {
            "n": len(mine),
            "accuracy": share,
            "stderr": (share * (1 - share) / len(mine)) ** 0.5,
            "commonest_answer": commonest / len(mine),
        }
        result["wrong"] += [(*test, said) for (test, said), ok in zip(mine, right) if not ok]
        if task == "caption":
            found, true, invented = (sum(column) for column in zip(*(caption_overlap(said, test[3]) for test, said in mine)))
            result["caption"] = {"recalled": found / true, "hallucinated": invented / max(1, found + invented)}
    closed = [result["tasks"][task]["accuracy"] for task in CLOSED_TASKS if task in result["tasks"]]
    result["closed_mean"] = sum(closed) / len(closed)
    return result


def table(result: dict) -> Table:
    """The result as a rich table."""
    shown = Table(title=f"{result['scenes']} held-out scenes")
    for column in ("task", "questions", "accuracy", "standard error", "commonest answer"):
        shown.add_column(column, justify="left" if column == "task" else "right")
    for task, row in result["tasks"].items():
        name = "caption, exact match" if task == "caption" else task
        shown.add_row(name, str(row["n"]), f"{row['accuracy']:.1%}", f"{row['stderr']:.1%}",
                      f"{row['commonest_answer']:.1%}")  # fmt: skip
    shown.add_section()
    shown.add_row("closed tasks, mean", "", f"{result['closed_mean']:.1%}", "", "")
    shown.add_row("caption, objects recalled", "", f"{result['caption']['recalled']:.1%}", "", "")
    shown.add_row("caption, objects hallucinated", "", f"{result['caption']['hallucinated']:.1%}", "", "")
    return shown


class HuggingFaceAnswerer:
    """Greedy decoding with transformers, in float32, one question a prompt.

    Args:
        folder: a LLaVA checkpoint with its processor.
    """

    def __init__(self, folder: Path):
        import torch  # not needed to score another runtime
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()

    def __call__(self, pairs: list[tuple[Image.Image, str]]) -> list[str]:
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for _, question in pairs
        ]
        images = [image for image, _ in pairs]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt").to(self.device)
        with self.torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_json(result: dict, path: Path) -> None:
    """Writes atomically."""
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False, suffix=".tmp") as f:
        json.dump(result, f, indent=1)
        f.write("\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def write_questions(folder: Path, n_scenes: int, first_seed: int) -> Path:
    """Writes held-out scenes and their questions as ``qcache eval`` reads them; returns the file of questions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed, task, question, answer in test_set(n_scenes, first_seed):
        image = f"{seed}.png"
        if not (folder / image).exists():
            render(make_scene(seed, "heldout")).save(folder / image)
        lines.append(json.dumps({"image": image, "question": question, "answer": answer, "task": task}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=HERE / "model", help="checkpoint folder")
    p.add_argument("--scenes", type=int, default=1000, help="number of held-out scenes")
    p.add_argument("--first-seed", type=int, default=0, help="first held-out scene")
    p.add_argument("--batch", type=int, default=50, help="questions a batch")
    p.add_argument("--json", type=Path, help="write the result here too")
    p.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print the first N mistakes of each task")
    p.add_argument("--questions", type=Path, metavar="DIR", help="write pictures and questions there instead")
    args = p.parse_args()
    if args.questions is not None:
        print(write_questions(args.questions, args.scenes, args.first_seed))
        return

    console = Console()
    started = time.monotonic()
    result = evaluate(HuggingFaceAnswerer(args.model), args.scenes, args.first_seed, args.batch)
    result["seconds"] = round(time.monotonic() - started, 1)
    console.print(table(result))
    for task in TASKS:
        for seed, _, question, expected, said in [w for w in result["wrong"] if w[1] == task][: args.show_wrong]:
            console.print(f"scene {seed}: {question} expected {expected!r}, got {said!r}", markup=False)
    if args.json:
        result["wrong"] = len(result["wrong"])
        write_json(result, args.json)


if __name__ == "__main__":
    main()
