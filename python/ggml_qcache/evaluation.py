"""What ``qcache eval`` does: asks a model questions about images whose answers are known, beside the untouched model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ggml_qcache_convert.calibration.attention import kl_divergence, log_softmax
from ggml_qcache_convert.lazy_layers import dropped_of, lazy_of
from rich.console import Console
from rich.table import Table

from .llama import Llama


@dataclass(frozen=True)
class Item:
    """A question about an image.

    Attributes:
        image: Path or URL.
        question: What is asked.
        answer: The right answer; one of several sentences is scored by sentence as well.
        task: What it is counted under.
    """

    image: str
    question: str
    answer: str
    task: str


@dataclass
class Answered:
    """How a model did on an item.

    Attributes:
        text: Its greedy answer.
        kv_bytes, kv_bytes_if_full: What the KV cache held in the end, and with every layer full.
        log_probs: ``[n, n_vocab]`` f32 before each token of the right answer.
        nll: Negative log-likelihood of the right answer in nats.
    """

    text: str
    kv_bytes: int
    kv_bytes_if_full: int
    log_probs: npt.NDArray[np.float32]
    nll: float


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Reads a JSON Lines file: an object with ``image``, ``question``, ``answer`` and maybe ``task`` a line.

    Args:
        path: The file; paths of images are relative to its folder.

    Raises:
        ValueError: A line that isn't such an object, or none at all; it tells which.
        OSError: The file can't be read.
    """
    path = Path(path)
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        fields = {"task": "all"} | (entry if isinstance(entry, dict) else {})
        wrong = [name for name in ("image", "question", "answer", "task") if not isinstance(fields.get(name), str)]
        if wrong:
            raise ValueError(f"{path}, line {number}: {', '.join(wrong)} missing or no text in {line.strip()[:80]!r}")
        image = fields["image"]
        if "://" not in image and not image.startswith("data:"):
            image = str(path.parent / image)
        items.append(Item(image, fields["question"], fields["answer"], fields["task"]))
    if not items:
        raise ValueError(f"{path}: has no questions")
    return items


def normalise(answer: str) -> str:
    """What is compared: lower case, one space between words, no full stop at the end."""
    return " ".join(answer.lower().split()).removesuffix(".")


def sentences(answer: str) -> list[str]:
    """The sentences of an answer, normalised."""
    return [normalise(part) for part in answer.replace("\n", ". ").split(". ") if normalise(part)]


def answer_item(llm: Llama, item: Item, max_tokens: int) -> Answered:
    """Asks a model.

    Raises:
        ValueError: The image can't be read, or question and answer don't fit the context.
        QCacheError: The runtime failed.
    """
    content = [{"type": "image_url", "image_url": {"url": item.image}}, {"type": "text", "text": item.question}]
    reply: Any = llm.create_chat_completion([{"role": "user", "content": content}], temperature=0.0, max_tokens=max_tokens)
    usage = llm.kv_cache_usage()
    # as it follows the template of a chat: after a space, with the end of text
    expected = [*llm.tokenize(f" {item.answer}".encode(), add_bos=False), llm.token_eos()]
    log_probs = log_softmax(llm.continuation_logits(reply["usage"]["prompt_tokens"], expected))
    nll = -float(log_probs[np.arange(len(expected)), expected].sum(dtype=np.float64))
    text = (reply["choices"][0]["message"]["content"] or "").strip()
    return Answered(text, usage["bytes"], usage["bytes_if_full"], log_probs, nll)


class Score:
    """Sums of what one model answered; divergences are from the first model's."""

    def __init__(self, method: str, llm: Llama) -> None:
        self.method, self.lazy = method, llm.lazy
        self.right: dict[str, list[bool]] = {}
        self.recalled = self.expected = self.made_up = self.said = 0
        self.kv_bytes = self.kv_bytes_if_full = self.n_tokens = 0
        self.nll = self.kl = 0.0
        self.agreed = 0

    def add(self, item: Item, answered: Answered, first: Answered) -> None:
        """Counts an item."""
        self.right.setdefault(item.task, []).append(normalise(answered.text) == normalise(item.answer))
        true, said = sentences(item.answer), sentences(answered.text)
        if len(true) > 1:
            found = sum(sentence in said for sentence in true)
            self.recalled, self.expected = self.recalled + found, self.expected + len(true)
            self.made_up, self.said = self.made_up + sum(sentence not in true for sentence in said), self.said + len(said)
        self.kv_bytes += answered.kv_bytes
        self.kv_bytes_if_full += answered.kv_bytes_if_full
        self.nll += answered.nll
        self.n_tokens += len(answered.log_probs)
        self.kl += float(kl_divergence(first.log_probs, answered.log_probs).sum())
        self.agreed += int((first.log_probs.argmax(-1) == answered.log_probs.argmax(-1)).sum())

    def row(self, first: Score) -> dict[str, Any]:
        """One row of the JSON: shares 0 to 1, the mean loss in points of the mean over tasks."""
        tasks = {}
        for task, right in self.right.items():
            share = sum(right) / len(right)
            tasks[task] = {"n": len(right), "accuracy": share, "stderr": math.sqrt(share * (1 - share) / len(right))}
        means = [np.mean([np.mean(right) for right in score.right.values()]) for score in (first, self)]
        return {
            "method": self.method,
            "mode": self.lazy.mode,
            "lazy_layers": lazy_of(self.lazy.leader),
            "dropped_layers": dropped_of(self.lazy.leader),
            "kv_saved": 1 - self.kv_bytes / self.kv_bytes_if_full,
            "mean_loss_points": float(100 * (means[0] - means[1])),
            "tasks": tasks,
            "sentences": {"recalled": self.recalled / self.expected, "made_up": self.made_up / max(1, self.said)} if self.expected else None,
            "perplexity": math.exp(min(700.0, self.nll / self.n_tokens)),
            "kl": self.kl / self.n_tokens,
            "top1_agreement": self.agreed / self.n_tokens,
        }


def evaluate(models: Sequence[tuple[str, Llama]], items: Iterable[Item], max_tokens: int) -> list[dict[str, Any]]:
    """Asks all models all questions.

    Args:
        models: Name and model; divergences and losses are from the first's. All have the same vocabulary.
        items: The questions.
        max_tokens: Longest answer.

    Returns:
        A row for each model, as ``Score.row``.

    Raises:
        ValueError: Vocabularies of different size, or what ``answer_item`` refuses.
        QCacheError: The runtime failed.
    """
    sizes = {name: llm.n_vocab() for name, llm in models}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the models' vocabularies differ in size: {sizes}")
    scores = [Score(name, llm) for name, llm in models]
    for item in items:
        answers = [answer_item(llm, item, max_tokens) for _, llm in models]
        for score, answered in zip(scores, answers):
            score.add(item, answered, answers[0])
    return [score.row(scores[0]) for score in scores]


def draw(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the rows for people; accuracies in percent with their standard error."""
    table = Table(title=f"{sum(task['n'] for task in rows[0]['tasks'].values())} questions, accuracy in percent")
    table.add_column("")
    for row in rows:
        table.add_column(row["method"], justify="right")

    def line(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    line("lazy layers", (f"{len(row['lazy_layers'])}, {row['mode']}" if row["lazy_layers"] else "none" for row in rows))
    if any(row["dropped_layers"] for row in rows):
        line("layers without attention", (str(len(row["dropped_layers"])) for row in rows))
    line("KV bytes saved by them", (f"{row['kv_saved']:.1%}" for row in rows))
    table.add_section()
    for task in rows[0]["tasks"]:
        results = [row["tasks"][task] for row in rows]
        line(task, (f"{100 * result['accuracy']:.1f} ± {100 * result['stderr']:.1f}" for result in results))
    table.add_section()
    if rows[0]["sentences"]:
        line("sentences recalled", (f"{row['sentences']['recalled']:.1%}" for row in rows))
        line("sentences made up", (f"{row['sentences']['made_up']:.1%}" for row in rows))
    line("perplexity of the answers", (f"{row['perplexity']:.4f}" for row in rows))
    if len(rows) > 1:
        line("mean loss, points", (f"{row['mean_loss_points']:.2f}" for row in rows))
        line("KL divergence, nats", (f"{row['kl']:.5f}" for row in rows))
        line("top-1 agreement", (f"{row['top1_agreement']:.2%}" for row in rows))
    console.print(table)
