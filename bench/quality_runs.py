"""Answers the mini-LLaVA's held-out questions under a plan of lazy layers, or of what is compared with them.

All questions about a picture share its prefill where the plan allows it. Besides the greedy answers each plan reads the
right answers token by token: their perplexity, and the divergence of the logits from the untouched model's, over every token.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ggml_qcache import Llama
from ggml_qcache.native import Context, Model
from ggml_qcache.pruning import PrunedContext
from ggml_qcache_convert.calibration.attention import kl_divergence, log_softmax
from ggml_qcache_convert.calibration.weights import Weights
from ggml_qcache_convert.lazy_layers import dropped_of, lazy_of
from scipy.ndimage import zoom
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "mini-llava"))

from eval import MAX_NEW_TOKENS  # noqa: E402
from scenes import TASKS, make_scene, render  # noqa: E402

SEQUENCES = len(TASKS)
BLOCK_TOKENS = 16  # prompts of some 170 tokens would leave much of larger blocks empty
Array = npt.NDArray[np.float32]
Test = tuple[int, str, str, str]  # seed, task, question, answer


@dataclass(frozen=True)
class Prompt:
    """All questions about one picture.

    Attributes:
        indices: Which tests they are.
        tokens: ``[n]`` i32, what comes up to the end of the image; -1 for a visual token.
        embeddings: ``[n, n_embd]`` f32, read where there is no token.
        questions: By question, the tokens that follow, i32.
        answers: By question, the tokens of the right answer and the end of text, i32.
    """

    indices: list[int]
    tokens: npt.NDArray[np.int32]
    embeddings: Array
    questions: list[npt.NDArray[np.int32]]
    answers: list[npt.NDArray[np.int32]]

    @property
    def visual(self) -> npt.NDArray[np.bool_]:
        """``[n]``, which of the tokens are visual."""
        return self.tokens < 0

    def scaled(self, side: int) -> Prompt:
        """The prompt with the square grid of visual tokens resampled, linearly, to ``side * side`` of them."""
        first, n = int(self.visual.argmax()), int(self.visual.sum())
        grid = round(n**0.5)
        image = self.embeddings[first : first + n].reshape(grid, grid, -1)
        small = zoom(image, (side / grid, side / grid, 1), order=1, grid_mode=True, mode="nearest").reshape(side * side, -1)
        tokens = [self.tokens[:first], np.full(side * side, -1, np.int32), self.tokens[first + n :]]
        embeddings = [self.embeddings[:first], small.astype(np.float32), self.embeddings[first + n :]]
        return Prompt(self.indices, np.concatenate(tokens), np.concatenate(embeddings), self.questions, self.answers)


@dataclass(frozen=True)
class Plan:
    """One row of the table.

    Attributes:
        method: What the row is called.
        mode: ``visual`` or ``global``; ``off`` where no layer is lazy.
        leaders: ``[n_layer]``; None: every layer full.
        kv_type: Type of K and V.
        budget: Share of the KV bytes that its layers were chosen to save; None: it has none.
        weights, vis_bias, refit_step: Of corrections.
        prune: Layers that see every token, and share of the visual tokens that stay after them.
        side: Visual tokens a side, resampled; None: as they are.
        seconds: What choosing took.
    """

    method: str
    mode: str = "off"
    leaders: Sequence[int] | None = None
    kv_type: str = "f16"
    budget: float | None = None
    weights: dict[str, Array] = field(default_factory=dict)
    vis_bias: Array | None = None
    refit_step: float | None = None
    prune: tuple[int, float] | None = None
    side: int | None = None
    seconds: float = 0.0

    @property
    def lazy_layers(self) -> list[int]:
        """The lazy layers, ascending."""
        return lazy_of(self.leaders or [])

    @property
    def dropped_layers(self) -> list[int]:
        """The layers without attention, ascending."""
        return dropped_of(self.leaders or [])

    def facts(self) -> dict[str, Any]:
        """What a row of the JSON tells about it, corrections aside."""
        return {
            "method": self.method,
            "mode": self.mode,
            "lazy_layers": self.lazy_layers,
            "leaders": None if self.leaders is None else list(self.leaders),
            "budget": self.budget,
            "kv_type": self.kv_type,
            "prune": None if self.prune is None else list(self.prune),
            "visual_tokens_a_side": self.side,
            "dropped_layers": self.dropped_layers,
        }

    def context_params(self) -> dict[str, Any]:
        """What ``Context`` is made with."""
        lazy: dict[str, Any] = {"lazy_mode": "off"}
        if self.leaders is not None:
            mode = "visual" if self.mode == "off" else self.mode  # without lazy layers either is the same
            lazy = {"lazy_mode": mode, "lazy_leader": self.leaders, "vis_bias": self.vis_bias}
        return {
            "n_ctx": 1024, "n_seq_max": SEQUENCES, "type_k": self.kv_type, "type_v": self.kv_type,
            "block_tokens": BLOCK_TOKENS, "n_threads": 1, "n_threads_batch": 1, **lazy,
        }  # fmt: skip


@dataclass
class Answers:
    """What a plan answered.

    Attributes:
        texts: By test.
        kv_bytes: Over all tests, each as if asked alone.
        full_bytes: What they would take with every layer full, in f16, and every visual token kept.
        log_probs: By test, ``[n answer tokens, n_vocab]`` f32; kept of the untouched model.
        nll: By test, negative log-likelihood of the right answer, nats, summed over its tokens.
        kl, agreement: By test, divergence from the untouched model and whether the likeliest token is the same, summed likewise.
        n_tokens: By test.
    """

    texts: list[str]
    kv_bytes: int
    full_bytes: int
    log_probs: list[Array]
    nll: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    agreement: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.int64]
    seconds: float


def make_prompts(llm: Llama, tests: Sequence[Test]) -> Iterator[Prompt]:
    """Reads each picture once.

    Raises:
        RuntimeError: The questions' tokens differ from those of a chat: the template isn't the mini-LLaVA's.
    """
    by_scene: dict[int, list[int]] = {}
    for i, test in enumerate(tests):
        by_scene.setdefault(test[0], []).append(i)

    def encoded(text: str, *end: int) -> npt.NDArray[np.int32]:
        return np.array([*llm.tokenize(text.encode(), add_bos=False), *end], dtype=np.int32)

    with tempfile.TemporaryDirectory() as folder:
        for seed, indices in by_scene.items():
            path = Path(folder) / "scene.png"
            render(make_scene(seed, "heldout")).save(path)
            questions = [tests[i][2] for i in indices]
            content = [{"type": "image_url", "image_url": {"url": str(path)}}, {"type": "text", "text": questions[0]}]
            llm.create_chat_completion([{"role": "user", "content": content}], temperature=0.0, max_tokens=1)
            tokens, embeddings = llm.evaluated_rows()
            end = int(np.flatnonzero(tokens < 0)[-1]) + 1
            after = [encoded(f"\n{question} ASSISTANT:") for question in questions]
            if not np.array_equal(after[0], tokens[end : end + len(after[0])]):
                raise RuntimeError(f"the chat template asks {questions[0]!r} with other tokens: {tokens[end:]} and {after[0]}")
            start = np.where(tokens[:end] < 0, -1, tokens[:end]).astype(np.int32)
            answers = [encoded(f" {tests[i][3]}", llm.token_eos()) for i in indices]
            yield Prompt(indices, start, embeddings[:end], after, answers)


class Session:
    """The questions of one picture at a time, a sequence each."""

    _context: Context | PrunedContext

    def ask(self, prompt: Prompt) -> Array:
        """Reads picture and questions; returns the logits after each question, ``[n_questions, n_vocab]``."""
        raise NotImplementedError

    def decode(self, tokens: Sequence[int], seq_id: Sequence[int]) -> None:
        """Appends tokens to their sequences, each to the end of its own, and keeps their logits."""
        raise NotImplementedError

    def kv_bytes(self, prompt: Prompt, n_answer: Sequence[int]) -> int:
        """KV bytes of the questions and answers of so many tokens, each as if asked alone."""
        raise NotImplementedError

    def step(self, tokens: Sequence[int], seq_id: Sequence[int]) -> Array:
        """``decode``; returns the logits, ``[n, n_vocab]``."""
        self.decode(tokens, seq_id)
        return np.stack([self._context.logits(row) for row in range(len(tokens))])

    def rewind(self, prompt: Prompt) -> None:
        """Forgets the answers."""
        for i, question in enumerate(prompt.questions):
            self._context.seq_rm(i, len(prompt.tokens) + len(question))

    def close(self) -> None:
        """Frees the memory."""
        self._context.close()


class SharedSession(Session):
    """The picture is prefilled once, and its blocks are shared."""

    def __init__(self, model: Model, plan: Plan) -> None:
        self._context = Context(model, **plan.context_params())
        self._usage = self._context.kv_usage()

    def ask(self, prompt: Prompt) -> Array:
        """As ``Session``."""
        context, n = self._context, len(prompt.questions)
        context.clear()
        context.decode(prompt.tokens, prompt.embeddings, modality=prompt.visual)
        for i in range(1, n):
            context.seq_cp(0, i)
        lengths = [len(q) for q in prompt.questions]
        ends = np.cumsum(lengths) - 1
        wanted = np.isin(np.arange(sum(lengths)), ends)
        context.decode(np.concatenate(prompt.questions), seq_id=np.repeat(np.arange(n), lengths), logits=wanted)
        return np.stack([context.logits(int(end)) for end in ends])

    def decode(self, tokens: Sequence[int], seq_id: Sequence[int]) -> None:
        """As ``Session``."""
        self._context.decode(tokens, seq_id=seq_id, logits=True)

    def kv_bytes(self, prompt: Prompt, n_answer: Sequence[int]) -> int:
        """As ``Session``."""
        kinds = ["bytes_block_text", "bytes_block_visual", "bytes_block_text"]
        total = 0
        for question, n in zip(prompt.questions, n_answer):
            blocks = count_blocks(prompt, len(question) + n)
            total += sum(count * self._usage[kind] for count, kind in zip(blocks, kinds))
        return total


class PrunedSession(Session):
    """What is pruned depends on the question: each has a prefill of its own."""

    def __init__(self, model: Model, plan: Plan) -> None:
        assert plan.prune is not None
        self._context = PrunedContext(model, *plan.prune, **plan.context_params())

    def ask(self, prompt: Prompt) -> Array:
        """As ``Session``."""
        self._context.clear()
        rows = []
        for i, question in enumerate(prompt.questions):
            tokens = np.concatenate([prompt.tokens, question])
            embeddings = np.concatenate([prompt.embeddings, np.zeros((len(question), prompt.embeddings.shape[1]), np.float32)])
            self._context.prefill(tokens, embeddings, tokens < 0, i)
            rows.append(self._context.logits())
        return np.stack(rows)

    def decode(self, tokens: Sequence[int], seq_id: Sequence[int]) -> None:
        """As ``Session``."""
        self._context.decode(tokens, seq_id)

    def kv_bytes(self, prompt: Prompt, n_answer: Sequence[int]) -> int:
        """As ``Session``; nothing is shared, so it is what they hold."""
        return self._context.kv_usage()["bytes"]


def count_blocks(prompt: Prompt, n_after: int) -> list[int]:
    """Blocks of the tokens before, of and after the image."""
    n_visual = int(prompt.visual.sum())
    return [-(-n // BLOCK_TOKENS) for n in (len(prompt.tokens) - n_visual, n_visual, n_after)]


def greedy(session: Session, logits: Array, eos: int) -> list[list[int]]:
    """The answers that follow, by question."""
    said: list[list[int]] = [[] for _ in logits]
    going = list(range(len(logits)))
    for _ in range(MAX_NEW_TOKENS):
        chosen = dict(zip(going, logits.argmax(-1).tolist()))
        going = [i for i in going if chosen[i] != eos]
        for i in going:
            said[i].append(chosen[i])
        if not going:
            break
        logits = session.step([chosen[i] for i in going], going)
    return said


def forced(session: Session, logits: Array, answers: Sequence[npt.NDArray[np.int32]]) -> list[Array]:
    """Log-probabilities before each token of the right answers, by question ``[n answer tokens, n_vocab]``."""
    lengths = [len(answer) - 1 for answer in answers]
    rows = session.step(np.concatenate([answer[:-1] for answer in answers]).tolist(), np.repeat(np.arange(len(answers)), lengths).tolist())
    parts = np.split(rows, np.cumsum(lengths)[:-1])
    return [log_softmax(np.concatenate([row[None], part])) for row, part in zip(logits, parts)]


def run_plan(
    llm: Llama, plan: Plan, tests: Sequence[Test], prompts: Sequence[Prompt], untouched: Answers | None, n_threads: int
) -> Answers:
    """Answers every test under a plan; scenes are shared out to threads, which suits a model this small.

    Args:
        llm: The model, with every layer full.
        plan: What to do to it.
        tests: The questions.
        prompts: Their pictures and tokens.
        untouched: What divergences are from; None: this is the untouched model.
        n_threads: Threads.
    """
    model, n = llm.native_model, len(tests)
    result = Answers([""] * n, 0, 0, [np.empty(0, np.float32)] * n, np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n, np.int64), 0.0)
    started = time.monotonic()
    with Context(model, **Plan("none").context_params()) as context:
        full_block_bytes = context.kv_usage()["bytes_block_full"]
    bar = tqdm(total=len(prompts), desc=f"{plan.method} {plan.mode} {len(plan.lazy_layers)}+{len(plan.dropped_layers)}", unit="scene", leave=False)

    def work(mine: Sequence[Prompt]) -> tuple[int, int]:
        session: Session = PrunedSession(model, plan) if plan.prune else SharedSession(model, plan)
        kv_bytes = full_bytes = 0
        try:
            for prompt in mine:
                seen = prompt if plan.side is None else prompt.scaled(plan.side)
                logits = session.ask(seen)
                said = greedy(session, logits, llm.token_eos())
                lengths = [len(tokens) for tokens in said]
                kv_bytes += session.kv_bytes(seen, lengths)
                for question, n_said in zip(prompt.questions, lengths):
                    full_bytes += sum(count_blocks(prompt, len(question) + n_said)) * full_block_bytes
                session.rewind(seen)
                log_probs = forced(session, logits, prompt.answers)
                for i, tokens, log_q, answer in zip(prompt.indices, said, log_probs, prompt.answers):
                    result.texts[i] = llm.detokenize(tokens).decode(errors="replace").strip()
                    result.n_tokens[i] = len(answer)
                    result.nll[i] = -log_q[np.arange(len(answer)), answer].sum(dtype=np.float64)
                    if untouched is None:
                        result.log_probs[i], result.agreement[i] = log_q, len(answer)
                    else:
                        log_p = untouched.log_probs[i]
                        result.kl[i] = kl_divergence(log_p, log_q).sum()
                        result.agreement[i] = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
                bar.update()
        finally:
            session.close()
        return kv_bytes, full_bytes

    with bar, Weights.of(model).replaced(model, plan.weights), ThreadPoolExecutor(n_threads) as pool:
        for kv_bytes, full_bytes in pool.map(work, [prompts[i::n_threads] for i in range(n_threads)]):
            result.kv_bytes += kv_bytes
            result.full_bytes += full_bytes
    result.seconds = time.monotonic() - started
    return result
