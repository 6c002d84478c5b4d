"""The vision encoder: libmtmd of llama.cpp, on an mmproj file beside a text model loaded for its vocabulary alone.

mtmd splits a prompt into runs of text tokens and images, preprocesses and encodes images; it never sees our decoder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Union

import llama_cpp.llama_cpp as llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp

from .anyres import Anyres
from .errors import InternalError, ModelError, UnsupportedError
from .images import LoadedImage
from .mmproj import mmproj_width, read_anyres
from .native import MtmdCorrection

# embeddings of the images seen last are kept, so that another question about them needs no encoder
EMBEDDING_CACHE_BYTES = 256 * 2**20

# mtmd rounds the shorter side of a narrower image to nothing
MAX_ASPECT = 100

_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_PIXEL = LoadedImage("placeholder", np.zeros((1, 1, 3), dtype=np.uint8), "")

_verbose = False
_log_errors: list[str] = []


@llama_cpp.llama_log_callback
def _on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    """Keeps mtmd's errors for our exceptions, and is silent otherwise unless verbose."""
    message = text.decode("utf-8", errors="replace")
    if level == _LOG_LEVEL_ERROR:
        _log_errors.append(message.strip())
    if _verbose:
        sys.stderr.write(message)


def _reason() -> str:
    """What mtmd logged as errors since the last call."""
    text = "; ".join(_log_errors) or "no reason given"
    _log_errors.clear()
    return text


class ImageChunk:
    """An image, or a piece of one, that the encoder turns into consecutive visual tokens.

    Attributes:
        n_tokens: Visual tokens.
        ids: ``[n_tokens]`` i32, all negative: they stand for the visual tokens where token ids are compared, and
            follow from the image's content, so that the same image is recognised in a later prompt or process.
        key: Digest of the image, and which of its pieces this is.
    """

    def __init__(self, key: tuple[str, int | str], n_tokens: int) -> None:
        self.key = key
        self.n_tokens = n_tokens
        bits = np.frombuffer(hashlib.shake_128(f"{key[0]}/{key[1]}".encode()).digest(4 * n_tokens), dtype="<u4")
        self.ids: npt.NDArray[np.int32] = ~(bits & 0x7FFFFFFF).astype(np.int32)


class MtmdChunk(ImageChunk):
    """A piece as mtmd cut it.

    Attributes:
        handle: ``mtmd_input_chunk *``.
    """

    def __init__(self, chunk: Any, key: tuple[str, int | str]) -> None:
        """Copies an ``mtmd_input_chunk *``."""
        super().__init__(key, mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk))
        self.handle = mtmd_cpp.mtmd_input_chunk_copy(chunk)
        weakref.finalize(self, mtmd_cpp.mtmd_input_chunk_free, self.handle)


class AnyresChunk(ImageChunk):
    """A whole image, its tiles put together here.

    Attributes:
        pixels: ``[height, width, 3]`` u8.
        tiled: Whether it is cut into tiles at all.
    """

    def __init__(self, image: LoadedImage, anyres: Anyres, tiled: bool) -> None:
        super().__init__((image.digest, "tiled" if tiled else "whole"), anyres.n_tokens(*image.pixels.shape[:2], tiled))
        self.pixels = image.pixels
        self.tiled = tiled


Chunk = Union["list[int]", ImageChunk]


class Vision:
    """An mmproj file, ready to encode images for a text model."""

    def __init__(
        self, path: str, vocab_model: Any, *, model_path: str, n_embd: int, n_threads: int, use_gpu: bool, verbose: bool
    ) -> None:
        """Loads an mmproj file.

        Args:
            path: The mmproj GGUF.
            vocab_model: ``llama_model *`` of the text model; its vocabulary is all that is used.
            model_path: File of the text model, for error texts.
            n_embd: Width of the text model. mtmd can't compare it: a vocabulary-only model has none.
            n_threads: Threads to encode with.
            use_gpu: Encode on the first GPU that llama.cpp has.
            verbose: Let mtmd log to stderr.

        Raises:
            FileError, ModelError: Missing or damaged, not an mmproj file, or of another width than the text model.
            UnsupportedError: No vision in it, or its images need attention or positions that the decoder hasn't got.
        """
        global _verbose
        self.path = path
        self.n_embd = n_embd
        self._embeddings: OrderedDict[tuple[str, int | str], npt.NDArray[np.float32]] = OrderedDict()
        width = mmproj_width(path)
        if width != n_embd:
            raise ModelError(
                f"the mmproj {path!r} gives embeddings of width {width}, the model {model_path!r} takes {n_embd}"
            )
        self._anyres = read_anyres(path, width)
        _verbose = verbose
        mtmd_cpp.mtmd_log_set(_on_log, None)
        mtmd_cpp.mtmd_helper_log_set(_on_log, None)
        params = mtmd_cpp.mtmd_context_params_default()
        params.print_timings = verbose
        params.n_threads = n_threads
        self.use_gpu = params.use_gpu = use_gpu
        params.warmup = False
        self._correction = MtmdCorrection()
        params.cb_eval = ctypes.cast(self._correction.callback, type(params.cb_eval))
        params.cb_eval_user_data = self._correction.user_data
        # without a warm-up pass nothing probes for flash attention, and on CPUs it is the slower path
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        _log_errors.clear()
        self._handle = mtmd_cpp.mtmd_init_from_file(os.fsencode(path), vocab_model, params)
        if not self._handle:
            raise ModelError(f"mtmd can't load the mmproj {path!r}: {_reason()}")
        self._free = weakref.finalize(self, mtmd_cpp.mtmd_free, self._handle)
        if not mtmd_cpp.mtmd_support_vision(self._handle):
            raise UnsupportedError(f"the mmproj {path!r} has no vision encoder")
        if mtmd_cpp.mtmd_decode_use_mrope(self._handle) or mtmd_cpp.mtmd_decode_use_non_causal(self._handle, None):
            raise UnsupportedError(f"the mmproj {path!r} needs multi-axis positions or non-causal attention")

    def close(self) -> None:
        """Frees the encoder. Closing twice is fine."""
        self._embeddings.clear()
        self._free()

    def tokenize(self, parts: Sequence[str | LoadedImage], add_special: bool) -> list[Chunk]:
        """Turns text and images into runs of token ids and image pieces, in order.

        Args:
            parts: Text and images of a prompt. Special tokens are recognised in text.
            add_special: Add BOS and EOS as the vocabulary wants them.

        Raises:
            ValueError: An image that mtmd can't preprocess.
        """
        images = [part for part in parts if isinstance(part, LoadedImage)]
        for image in images:
            height, width = image.pixels.shape[:2]
            if max(height, width) > MAX_ASPECT * min(height, width):
                raise ValueError(
                    f"image {image.source}: {width} x {height} pixels, one side is over {MAX_ASPECT} times the other"
                )
        if self._anyres is None:
            return self._mtmd_tokenize(parts, add_special)
        # mtmd finds the places alone: for an image of one pixel it makes one chunk
        tiled = self._anyres.tiled(len(images))
        whole = iter([AnyresChunk(image, self._anyres, tiled) for image in images])
        places = self._mtmd_tokenize([_PIXEL if isinstance(part, LoadedImage) else part for part in parts], add_special)
        return [next(whole) if isinstance(chunk, ImageChunk) else chunk for chunk in places]

    def _mtmd_tokenize(self, parts: Sequence[str | LoadedImage], add_special: bool) -> list[Chunk]:
        """Lets mtmd cut a prompt into chunks."""
        images = [part for part in parts if isinstance(part, LoadedImage)]
        bitmaps: list[Any] = []
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            c_parts = []
            for part in parts:
                c_part = mtmd_cpp.mtmd_input_part()
                if isinstance(part, LoadedImage):
                    bitmaps.append(_bitmap(part, len(bitmaps)))
                    c_part.bitmap = bitmaps[-1]
                else:
                    data = part.encode("utf-8")
                    text = mtmd_cpp.mtmd_input_text(text=data, text_len=len(data), parse_special=True)
                    c_part.text = ctypes.pointer(text)
                c_parts.append(ctypes.pointer(c_part))
            array = (ctypes.POINTER(mtmd_cpp.mtmd_input_part) * len(c_parts))(*c_parts)
            _log_errors.clear()
            if mtmd_cpp.mtmd_tokenize_from_parts(self._open(), chunks, array, len(c_parts), add_special) != 0:
                raise ValueError(f"images {', '.join(image.source for image in images)}: {_reason()}")
            return _take(chunks, images)
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                mtmd_cpp.mtmd_bitmap_free(bitmap)

    def encode(self, chunk: ImageChunk) -> npt.NDArray[np.float32]:
        """Gives the embeddings of an image piece, ``[n_tokens, n_embd]`` f32; not to be written to.

        Raises:
            InternalError: The encoder failed.
        """
        known = self._embeddings.get(chunk.key)
        if known is not None:
            self._embeddings.move_to_end(chunk.key)
            return known
        if isinstance(chunk, AnyresChunk):
            tiles = self._anyres.tiles(chunk.pixels, chunk.tiled)
            encoded = [self._mtmd_encode(self._tile(pixels)) for pixels in tiles]
            embeddings = self._anyres.arrange(np.stack(encoded), *chunk.pixels.shape[:2], chunk.tiled)
        else:
            embeddings = self._mtmd_encode(chunk)
        self._embeddings[chunk.key] = embeddings
        while sum(kept.nbytes for kept in self._embeddings.values()) > EMBEDDING_CACHE_BYTES and len(self._embeddings) > 1:
            self._embeddings.popitem(last=False)
        return embeddings

    def _tile(self, pixels: npt.NDArray[np.uint8]) -> MtmdChunk:
        """Hands a tile to mtmd, which leaves an image of the tower's own size as it is."""
        (chunk,) = self._mtmd_tokenize([LoadedImage("tile", np.ascontiguousarray(pixels), "tile")], False)
        return chunk

    def _mtmd_encode(self, chunk: MtmdChunk) -> npt.NDArray[np.float32]:
        """Gives the embeddings of a piece, ``[n_tokens, n_embd]``."""
        _log_errors.clear()
        if mtmd_cpp.mtmd_encode_chunk(self._open(), chunk.handle) != 0:
            raise InternalError(f"mtmd can't encode an image: {_reason()}")
        output = mtmd_cpp.mtmd_get_output_embd(self._handle)
        return np.ctypeslib.as_array(output, shape=(chunk.n_tokens, self.n_embd)).copy()

    def _open(self) -> Any:
        if not self._free.alive:
            raise ValueError(f"the mmproj {self.path!r} is closed")
        return self._handle


def _bitmap(image: LoadedImage, index: int) -> Any:
    """Makes an ``mtmd_bitmap *``; its id says which image of the prompt it is."""
    height, width = image.pixels.shape[:2]
    data = image.pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, data)
    mtmd_cpp.mtmd_bitmap_set_id(bitmap, str(index).encode())
    return bitmap


def _take(chunks: Any, images: Sequence[LoadedImage]) -> list[Chunk]:
    """Copies mtmd's chunks."""
    taken: list[Chunk] = []
    pieces = [0] * len(images)
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            n_tokens = ctypes.c_size_t()
            tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n_tokens))
            taken.append(tokens[: n_tokens.value])
        else:
            index = int(mtmd_cpp.mtmd_input_chunk_get_id(chunk))
            taken.append(MtmdChunk(chunk, (images[index].digest, pieces[index])))
            pieces[index] += 1
    return taken
