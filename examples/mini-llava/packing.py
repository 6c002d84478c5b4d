"""Training samples: one picture and many dialogues about it, in one sequence.

A sample is a prefix, ``<s>USER: `` and the visual tokens, followed by independent branches. A branch is a dialogue of
one to three turns; it attends to the prefix and to itself, and its positions start right after the prefix, exactly as
if it were the only one. Branches are packed into rows of fixed length. So one picture's visual tokens, the larger part
of the cost, are computed once for about twenty questions and a caption.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import torch
from architecture import make_tokenizer
from scenes import CELL, COLOURS, IMAGE_SIZE, SHAPES, SIZES, TASKS, Scene, ask, auxiliary, make_scene, mentions, render

ROWS = 3
ROW_LENGTH = 128
IGNORE = -100

# training mixture: counting and relations are the slowest to learn; "auxiliary" is never evaluated
MIXTURE = {"existence": 1.4, "counting": 2.2, "colour": 0.8, "relation": 1.8, "digit": 0.4, "auxiliary": 1.0}
CAPTION_WEIGHT = 0.8  # a caption has about fifty times the tokens of a short answer

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass
class Batch:
    """Samples stacked along the first axis.

    Attributes:
        pixels: f32 [n, 3, 96, 96], normalised as CLIP does.
        tokens: i64 [n, ROWS, ROW_LENGTH].
        positions: i64, same shape, counted from the first token after the prefix.
        branch: i64, same shape: which branch a token belongs to; -1 is padding.
        targets: i64, same shape: the next token where it is part of an answer, else IGNORE.
        weights: f32, same shape: loss weight of a target.
        tasks: i64, same shape: index into TASKS of the answer a target belongs to, -1 where there is none.
        turns: i64, same shape: number of the answer within the sample.
        grounds: i64, same shape: at the last token of a noun phrase of a question, bit p says whether an object that fits
            it is at place p; -1 elsewhere.
        patches: i64 [n, 5, visual tokens]: kind, colour, size, digit and place of each patch's cell; IGNORE where undefined.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    tasks: torch.Tensor
    turns: torch.Tensor
    grounds: torch.Tensor
    patches: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in self.__dict__.items()})

    def split(self, n_parts: int) -> list[Batch]:
        """Cuts the batch along the first axis."""
        columns = {k: v.tensor_split(n_parts) for k, v in self.__dict__.items()}
        return [Batch(**{k: v[i] for k, v in columns.items()}) for i in range(n_parts)]


@functools.lru_cache(maxsize=1)
def tokenizer():
    """The tokenizer, made once a process."""
    return make_tokenizer()[0]


@functools.lru_cache(maxsize=200_000)
def encode(text: str) -> tuple[int, ...]:
    """Tokens of a text without special tokens added; special tokens inside it are recognised."""
    return tuple(tokenizer().encode(text, add_special_tokens=False))


@functools.lru_cache(maxsize=1)
def prefix() -> tuple[int, ...]:
    """The text before the picture: ``<s>USER: ``."""
    return (tokenizer().bos_token_id, *encode("USER: "))


def _encode_answer(answer: str) -> tuple[int, ...]:
    # no piece crosses a space, so sentences can be cached one by one
    parts = [encode(" " + sentence) for sentence in answer.replace(". ", ".\0").split("\0")]
    return (*(t for part in parts for t in part), tokenizer().eos_token_id)


def _turn(question: str, answer: str, first: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    before = f"\n{question} ASSISTANT:" if first else f"USER: {question} ASSISTANT:"
    return encode(before), _encode_answer(answer)


def _grounds(scene: Scene, question: str, first: bool) -> list[tuple[int, int]]:
    """For each noun phrase of a question, the index of its last token within the turn and its bits of ``grounds``."""
    result = []
    for end, things in mentions(scene, question):
        # no piece crosses a space, so a text cut at a space gives the same tokens
        word_end = question.find(" ", end)
        before = ("\n" if first else "USER: ") + (question if word_end < 0 else question[:word_end])
        result.append((len(encode(before)) - 1, sum(1 << t.place for t in things)))
    return result


def pixels(scene: Scene) -> np.ndarray:
    """A rendered scene as CLIP sees it, f32 [3, 96, 96]."""
    image = np.asarray(render(scene), dtype=np.float32) / 255.0
    return ((image - _MEAN) / _STD).transpose(2, 0, 1)


def patch_targets(scene: Scene, patch: int) -> np.ndarray:
    """What lies in the cell of each patch's middle, i64 [5, visual tokens]: kind (0 is empty), colour, size, digit, place."""
    cells = np.full((5, 3, 3), IGNORE, dtype=np.int64)
    cells[0] = 0
    cells[4] = np.arange(9).reshape(3, 3)
    for t in scene.things:
        at = (t.row, t.column)
        if t.is_digit:
            cells[0][at], cells[3][at] = 1 + len(SHAPES), t.value
        else:
            cells[0][at] = 1 + SHAPES.index(t.kind)
            cells[1][at], cells[2][at] = list(COLOURS).index(t.colour), SIZES.index(t.size)
    middle = np.arange(patch // 2, IMAGE_SIZE, patch) // CELL
    return cells[:, middle[:, None], middle].reshape(5, -1)


def _dialogue(scene: Scene, rng: random.Random, single: bool) -> list[tuple[str, str, str]]:
    """One to three turns of ``(task, question, answer)``."""
    turns = []
    for task in rng.choices(list(MIXTURE), list(MIXTURE.values()), k=1 if single else rng.choice((1, 1, 1, 2, 3))):
        pair = auxiliary(scene, rng) if task == "auxiliary" else ask(scene, task, rng)
        if pair:
            turns.append((task, *pair))
    return turns


def sample(seed: int, split: str, patch: int, single: bool = False) -> dict[str, np.ndarray]:
    """Packs one scene.

    Args:
        seed, split: of the scene; they also fix the questions.
        patch: pixels a side of a visual token.
        single: only one-turn dialogues, as the evaluation has them.

    Returns:
        The fields of ``Batch`` without the first axis.
    """
    scene, rng = make_scene(seed, split), random.Random(f"questions:{split}:{seed}")
    shape = (ROWS, ROW_LENGTH)
    tokens = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    branch = np.full(shape, -1, np.int64)
    targets = np.full(shape, IGNORE, np.int64)
    weights = np.zeros(shape, np.float32)
    tasks = np.full(shape, -1, np.int64)
    turns = np.zeros(shape, np.int64)
    grounds = np.full(shape, -1, np.int64)
    n_branches = n_turns = 0
    free = [0] * ROWS  # first free slot of each row

    def place(dialogue) -> bool:
        nonlocal n_branches, n_turns
        encoded = [_turn(question, answer, first=i == 0) for i, (_, question, answer) in enumerate(dialogue)]
        length = sum(len(before) + len(answer) for before, answer in encoded)
        row = next((r for r in range(ROWS) if free[r] + length <= ROW_LENGTH), None)
        if row is None:
            return False
        at = free[row]
        positions[row, at : at + length] = np.arange(length)
        branch[row, at : at + length] = n_branches
        for i, ((task, question, _), (before, answer)) in enumerate(zip(dialogue, encoded)):
            tokens[row, at : at + len(before) + len(answer)] = before + answer
            answers = slice(at + len(before) - 1, at + len(before) + len(answer) - 1)
            targets[row, answers] = answer
            weights[row, answers] = CAPTION_WEIGHT if task == "caption" else 1.0
            tasks[row, answers] = TASKS.index(task) if task in TASKS else -1
            turns[row, answers] = n_turns
            for token, bits in _grounds(scene, question, first=i == 0):
                grounds[row, at + token] = bits
            n_turns += 1
            at += len(before) + len(answer)
        free[row] = at
        n_branches += 1
        return True

    place([("caption", *ask(scene, "caption", rng))])
    misses = 0
    while misses < 4:
        dialogue = _dialogue(scene, rng, single)
        if dialogue and not place(dialogue):
            misses += 1
    return dict(pixels=pixels(scene), tokens=tokens, positions=positions, branch=branch, targets=targets,
                weights=weights, tasks=tasks, turns=turns, grounds=grounds, patches=patch_targets(scene, patch))  # fmt: skip


def collate(samples: list[dict[str, np.ndarray]]) -> Batch:
    """Stacks samples into a batch."""
    return Batch(**{k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]})


class Packed(torch.utils.data.Dataset):
    """Batch number i of an endless training set: scenes i * size to (i + 1) * size - 1.

    Args:
        size: scenes a batch.
        first, last: range of batch numbers.
        patch: pixels a side of a visual token.
    """

    def __init__(self, size: int, first: int, last: int, patch: int):
        self.size, self.first, self.last, self.patch = size, first, last, patch

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Batch:
        start = (self.first + index) * self.size
        return collate([sample(seed, "train", self.patch) for seed in range(start, start + self.size)])


class Patches(Packed):
    """As ``Packed``, pictures and patch targets only: ``(pixels, patches)``."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = (self.first + index) * self.size
        scenes = [make_scene(seed, "train") for seed in range(start, start + self.size)]
        return (
            torch.from_numpy(np.stack([pixels(s) for s in scenes])),
            torch.from_numpy(np.stack([patch_targets(s, self.patch) for s in scenes])),
        )
