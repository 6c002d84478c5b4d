"""LLaVA-NeXT and LLaVA-OneVision: the visual tokens of images of many shapes against Hugging Face's processors and models."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from core_helpers import rewrite_gguf
from gguf import GGUFReader, GGUFValueType
from hf_models import IMAGE_SIZE, NEXT_PINPOINTS, SIGLIP_SIZE, build_llava, image_processor
from mtmd_encoder import encoder
from test_vision import cosines, picture
from transformers import PreTrainedModel
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from ggml_qcache import Llama
from ggml_qcache.anyres import Anyres
from ggml_qcache.errors import ModelError, UnsupportedError
from ggml_qcache.images import ImageLoader
from ggml_qcache.inspection import inspect_file
from ggml_qcache.vision import AnyresChunk, ImageChunk
from ggml_qcache_convert import convert

FAMILIES = {"llava_next": {}, "llava_onevision": {"text": "qwen2", "tokenizer": "qwen2", "tied": True}}
# width and height: square, larger and smaller than a tile, wide, tall, odd, extreme, one pixel
SHAPES = [
    *((56, 56), (112, 112), (300, 300), (200, 100), (100, 200), (333, 111), (77, 401)),
    *((60, 59), (31, 17), (640, 427), (999, 37), (37, 999), (1, 1)),
]
PINPOINTS = "clip.vision.image_grid_pinpoints"


class Tiny:
    """A tiny model of a family: in PyTorch and as files."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family = family
        self.model = build_llava(folder / "hf", family, n_layer=2, **FAMILIES[family])
        self.text, self.mmproj = folder / "m.gguf", folder / "mm.gguf"
        convert(folder / "hf", self.text, self.mmproj, "f32")

    def load(self, **arguments: object) -> Llama:
        return Llama(str(self.text), mmproj_path=str(self.mmproj), n_ctx=1024, n_threads=1, n_threads_batch=1, **arguments)

    def expected(self, images: list[object]) -> list[np.ndarray]:
        """What Hugging Face makes of the images of one prompt, ``[n_tokens, n_embd]`` each."""
        return hf_visual(self.model, self.family, images)


def hf_visual(model: PreTrainedModel, family: str, images: list[object]) -> list[np.ndarray]:
    """Embeddings of the images of one prompt by Hugging Face's processor and model."""
    inputs = image_processor(family)([images] if family == "llava_onevision" else images, return_tensors="pt")
    extra = {}
    if family == "llava_onevision":
        extra["batch_num_images"] = torch.as_tensor(inputs["batch_num_images"])
    with torch.no_grad():
        out = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], **extra)
    return [features.numpy() for features in out.pooler_output]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llm(tiny: Tiny):
    with contextlib.closing(tiny.load()) as llm:
        yield llm


def chunks_of(llm: Llama, images: list[object]) -> list[ImageChunk]:
    """The images of a prompt as the runtime sees them."""
    parts = [part for image in images for part in ("x", ImageLoader().load(image))]
    return [chunk for chunk in llm._vision.tokenize(parts, True) if isinstance(chunk, ImageChunk)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_visual_tokens_equal_hugging_face(tiny: Tiny, llm: Llama, shape: tuple[int, int]) -> None:
    image = picture(*shape, seed=1) if min(shape) > 8 else picture(9, 9, 1).resize(shape)
    (chunk,), (expected,) = chunks_of(llm, [image]), tiny.expected([image])
    got = llm._vision.encode(chunk)
    assert chunk.n_tokens == len(got) == len(expected)
    assert cosines(got, expected).min() >= 0.999


def test_visual_tokens_of_several_images(tiny: Tiny, llm: Llama) -> None:
    """LLaVA-OneVision cuts an image only where it is the only one; LLaVA-NeXT always."""
    images = [picture(200, 100, 1), picture(50, 90, 2), picture(112, 112, 3)]
    chunks, expected = chunks_of(llm, images), tiny.expected(images)
    for chunk, embeddings in zip(chunks, expected, strict=True):
        assert chunk.tiled is (tiny.family == "llava_next")
        assert cosines(llm._vision.encode(chunk), embeddings).min() >= 0.999
    # the same image alone isn't mistaken for it
    (alone,) = chunks_of(llm, images[:1])
    assert (alone.key == chunks[0].key) is (tiny.family == "llava_next")


def test_answers_equal_hugging_face(tiny: Tiny, llm: Llama) -> None:
    """Logits of a prompt with a tiled image, through the whole of either implementation."""
    image = picture(170, 90, 4)
    before, after = "USER: ", "\nHow many red squares are there? ASSISTANT:"
    parts = llm._vision.tokenize([before, ImageLoader().load(image), after], True)
    ids = [id for chunk in parts for id in (chunk.ids.tolist() if isinstance(chunk, ImageChunk) else chunk)]
    llm.reset()
    llm._images = [(len(parts[0]), parts[1])]
    llm.eval(ids)
    (visual,) = tiny.expected([image])
    with torch.no_grad():
        look_up = tiny.model.get_input_embeddings()
        first, last = (look_up(torch.tensor(part)) for part in (parts[0], parts[2]))
        inputs = torch.cat([first, torch.from_numpy(visual), last])[None]
        expected = tiny.model.lm_head(tiny.model.model.language_model(inputs_embeds=inputs).last_hidden_state)[0, -1].numpy()
    error = ((llm.scores[0] - expected) ** 2).mean() / (expected**2).mean()
    print(f"NMSE {error:.2e}")
    assert error <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_at_real_sizes(family: str) -> None:
    """Tokens of the released models' images, by Hugging Face's processors."""
    newline = np.zeros(1, np.float32)
    if family == "llava_next":
        counter = LlavaNextProcessor.__new__(LlavaNextProcessor)
        counter.image_processor, counter.patch_size, counter.num_additional_image_tokens = LlavaNextImageProcessorPil(), 14, 0
        side, anyres = 336, Anyres(336, 24, tuple(map(tuple, counter.image_processor.image_grid_pinpoints)), newline)
    else:
        counter = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        counter.image_processor, counter.num_image_tokens = LlavaOnevisionImageProcessorPil(), 729
        counter.vision_aspect_ratio = "anyres_max_9"
        side, anyres = 384, Anyres(384, 27, tuple(map(tuple, counter.image_processor.image_grid_pinpoints)), newline, 9, (0, 0, 0))
    rng = np.random.default_rng(3)
    sizes = [(336, 672), (336, 336), (1080, 1920), (1000, 30), (4000, 3000), *rng.integers(20, 3000, (200, 2)).tolist()]
    counts = {size: anyres.n_tokens(*size, True) for size in map(tuple, sizes)}
    assert counts == {size: counter._get_number_of_features(*size, side, side) for size in counts}
    assert counts[336, 672] == (1752 if family == "llava_next" else 2214)


def test_file_in_stock_mtmd(tiny: Tiny) -> None:
    """The file loads there; an image of a tile's size is encoded as its overview."""
    side = SIGLIP_SIZE if tiny.family == "llava_onevision" else IMAGE_SIZE
    image = picture(side, side, 6)
    with encoder(tiny.text, tiny.mmproj, 64) as encode:
        overview = encode(image)
    assert cosines(overview, tiny.expected([image])[0][: len(overview)]).min() >= 0.999


def test_stock_mtmd_tiles_otherwise(tiny: Tiny, llm: Llama) -> None:
    """Why the runtime puts tiles together itself; fails once mtmd does as Hugging Face."""
    image = picture(150, 61, 2)
    (mine,) = chunks_of(llm, [image])
    stock = llm._vision._mtmd_tokenize([ImageLoader().load(image)], False)
    assert len(stock) == 1 + len(llm._vision._anyres.tiles(np.asarray(image), True)[1:])
    assert sum(chunk.n_tokens for chunk in stock) != mine.n_tokens


def test_inspect(tiny: Tiny) -> None:
    facts = inspect_file(str(tiny.mmproj))
    assert (facts["visual_tokens_per_tile"], facts["tiles_per_image_max"]) == (16, 5 if tiny.family == "llava_next" else 10)
    assert "visual_tokens_per_image" not in facts


def test_files_of_llama_cpp_s_converter(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without our key, and the newline under its older name, a `spatial_unpad` file is LLaVA-NeXT's."""
    folder = tmp_path_factory.mktemp("theirs")
    tiny = Tiny(folder, "llava_next")
    newline = next(tensor.data for tensor in GGUFReader(tiny.mmproj).tensors if tensor.name == "v.image_newline").copy()
    renamed = {"v.image_newline": None, "model.image_newline": newline}
    tiny.mmproj = rewrite_gguf(tiny.mmproj, folder / "theirs.gguf", {"qcache.vision.layout": None}, renamed)
    image = picture(130, 70, 2)
    with contextlib.closing(tiny.load()) as llm:
        (chunk,) = chunks_of(llm, [image])
        assert isinstance(chunk, AnyresChunk)
        assert cosines(llm._vision.encode(chunk), tiny.expected([image])[0]).min() >= 0.999


@pytest.mark.parametrize(
    ("keys", "tensors", "error", "reason"),
    [
        ({"qcache.vision.layout": (GGUFValueType.STRING, "spiral")}, {}, UnsupportedError, "layout 'spiral'"),
        ({PINPOINTS: (GGUFValueType.ARRAY, np.array([56, 57], np.int32))}, {}, ModelError, rf"{PINPOINTS}.*\[56, 57\]"),
        ({PINPOINTS: (GGUFValueType.ARRAY, np.array([60 * 56, 60 * 56 * 100], np.int32))}, {}, ModelError, f"{PINPOINTS}.*256 tiles"),
        ({PINPOINTS: None}, {}, ModelError, f"{PINPOINTS}.*None"),
        ({}, {"v.image_newline": None}, ModelError, "no tensor 'v.image_newline'"),
        ({}, {"v.image_newline": np.zeros(3, np.float32)}, ModelError, "3 values in 'v.image_newline', expected 64"),
    ],
)
def test_damaged_layouts(tiny: Tiny, tmp_path: Path, keys: dict, tensors: dict, error: type[Exception], reason: str) -> None:
    path = rewrite_gguf(tiny.mmproj, tmp_path / "mm.gguf", keys, tensors)
    with pytest.raises(error, match=reason):
        Llama(str(tiny.text), mmproj_path=str(path), n_ctx=64)
