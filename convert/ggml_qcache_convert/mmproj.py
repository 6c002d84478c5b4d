"""The mmproj GGUF: CLIP or SigLIP tower and projector as llama.cpp's mtmd reads them (architecture `clip`, projector `mlp`).

mtmd differs from Hugging Face in things that no key and no tensor can change:
- it puts the class token after the patches, but feeds indices for the class token first (ggml-org/llama.cpp#25814): patches
  get their neighbour's position embedding, the first is lost and the class token takes the last one's place. The file is
  written as CLIP has it; the runtime corrects the indices through mtmd's evaluation callback (tests/mtmd_encoder.py).
- it scales an image that isn't square to fit and pads it with the colour (122, 116, 104), while CLIPImageProcessor scales
  the short side to fit and cuts the middle out. Square images give the same embeddings.
- it gives the tiles of a LLaVA-NeXT or LLaVA-OneVision image one after the other, with the padding's tokens and without
  `image_newline`, and none but the overview for an image no larger than a tile. The runtime lets it encode single tiles
  and puts them together itself (python/ggml_qcache/anyres.py), by the keys written here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from .errors import ConversionError
from .hparams import VisionParams
from .jsonfile import read_json
from .outtypes import fitting_type
from .plan import OutputTensor, TensorPicker

_BICUBIC = 3
_SIGLIP_HEAD = (
    "vision.head.probe",
    *(f"vision.head.attention.in_proj_{part}" for part in ("weight", "bias")),
    *(
        f"vision.head.{part}.{suffix}"
        for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        for suffix in ("weight", "bias")
    ),
)


@dataclass(frozen=True)
class ImageParams:
    """How pixels are normalised, per channel, of values scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


LAYOUT_KEY, MAX_TILES_KEY = "qcache.vision.layout", "qcache.vision.max_tiles"


def read_image_params(directory: Path, vision: VisionParams, warnings: list[str]) -> ImageParams:
    """Reads the image processor's configuration and compares it with what mtmd does.

    Args:
        directory: The checkpoint directory.
        vision: The tower.
        warnings: Gets a remark about each difference that only loses accuracy.

    Raises:
        ConversionError: No configuration, or one that mtmd can't follow.
    """
    path = directory / "preprocessor_config.json"
    if not path.exists():
        path = directory / "processor_config.json"
    if not path.exists():
        raise ConversionError(
            f"{directory}: has neither preprocessor_config.json nor processor_config.json, "
            "so the pixel normalisation is unknown"
        )
    config = read_json(path)
    config = config.get("image_processor", config)
    if not isinstance(config, Mapping):
        raise ConversionError(f"{path}: image_processor must be an object, got {config!r}")
    for key in ("size", "crop_size"):
        for side in _sides(config.get(key)):
            if side != vision.image_size:
                raise ConversionError(
                    f"{path}: {key} {config[key]!r} differs from the tower's image_size {vision.image_size}; "
                    "mtmd scales to the tower's"
                )
    if vision.anyres is not None and (pinpoints := config.get("image_grid_pinpoints")) is not None:
        if pinpoints != [list(size) for size in vision.anyres.pinpoints]:
            raise ConversionError(f"{path}: image_grid_pinpoints {pinpoints!r} differ from those of config.json")
    if config.get("resample", _BICUBIC) != _BICUBIC:
        warnings.append(f"{path.name}: resample {config['resample']!r} isn't bicubic, which mtmd always uses")
    factor = config.get("rescale_factor", 1 / 255)
    if config.get("do_rescale", True) is not True or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise ConversionError(
            f"{path}: do_rescale {config.get('do_rescale')!r} with rescale_factor {factor!r} isn't supported; "
            "mtmd divides by 255"
        )
    if config.get("do_normalize", True) is not True:
        return ImageParams((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return ImageParams(
        _channels(path, config, "image_mean", zero=True), _channels(path, config, "image_std", zero=False)
    )


def _sides(size: Any) -> list[int]:
    """Side lengths a processor's size entry asks for: a number, or an object with shortest_edge or height and width."""
    if isinstance(size, Mapping):
        return [side for side in size.values() if isinstance(side, int)]
    return [size] if isinstance(size, int) else []


def _channels(path: Path, config: Mapping[str, Any], key: str, zero: bool) -> tuple[float, ...]:
    values = config.get(key)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(v, (int, float)) for v in values)
        or not all(np.isfinite(v) and (zero or v > 0) for v in values)
    ):
        raise ConversionError(f"{path}: {key} must be three{'' if zero else ' positive'} numbers, got {values!r}")
    return tuple(float(v) for v in values)


def vision_tensors(
    params: VisionParams, n_embd_text: int, picker: TensorPicker, wanted: GGMLQuantizationType
) -> list[OutputTensor]:
    """Plans the tensors of the mmproj GGUF.

    Args:
        params: The tower.
        n_embd_text: Width of the language model, which the projector ends in.
        picker: The checkpoint's tensors.
        wanted: Type of the weight matrices.

    Returns:
        The tensors in the order they are written.

    Raises:
        ConversionError: A tensor is missing or of another shape.
    """
    plan: list[OutputTensor] = []

    def add(name: str, source: str, shape: tuple[int, ...], matrix_type: GGMLQuantizationType = wanted) -> None:
        plan.append(OutputTensor(name, shape, fitting_type(shape, matrix_type), picker.take(source, shape)))

    def add_affine(kind: MODEL_TENSOR, source: str, shape: tuple[int, ...], layer: int = -1) -> None:
        name = TENSOR_NAMES[kind].format(bid=layer)
        add(name + ".weight", source + ".weight", shape)
        add(name + ".bias", source + ".bias", shape[:1])

    n_embd, n_ff = params.n_embd, params.n_ff
    n_side = params.image_size // params.patch_size
    # small, and every patch depends on them: always f32
    f32 = GGMLQuantizationType.F32
    if not params.siglip:
        add(TENSOR_NAMES[MODEL_TENSOR.V_ENC_EMBD_CLS], "vision.embeddings.class_embedding", (n_embd,))
    add(
        TENSOR_NAMES[MODEL_TENSOR.V_ENC_EMBD_PATCH] + ".weight",
        "vision.embeddings.patch_embedding.weight",
        (n_embd, 3, params.patch_size, params.patch_size),
        f32,
    )
    if params.siglip:
        add(TENSOR_NAMES[MODEL_TENSOR.V_ENC_EMBD_PATCH] + ".bias", "vision.embeddings.patch_embedding.bias", (n_embd,))
    add(
        TENSOR_NAMES[MODEL_TENSOR.V_ENC_EMBD_POS] + ".weight",
        "vision.embeddings.position_embedding.weight",
        (n_side * n_side + (not params.siglip), n_embd),
        f32,
    )
    if not params.siglip:
        # "pre_layrnorm" is transformers' own spelling
        add_affine(MODEL_TENSOR.V_PRE_NORM, "vision.pre_layrnorm", (n_embd,))
    up, down = MODEL_TENSOR.V_ENC_FFN_UP, MODEL_TENSOR.V_ENC_FFN_DOWN
    if n_ff == n_embd:
        # clip.cpp takes a down projection with n_embd inputs for one of an old converter that swapped the two, and swaps
        up, down = down, up
    for layer in range(params.n_layer):
        prefix = f"vision.encoder.layers.{layer}."
        add_affine(MODEL_TENSOR.V_ENC_INPUT_NORM, prefix + "layer_norm1", (n_embd,), layer)
        for kind, part in (
            (MODEL_TENSOR.V_ENC_ATTN_Q, "q_proj"),
            (MODEL_TENSOR.V_ENC_ATTN_K, "k_proj"),
            (MODEL_TENSOR.V_ENC_ATTN_V, "v_proj"),
            (MODEL_TENSOR.V_ENC_ATTN_O, "out_proj"),
        ):
            add_affine(kind, f"{prefix}self_attn.{part}", (n_embd, n_embd), layer)
        add_affine(MODEL_TENSOR.V_ENC_POST_ATTN_NORM, prefix + "layer_norm2", (n_embd,), layer)
        add_affine(up, prefix + "mlp.fc1", (n_ff, n_embd), layer)
        add_affine(down, prefix + "mlp.fc2", (n_embd, n_ff), layer)
    # the projector reads a layer's raw output; clip.cpp would apply this norm to it if the file had it
    picker.skip(("vision.post_layernorm.weight", "vision.post_layernorm.bias"))
    if params.siglip:
        picker.skip(_SIGLIP_HEAD)  # pools an image to one vector, which no LLaVA reads
    n_in = n_embd * len(params.feature_layers)
    if picker.has("projector.linear.weight"):
        return plan + _linear_projector(n_embd_text, n_in, picker, wanted)
    for index, source, shape in (
        (0, "projector.linear_1", (n_embd_text, n_in)),
        (2, "projector.linear_2", (n_embd_text, n_embd_text)),
    ):
        name = TENSOR_NAMES[MODEL_TENSOR.V_MMPROJ].format(bid=index)
        add(name + ".weight", source + ".weight", shape)
        if params.projector_bias:
            add(name + ".bias", source + ".bias", shape[:1])
        else:  # clip.cpp adds the bias unconditionally
            plan.append(OutputTensor(name + ".bias", shape[:1], f32, np.zeros(shape[0], np.float32)))
    if params.anyres is not None:
        add("v.image_newline", "image_newline", (n_embd_text,))
    return plan


def _linear_projector(n_out: int, n_in: int, picker: TensorPicker, wanted: GGMLQuantizationType) -> list[OutputTensor]:
    """A projector of one matrix in the form of mtmd's two with GELU between: gelu(x) - gelu(-x) = x, whichever form GELU has."""
    name = TENSOR_NAMES[MODEL_TENSOR.V_MMPROJ]
    first, second = name.format(bid=0), name.format(bid=2)
    f32 = GGMLQuantizationType.F32
    weight, bias = (picker.take(f"projector.linear.{part}", shape) for part, shape in (("weight", (n_out, n_in)), ("bias", (n_out,))))
    difference = np.hstack([np.eye(n_out), -np.eye(n_out)]).astype(np.float32 if wanted == f32 else np.float16)
    return [
        OutputTensor(f"{first}.weight", (2 * n_out, n_in), fitting_type((2 * n_out, n_in), wanted), weight, mirrored=True),
        OutputTensor(f"{first}.bias", (2 * n_out,), f32, bias, mirrored=True),
        OutputTensor(f"{second}.weight", difference.shape, wanted, difference),
        OutputTensor(f"{second}.bias", (n_out,), f32, np.zeros(n_out, np.float32)),
    ]


def add_vision_keys(
    writer: GGUFWriter, params: VisionParams, images: ImageParams, n_embd_text: int, name: str, file_type: LlamaFileType
) -> None:
    """Adds the keys mtmd reads."""
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(n_embd_text)
    writer.add_vision_image_size(params.image_size)
    writer.add_vision_patch_size(params.patch_size)
    writer.add_vision_embedding_length(params.n_embd)
    writer.add_vision_feed_forward_length(params.n_ff)
    writer.add_vision_block_count(params.n_layer)
    writer.add_vision_head_count(params.n_head)
    writer.add_vision_attention_layernorm_eps(params.norm_eps)
    writer.add_vision_image_mean(images.mean)
    writer.add_vision_image_std(images.std)
    # neither key means quick_gelu
    if params.act == "silu":
        writer.add_vision_use_silu(True)
    elif params.act != "quick_gelu":
        writer.add_vision_use_gelu(True)
    # always explicit: what clip.cpp takes without it depends on its version (ggml-org/llama.cpp#25817)
    writer.add_array("clip.vision.feature_layer", list(params.feature_layers))
    if params.anyres is not None:
        # width first, as mtmd takes them
        sizes = [side for height, width in params.anyres.pinpoints for side in (width, height)]
        writer.add_array("clip.vision.image_grid_pinpoints", sizes)
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        writer.add_string(LAYOUT_KEY, params.anyres.layout)
        if params.anyres.max_tiles:
            writer.add_uint32(MAX_TILES_KEY, params.anyres.max_tiles)
