"""A tiny random LLaVA as GGUF files, built once a process, for the tests of the Python side."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from core_helpers import rewrite_gguf
from gguf import GGUFValueType
from hf_models import build_llava
from PIL import Image

from ggml_qcache import Llama
from ggml_qcache_convert import convert

N_LAYER = 8
LAZY_LAYERS = "2-3,5-7"
N_LAZY = 5
DROPPED_LAYERS = "2,4,7,drop:3,drop:5-6"
N_HEAD_KV = 2  # of 16 values
N_VISUAL = 16  # visual tokens an image

# places images as LLaVA's does, and takes plain text for an image as stock llama_cpp's handler gives it
TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class TinyLlava:
    """Paths of the files.

    Attributes:
        folder: Where they are; tests may add files of their own names.
        plain: f32 text model without lazy keys.
        visual: The same with lazy layers, visual mode.
        global_: Likewise in global mode, without the q and k weights of lazy layers.
        dropped: Visual mode, with layers that have no attention.
        mmproj: Vision model.
    """

    folder: Path
    plain: str
    visual: str
    global_: str
    dropped: str
    mmproj: str


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-llava-")


@functools.cache
def tiny_llava() -> TinyLlava:
    """Builds the files on first use."""
    folder = Path(_folder().name)
    checkpoint = folder / "checkpoint"
    build_llava(checkpoint, n_layer=N_LAYER)
    paths = {"mmproj": folder / "mmproj.gguf"}
    template = {"tokenizer.chat_template": (GGUFValueType.STRING, TEMPLATE)}
    kinds = {"plain": "none", "visual": LAZY_LAYERS, "global_": LAZY_LAYERS, "dropped": DROPPED_LAYERS}
    for name, layers in kinds.items():
        mode = "global" if name == "global_" else "visual"
        converted = folder / "converted.gguf"
        convert(checkpoint, converted, paths["mmproj"] if name == "plain" else None, "f32", layers, mode)
        paths[name] = rewrite_gguf(converted, folder / f"{name}.gguf", template)
    return TinyLlava(folder, **{name: str(path) for name, path in paths.items()})


def load(file: str = "plain", **arguments: Any) -> Llama:
    """Loads one of the files, or another by its path, with the mmproj, on one thread."""
    models = tiny_llava()
    defaults = {"mmproj_path": models.mmproj, "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
    return Llama(getattr(models, file, file), **{**defaults, **arguments})


def picture(seed: int = 0, width: int = 80, height: int = 60) -> Image.Image:
    """A picture of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(text: str, *images: Any) -> dict[str, Any]:
    """A user message: images first, then text."""
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ask(llm: Llama, messages: list[dict[str, Any]], max_tokens: int = 16, **arguments: Any) -> str:
    """The greedy answer to a conversation."""
    response = llm.create_chat_completion(messages, max_tokens=max_tokens, temperature=0.0, **arguments)
    return response["choices"][0]["message"]["content"]


def complete(llm: Any, prompt: str = "How many red squares", max_tokens: int = 24, **arguments: Any) -> str:
    """The greedy completion of a text."""
    return llm.create_completion(prompt, max_tokens=max_tokens, temperature=0.0, **arguments)["choices"][0]["text"]
