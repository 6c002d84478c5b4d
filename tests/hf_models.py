"""Tiny random LLaVA checkpoints in every layout the converter reads, built through transformers and tokenizers.

Nothing is downloaded: tokenizers are trained on a few lines of text, weights are random from a fixed seed that is printed.
"""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.tokenization_utils_base import generate_merges

CORPUS = (
    "How many red squares are there in the image? There are two red squares and one blue circle.",
    "Is the green triangle left of the yellow circle? Yes, it is to the left. No, it isn't; they'll say we've seen I'd.",
    "The picture shows a large purple square at the top, a small orange triangle below it, and the digit 7 on the right.",
    "USER: Describe the image in detail. ASSISTANT: The scene contains 3 circles, 12 squares and 456 triangles.",
    "def count(shapes):\n    return sum(1 for s in shapes if s.colour == 'red')\n\n\n\t# 2024-01-31",
    "Grüße aus Köln, naïve café, déjà vu, Ελληνικά, русский язык, 日本語のテキスト, 中文文本, 한국어, العربية.",
)
AWKWARD = (
    "Hello world",
    " leading space",
    "two  spaces",
    "trailing space ",
    "   ",
    "\n",
    "a\n\nb",
    "tab\tand\r\nline",
    "USER: hi\nASSISTANT:",
    "1234567890",
    "3.14159, 1e-9",
    "it's they'll WE'VE",
    "naïve café déjà",
    "日本語のテキスト",
    "中文文本测试",
    "한국어 문장",
    "😀 emoji 👩‍👩‍👧 family",
    "mixed 中文 and English, русский",
    "\u00a0nbsp\u2003em\u200bzero",
    "<image>",
    "<image>\nWhat is this?",
    "a<image>b",
    "x <image> y",
    "</s>",
    "<s>hi</s>",
    "<pad>",
    "!!!???...",
    "snake_case camelCase",
    "\\n is not a newline",
    "\u0000nul",
    "a" * 200,
    "¯\\_(ツ)_/¯",
    "ﬁ ligature",
    "e\u0301 combining",
    "\x7f\x1b[0m",
    "🇩🇪🏳️‍🌈",
    "<0x41>",
    "▁already",
    "[PAD5]",
    "def f(x):\n    return x\n\n\n",
    "",
    "\n\n \n ",
    "don't",
    "ǅ Ǆ",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama-bpe": _ENGLISH + r"\p{N}{1,3}" + _REST, "qwen2": _ENGLISH + r"\p{N}" + _REST}
IMAGE_SIZE, PATCH_SIZE = 56, 14
SIGLIP_SIZE = 60  # as the real one's, no whole number of patches
NEXT_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
ONEVISION_PINPOINTS = [[60 * rows, 60 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
MINI_LLAVA = Path(__file__).parents[1] / "examples" / "mini-llava" / "model"


@dataclass(frozen=True)
class Vision:
    """Shape of the CLIP or SigLIP tower. LLaVA-OneVision always has SigLIP, whose activation is its own."""

    n_embd: int = 32
    n_ff: int = 96
    n_layer: int = 3
    n_head: int = 4
    act: str = "quick_gelu"
    siglip: bool = False


@functools.cache
def _sentencepiece_model() -> bytes:
    """A sentencepiece BPE model with byte fallback, of Llama's kind."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "spm"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(CORPUS).split("\n") * 4),
            model_prefix=str(prefix),
            model_type="bpe",
            vocab_size=560,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.98,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
            num_threads=1,
            split_digits=True,
        )
        return prefix.with_suffix(".model").read_bytes()


def _spm_tokenizer(metaspace: bool) -> Tokenizer:
    """The tokenizer.json that transformers makes of a sentencepiece model: with a normalizer, or newer with Metaspace."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece_model())
    vocab = {spm.id_to_piece(i): i for i in range(len(spm))}
    merges = generate_merges(
        vocab, {spm.id_to_piece(i): spm.get_score(i) for i in range(len(spm))}, skip_tokens=("<unk>", "<s>", "</s>")
    )
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>")]
    )
    tokenizer.add_tokens([AddedToken("<obj>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _bpe_tokenizer(kind: str) -> Tokenizer:
    """A byte-level tokenizer with Llama 3's or Qwen2's pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[kind]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS * 2,
        trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>", "<pad>"])
    tokenizer.add_tokens(["<obj>"])
    if kind == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def save_tokenizer(path: Path, kind: str, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Writes a tokenizer's files.

    Args:
        path: Directory.
        kind: ``spm`` (tokenizer.json and tokenizer.model), ``spm-json``, ``spm-metaspace`` (tokenizer.json alone),
            ``llama-bpe`` or ``qwen2``.
        chat_template: Chat template to store.

    Returns:
        The tokenizer as transformers has it.
    """
    tokenizer = _spm_tokenizer(kind == "spm-metaspace") if kind.startswith("spm") else _bpe_tokenizer(kind)
    bos = None if kind == "qwen2" else "<s>"
    unk = "<unk>" if kind.startswith("spm") else None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", pad_token="<pad>", unk_token=unk
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(path)
    if kind == "spm":
        (path / "tokenizer.model").write_bytes(_sentencepiece_model())
    return fast


def build_llava(
    path: Path,
    family: str = "llava",
    text: str = "llama",
    tokenizer: str = "spm",
    n_layer: int = 4,
    hidden: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    names: str = "saved",
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    bias: bool = False,
    rope: dict[str, float | int | str] | None = None,
    vision: Vision = Vision(),
    feature_layer: int | list[int] | None = None,
    projector_bias: bool = True,
    n_ff: int = 160,
    seed: int = 1,
) -> PreTrainedModel:
    """Writes a complete tiny LLaVA checkpoint.

    Args:
        path: Directory, created if need be.
        family: ``llava``, ``llava_next`` or ``llava_onevision``.
        text: ``llama``, ``mistral`` or ``qwen2``.
        tokenizer: See ``save_tokenizer``.
        n_layer: Decoder layers.
        hidden: Width of the language model.
        n_head: Query heads.
        n_head_kv: Key and value heads.
        head_dim: Head size; hidden / n_head by default.
        names: Tensor names: ``saved`` as this transformers writes them, ``old`` (transformers 4) or ``new`` (as in memory
            from 4.52 on).
        sharded: Several safetensors files with an index.
        dtype: Type of the stored weights.
        tied: Share embeddings and output matrix.
        bias: Attention and MLP biases of a llama.
        rope: ``rope_parameters``.
        vision: The tower.
        feature_layer: ``vision_feature_layer``; the family's by default.
        projector_bias: Projector with biases.
        n_ff: Width of the language model's MLP.
        seed: Seed of the weights.

    Returns:
        The model as saved, in float32 for reference results.
    """
    print(f"build_llava: {family}, {text}, {tokenizer}, seed {seed}")
    path.mkdir(parents=True, exist_ok=True)
    fast = save_tokenizer(path, tokenizer)
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    extra = (
        {"attention_bias": bias, "mlp_bias": bias}
        if text == "llama"
        else {"sliding_window": None}
        if text == "mistral"
        else {}
    )
    if head_dim is not None:
        extra["head_dim"] = head_dim
    if rope is not None:
        extra["rope_parameters"] = rope
    text_config = classes[text](
        hidden_size=hidden,
        intermediate_size=n_ff,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_head_kv,
        vocab_size=len(fast) + 3,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        **extra,
    )
    model_class, config = _family_config(family, text_config, vision)
    config.image_token_id = fast.convert_tokens_to_ids("<image>")
    config.multimodal_projector_bias = projector_bias
    config.tie_word_embeddings = tied
    if feature_layer is not None:
        config.vision_feature_layer = feature_layer
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        # transformers' initialisation leaves norms at one and biases at zero, where a mixed-up tensor would go unnoticed
        for name, parameter in model.named_parameters():
            if "norm" in name or "layrnorm" in name or name.endswith("bias") or "embedding" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[-1] ** 0.5)
    if tied:
        model.tie_weights()
    model = model.to(dtype)
    model.save_pretrained(path, max_shard_size="60KB" if sharded else "5GB")
    if names != "saved":
        rename_tensors(path, names)
    image_processor(family).save_pretrained(path)
    return model.float()


def _family_config(family: str, text_config: PreTrainedConfig, vision: Vision) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The model class of a family, and its configuration."""
    shape = {
        "hidden_size": vision.n_embd,
        "intermediate_size": vision.n_ff,
        "num_hidden_layers": vision.n_layer,
        "num_attention_heads": vision.n_head,
        "patch_size": PATCH_SIZE,
    }
    if family == "llava_onevision":
        tower = SiglipVisionConfig(image_size=SIGLIP_SIZE, vision_use_head=False, **shape)
        return LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig(
            vision_config=tower, text_config=text_config, image_grid_pinpoints=ONEVISION_PINPOINTS, vision_aspect_ratio="anyres_max_2"
        )
    if vision.siglip:
        tower = SiglipVisionConfig(image_size=IMAGE_SIZE, **shape)
    else:
        tower = CLIPVisionConfig(image_size=IMAGE_SIZE, hidden_act=vision.act, **shape)
    strategy = "full" if vision.siglip else "default"
    if family == "llava_next":
        return LlavaNextForConditionalGeneration, LlavaNextConfig(
            vision_config=tower, text_config=text_config, vision_feature_select_strategy=strategy, image_grid_pinpoints=NEXT_PINPOINTS
        )
    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=tower,
        text_config=text_config,
        vision_feature_select_strategy=strategy,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )


def image_processor(family: str) -> PilBackend:
    """The image processor of a family's tiny checkpoints."""
    if family == "llava_onevision":
        size = {"height": SIGLIP_SIZE, "width": SIGLIP_SIZE}
        half = [0.5, 0.5, 0.5]
        return LlavaOnevisionImageProcessorPil(size=size, image_mean=half, image_std=half, image_grid_pinpoints=ONEVISION_PINPOINTS)
    crop = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    if family == "llava_next":
        return LlavaNextImageProcessorPil(image_grid_pinpoints=NEXT_PINPOINTS, **crop)
    return CLIPImageProcessorPil(**crop)


def rename_tensors(path: Path, names: str) -> None:
    """Rewrites the tensor names of a saved checkpoint: ``old`` or ``new``."""
    weight_map = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = {_renamed(name, names): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file.name))
    index = path / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _renamed(name: str, names: str) -> str:
    if names == "old":
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def edit_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file, a nested one as ``outer__inner``; None removes a key."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        target = content
        for part in outer:
            target = target[part]
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value
    path.write_text(json.dumps(content))


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error over the mean square of the expected values."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(((got - expected) ** 2).mean() / (expected**2).mean())
