"""What calibration runs on: images, prompts about them, and the untouched model's own answers."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConversionError

if TYPE_CHECKING:
    from ggml_qcache import Llama

PROMPTS = (
    "Describe the image.",
    "What is in the picture?",
    "Describe everything you see.",
    "How many objects are there?",
    "What colour is the largest object?",
)
_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """A prompt with its greedy answer, as rows of the decoder.

    Attributes:
        tokens: ``[n]`` i32, -1 for a visual token.
        embeddings: ``[n, n_embd]`` f32; read where there is no token.
        visual: ``[n]`` bool.
        rows: The rows that are looked at, ascending; all that predict a token of the answer are among them.
        answer_rows: ``[len(rows)]`` bool: which of them predict a token of the answer.
    """

    tokens: npt.NDArray[np.int32]
    embeddings: npt.NDArray[np.float32]
    visual: npt.NDArray[np.bool_]
    rows: npt.NDArray[np.int64]
    answer_rows: npt.NDArray[np.bool_]


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder, by name.

    Raises:
        ConversionError: No such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder}: isn't a directory with calibration images")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not images:
        raise ConversionError(f"{folder}: has no images ({', '.join(_SUFFIXES)})")
    return images


def choose_pairs(images: Sequence[Any], prompts: Sequence[str], n_samples: int, seed: int) -> list[tuple[Any, str]]:
    """Pairs images with prompts: every image once before any is used again, then with another prompt.

    Returns:
        ``n_samples`` pairs, fewer where there aren't as many different ones.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(list(images), len(images))
    asked = [rng.sample(list(prompts), len(prompts)) for _ in shuffled]
    pairs = [(image, asked[i][turn]) for turn in range(len(prompts)) for i, image in enumerate(shuffled)]
    return pairs[:n_samples]


def make_samples(
    llm: "Llama", pairs: Sequence[tuple[Any, str]], n_answer: int, n_other_rows: int, seed: int
) -> Iterator[Sample]:
    """Asks the model and lays out what it read and answered.

    Args:
        llm: The untouched model, with its mmproj.
        pairs: Images (whatever ``image_url`` takes, or a path) and prompts.
        n_answer: Longest answer in tokens.
        n_other_rows: Rows of the prompt that are looked at beside those of the answer, half of them visual.
        seed: Seed of their choice.
    """
    rng = np.random.default_rng(seed)
    for image, prompt in pairs:
        url = str(image) if isinstance(image, Path) else image
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        message = {"role": "user", "content": content}
        reply = llm.create_chat_completion([message], temperature=0.0, max_tokens=n_answer)
        tokens, embeddings = llm.evaluated_rows()
        first = min(reply["usage"]["prompt_tokens"], len(tokens)) - 1
        visual = tokens < 0
        after_image = np.flatnonzero(visual[:first])[-1] + 1 if visual[:first].any() else 0
        chosen = [np.arange(first, len(tokens))]
        for candidates in (np.flatnonzero(visual[:first]), np.arange(after_image, first)):
            n = min(len(candidates), n_other_rows // 2)
            chosen.append(rng.choice(candidates, n, replace=False) if n else candidates[:0])
        rows = np.sort(np.concatenate(chosen))
        yield Sample(np.where(visual, -1, tokens), embeddings, visual, rows, rows >= first)
