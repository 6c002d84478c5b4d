"""mtmd through ctypes, for tests: images to embeddings, as stock or corrected by `qcache_mtmd_eval_callback`."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
from ggml_qcache.native import MtmdCorrection
from llama_cpp import mtmd_cpp as mtmd
from PIL import Image


class Encoder:
    """mtmd over an mmproj and a vocabulary-only text model, on the CPU."""

    def __init__(self, model: Path, mmproj: Path, n_embd: int, stock: bool) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        self.correction = MtmdCorrection()
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.print_timings, options.warmup = False, 1, False, False
        if not stock:
            options.cb_eval = ctypes.cast(self.correction.callback, type(options.cb_eval))
            options.cb_eval_user_data = self.correction.user_data
        self.context = mtmd.mtmd_init_from_file(str(mmproj).encode(), self.model, options)
        if not self.context:
            raise ValueError(f"mtmd doesn't load {mmproj}")
        self.n_embd = n_embd

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Embeddings [n_token, n_embd] of an image."""
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
        bitmap = mtmd.mtmd_bitmap_init(image.width, image.height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            prompt = mtmd.mtmd_default_marker()
            text = mtmd.mtmd_input_text(text=prompt, text_len=len(prompt), add_special=False, parse_special=True)
            if mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1) != 0:
                raise ValueError("mtmd_tokenize failed")
            parts = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
            (image_part,) = [
                part for part in parts if mtmd.mtmd_input_chunk_get_type(part) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
            ]
            if mtmd.mtmd_encode_chunk(self.context, image_part) != 0:
                raise ValueError("mtmd_encode_chunk failed")
            shape = (mtmd.mtmd_input_chunk_get_n_tokens(image_part), self.n_embd)
            return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), shape).copy()
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def close(self) -> None:
        mtmd.mtmd_free(self.context)
        llama_cpp.llama_model_free(self.model)


@contextmanager
def encoder(model: Path, mmproj: Path, n_embd: int, stock: bool = False) -> Iterator[Encoder]:
    """Opens an encoder.

    Args:
        model: Text GGUF, for its vocabulary.
        mmproj: Vision GGUF.
        n_embd: Width of the embeddings.
        stock: Leave the class token where llama.cpp puts it.
    """
    result = Encoder(model, mmproj, n_embd, stock)
    try:
        yield result
    finally:
        result.close()
