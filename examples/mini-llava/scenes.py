"""Deterministic scenes of coloured shapes and handwritten digits, with questions and captions.

A scene is drawn on a 96x96 canvas divided into a 3x3 grid of named places; three to seven of the nine places
hold one object each, jittered inside its cell. Everything follows from ``(seed, split)``: the same pair gives
the same scene, picture and caption on every machine. Handwritten digits come from scikit-learn's bundled set;
the ``heldout`` split draws from digit images and seeds that the ``train`` split never sees.

    scene = make_scene(7, "heldout")
    image = render(scene)                                   # PIL image, RGB, 96x96
    for task, question, answer in questions(scene, random.Random(0)):
        ...
    text = caption(scene)
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
CELL = IMAGE_SIZE // 3

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 210, 30),
    "purple": (140, 60, 190),
    "orange": (250, 130, 20),
}
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")

CLOSED_TASKS = ("existence", "counting", "colour", "relation", "digit")
TASKS = CLOSED_TASKS + ("caption",)
SPLITS = ("train", "heldout")

CAPTION_QUESTIONS = (
    "Describe the image.",
    "What is in the picture?",
    "Describe everything you see.",
    "List all objects in the image.",
)

_HELDOUT_DIGITS = 360  # of 1797; chosen by a seeded shuffle, since the set repeats 0..9 in order
_SUPERSAMPLE = 4
_RADIUS = {"small": (5.5, 7.0), "large": (11.5, 13.5)}  # pixels, before supersampling


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        kind: one of ``SHAPES``, or ``"digit"``.
        place: index into ``PLACES`` (row-major, 0..8).
        x, y: centre in pixels.
        radius: half of the extent in pixels.
        colour: key of ``COLOURS``; None for a digit.
        size: one of ``SIZES``; None for a digit.
        rgb: the jittered ink, 0..255.
        value: the digit, 0..9; None for a shape.
        sample: row of scikit-learn's digit images; None for a shape.
        angle: rotation in degrees.
    """

    kind: str
    place: int
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]
    colour: str | None = None
    size: str | None = None
    value: int | None = None
    sample: int | None = None
    angle: float = 0.0

    @property
    def is_digit(self) -> bool:
        return self.kind == "digit"

    @property
    def row(self) -> int:
        return self.place // 3

    @property
    def column(self) -> int:
        return self.place % 3

    def phrase(self) -> str:
        """The object as a caption names it: ``a large red circle`` or ``the digit 7``."""
        if self.is_digit:
            return f"the digit {self.value}"
        return f"a {self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A picture to be: its objects in row-major order of place, and the paper they lie on."""

    seed: int
    split: str
    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    noise_seed: int

    @property
    def shapes(self) -> list[Thing]:
        return [t for t in self.things if not t.is_digit]

    @property
    def digits(self) -> list[Thing]:
        return [t for t in self.things if t.is_digit]


@functools.lru_cache(maxsize=1)
def _digit_set() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """scikit-learn's digits: images [1797, 8, 8] in 0..1, labels [1797], and the rows of each split."""
    from sklearn.datasets import load_digits  # slow to import, needed only here

    bunch = load_digits()
    rows = list(range(len(bunch.target)))
    random.Random("digits").shuffle(rows)
    split = {"heldout": np.array(rows[:_HELDOUT_DIGITS]), "train": np.array(rows[_HELDOUT_DIGITS:])}
    return bunch.images / 16.0, bunch.target, split


def make_scene(seed: int, split: str = "train") -> Scene:
    """Draws a scene from a seed.

    Args:
        seed: any non-negative integer.
        split: ``"train"`` or ``"heldout"``; the two never share a random stream or a digit image.

    Returns:
        A scene of three to seven objects, one or two of them digits.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = random.Random(f"{split}:{seed}")
    _, labels, rows = _digit_set()

    n_things = rng.randint(3, 7)
    n_digits = rng.choice((1, 1, 2))
    places = sorted(rng.sample(range(9), n_things))
    digit_places = set(rng.sample(places, n_digits))
    # few colours or few kinds in half of the scenes, else counts above one would be rare
    colours = rng.sample(sorted(COLOURS), rng.choice((2, 3, 6, 6)))
    kinds = rng.sample(SHAPES, rng.choice((2, 3, 4, 4)))

    things = []
    for place in places:
        cx, cy = (place % 3 + 0.5) * CELL, (place // 3 + 0.5) * CELL
        if place in digit_places:
            sample = int(rng.choice(rows[split]))
            ink = rng.randint(0, 60)
            radius = rng.uniform(10.5, 13.0)
            slack = CELL / 2 - radius - 0.5
            things.append(Thing("digit", place, cx + rng.uniform(-slack, slack), cy + rng.uniform(-slack, slack),
                                radius, (ink, ink, ink), value=int(labels[sample]), sample=sample))  # fmt: skip
            continue
        size, colour, kind = rng.choice(SIZES), rng.choice(colours), rng.choice(kinds)
        radius = rng.uniform(*_RADIUS[size])
        slack = min(CELL / 2 - radius - 0.5, 6.0)
        rgb = tuple(min(255, max(0, c + rng.randint(-16, 16))) for c in COLOURS[colour])
        things.append(Thing(kind, place, cx + rng.uniform(-slack, slack), cy + rng.uniform(-slack, slack),
                            radius, rgb, colour=colour, size=size, angle=rng.uniform(-12, 12)))  # fmt: skip
    level = rng.randint(222, 250)
    background = tuple(min(255, level + rng.randint(-5, 5)) for _ in range(3))
    return Scene(seed, split, tuple(things), background, rng.getrandbits(32))


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a polygonal shape in pixels."""
    if thing.kind == "square":
        turns, radii = np.arange(4) / 4 + 1 / 8, np.full(4, 1.22)
    elif thing.kind == "triangle":
        turns, radii = np.arange(3) / 3, np.full(3, 1.15)
    else:
        turns, radii = np.arange(10) / 10, np.where(np.arange(10) % 2 == 0, 1.15, 0.48)
    angle = 2 * np.pi * turns + np.deg2rad(thing.angle)
    x = thing.x + thing.radius * radii * np.sin(angle)
    y = thing.y - thing.radius * radii * np.cos(angle)
    return list(zip(x.tolist(), y.tolist()))


def render(scene: Scene) -> Image.Image:
    """Paints a scene.

    Returns:
        An RGB image of ``IMAGE_SIZE`` x ``IMAGE_SIZE`` pixels.
    """
    k = _SUPERSAMPLE
    canvas = Image.new("RGB", (IMAGE_SIZE * k, IMAGE_SIZE * k), scene.background)
    draw = ImageDraw.Draw(canvas)
    for t in scene.things:
        box = [k * (t.x - t.radius), k * (t.y - t.radius), k * (t.x + t.radius), k * (t.y + t.radius)]
        if t.is_digit:
            side = round(2 * t.radius * k)
            grey = Image.fromarray((_digit_set()[0][t.sample] * 255).astype(np.uint8))
            canvas.paste(t.rgb, (round(box[0]), round(box[1])), grey.resize((side, side), Image.Resampling.BICUBIC))
        elif t.kind == "circle":
            draw.ellipse(box, fill=t.rgb)
        else:
            draw.polygon([(x * k, y * k) for x, y in _outline(t)], fill=t.rgb)
    small = np.asarray(canvas.reduce(k), dtype=np.float32)
    noise = np.random.default_rng(scene.noise_seed).normal(0.0, 4.0, small.shape)
    return Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))


def caption(scene: Scene) -> str:
    """Names every object of a scene, row by row.

    The order and wording are fixed, so an exact match is meaningful.
    """
    shapes, digits = len(scene.shapes), len(scene.digits)
    counts = f"There {'is' if shapes == 1 else 'are'} {shapes} shape{'s' * (shapes != 1)}"
    counts += f" and {digits} digit{'s' * (digits != 1)}."
    return " ".join([counts] + [f"At the {PLACES[t.place]} there is {t.phrase()}." for t in scene.things])


# --- questions ---------------------------------------------------------------------------------------------


def _matches(scene: Scene, size: str | None, colour: str | None, kind: str | None) -> list[Thing]:
    """The shapes that fit every attribute given."""
    return [
        t
        for t in scene.shapes
        if size in (None, t.size) and colour in (None, t.colour) and kind in (None, t.kind)
    ]


def _noun(size: str | None, colour: str | None, kind: str | None, plural: bool = False) -> str:
    words = [w for w in (size, colour, kind or "shape") if w]
    return " ".join(words) + ("s" if plural else "")


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _unique_name(scene: Scene, thing: Thing, rng: random.Random, with_colour: bool) -> str | None:
    """A description that fits this object and no other, or None where there is none."""
    options = [(None, None, thing.kind), (thing.size, None, thing.kind)]
    if with_colour:
        options += [(None, thing.colour, thing.kind)] * 2 + [(thing.size, thing.colour, thing.kind)]
        options += [(None, thing.colour, None)]
    rng.shuffle(options)
    for option in options:
        if len(_matches(scene, *option)) == 1:
            return _noun(*option)
    return None


def _existence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    present = rng.random() < 0.5
    template = rng.choice(("Is there {}?", "Is there {} in the image?", "Can you see {}?"))
    if rng.random() < 0.15:
        values = {t.value for t in scene.digits}
        value = rng.choice(sorted(values if present else set(range(10)) - values))
        return template.format(f"the digit {value}"), "yes" if present else "no"
    for _ in range(100):
        anchor = rng.choice(scene.shapes)
        size, colour, kind = anchor.size, anchor.colour, anchor.kind
        if not present:
            # half of the absent ones mix attributes that are all in the scene, so words alone tell nothing
            if rng.random() < 0.5:
                colour, kind = rng.choice(scene.shapes).colour, rng.choice(scene.shapes).kind
                size = rng.choice(scene.shapes).size
            else:
                colour, kind = rng.choice(sorted(COLOURS)), rng.choice(SHAPES)
        form = rng.random()
        size = size if form < 0.3 else None
        colour = colour if form < 0.9 else None
        kind = kind if form < 0.8 or form >= 0.9 else None
        if bool(_matches(scene, size, colour, kind)) == present:
            return template.format(_with_article(_noun(size, colour, kind))), "yes" if present else "no"
    # no absent combination was met: a digit always has absent values
    value = rng.choice(sorted(set(range(10)) - {t.value for t in scene.digits}))
    return template.format(f"the digit {value}"), "no"


def _counting(scene: Scene, rng: random.Random) -> tuple[str, str]:
    template = rng.choice(("How many {} are there?", "How many {} are in the image?", "How many {} do you see?"))
    if rng.random() < 0.08:
        return template.format("digits"), str(len(scene.digits))
    while True:
        anchor = rng.choice(scene.shapes)
        colour, kind = anchor.colour, anchor.kind
        if rng.random() < 0.25:
            colour, kind = rng.choice(sorted(COLOURS)), rng.choice(SHAPES)
        forms = [(None, colour, kind), (None, colour, None), (None, None, kind), (anchor.size, None, None),
                 (anchor.size, None, kind), (None, None, None)]  # fmt: skip
        form = rng.choices(forms, weights=(3, 3, 3, 1, 1, 1))[0]
        count = len(_matches(scene, *form))
        # one is by far the most common count: half of it is drawn again
        if count != 1 or rng.random() < 0.5:
            return template.format(_noun(*form, plural=True)), str(count)


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    template = rng.choice(("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"))
    for thing in rng.sample(scene.shapes, len(scene.shapes)):
        name = _unique_name(scene, thing, rng, with_colour=False)
        if name is None or rng.random() < 0.25:
            name = f"shape at the {PLACES[thing.place]}"
        return template.format(name), thing.colour
    return None


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    for _ in range(20):
        if len(scene.things) < 2:
            return None
        first, second = rng.sample(scene.things, 2)
        names = [
            f"digit {t.value}" * (sum(d.value == t.value for d in scene.digits) == 1)
            if t.is_digit
            else _unique_name(scene, t, rng, with_colour=True)
            for t in (first, second)
        ]
        axes = [a for a, differs in (("x", first.column != second.column), ("y", first.row != second.row)) if differs]
        if not all(names):
            continue
        axis = rng.choice(axes)
        holds = first.column < second.column if axis == "x" else first.row < second.row
        true_word, false_word = ("left of", "right of") if axis == "x" else ("above", "below")
        if not holds:
            true_word, false_word = false_word, true_word
        yes = rng.random() < 0.5
        word = true_word if yes else false_word
        return f"Is the {names[0]} {word} the {names[1]}?", "yes" if yes else "no"
    return None


def _digit(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.digits)
    template = rng.choice(("Which digit is at the {}?", "What number is at the {}?", "Read the digit at the {}."))
    return template.format(PLACES[thing.place]), str(thing.value)


_MAKERS = {
    "existence": _existence,
    "counting": _counting,
    "colour": _colour,
    "relation": _relation,
    "digit": _digit,
}


def ask(scene: Scene, task: str, rng: random.Random) -> tuple[str, str] | None:
    """One question of a given task.

    Returns:
        ``(question, answer)``, or None where the scene allows no unambiguous question of that task.
    """
    if task == "caption":
        return rng.choice(CAPTION_QUESTIONS), caption(scene)
    return _MAKERS[task](scene, rng)


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """One question of every task that the scene allows, the caption last.

    Args:
        scene: the scene.
        rng: source of choices; the same state gives the same questions.

    Returns:
        A list of ``(task, question, answer)``.
    """
    asked = ((task, ask(scene, task, rng)) for task in TASKS)
    return [(task, *pair) for task, pair in asked if pair]


_MENTION = re.compile(
    rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|shape)s?\b(?! at the)"
    r"|digit (\d)|(digits)\b"
)


def mentions(scene: Scene, question: str) -> list[tuple[int, list[Thing]]]:
    """The objects that a question speaks of.

    Returns:
        For each noun phrase, where it ends in the question and the objects that fit it, none to all.
    """
    found = []
    for m in _MENTION.finditer(question):
        size, colour, kind, value, digits = m.groups()
        if digits:
            things = scene.digits
        elif value:
            things = [t for t in scene.digits if t.value == int(value)]
        else:
            things = _matches(scene, size, colour, None if kind == "shape" else kind)
        found.append((m.end(), things))
    return found


def auxiliary(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A training-only question that binds places and objects: what is where, and where is what."""
    thing = rng.choice(scene.things)
    form = rng.random()
    if form < 0.2:
        place = rng.choice(PLACES)
        inside = [t for t in scene.things if PLACES[t.place] == place]
        return f"What is at the {place}?", inside[0].phrase() if inside else "nothing"
    if form < 0.5:
        return f"What is at the {PLACES[thing.place]}?", thing.phrase()
    if thing.is_digit:
        name = f"digit {thing.value}" if sum(d.value == thing.value for d in scene.digits) == 1 else None
    else:
        name = _unique_name(scene, thing, rng, with_colour=True)
    if name is None:
        return f"What is at the {PLACES[thing.place]}?", thing.phrase()
    return f"Where is the {name}?", f"at the {PLACES[thing.place]}"
