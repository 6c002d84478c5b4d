"""The mini-LLaVA as Hugging Face objects: configuration, tokenizer, processor, export.

Prompts have LLaVA-1.5's form, ``USER: <image>\\n{question} ASSISTANT: {answer}</s>``. A runtime tokenizes the text
before and after an image apart, so the tokenizer is made to give the same tokens either way: sentencepiece
without a dummy prefix, and no piece that crosses a space.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import torch
from scenes import IMAGE_SIZE, TASKS, ask, auxiliary, make_scene
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

PIECES = 702  # sentencepiece vocabulary; <image> and <pad> follow it, as in LLaVA-1.5
IMAGE_ID, PAD_ID = PIECES, PIECES + 1
VOCAB = PIECES + 2

# Images come first in a user turn whatever their position in the content list, as the model was trained.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}<image>\n{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}</s>"
    "{% elif message['content'] is string %}{{ message['content'] }} "
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_config(hidden: int, layers: int, patch: int, vision_hidden: int = 128, vision_layers: int = 5) -> LlavaConfig:
    """LLaVA-1.5's configuration in small.

    Args:
        hidden: width of the language model, a multiple of 32 (the head size).
        layers: decoder layers.
        patch: pixels a side of a visual token, a divisor of the image's.
        vision_hidden: width of the CLIP tower, a multiple of 32.
        vision_layers: layers of the CLIP tower; features are taken before the last one.
    """
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden, intermediate_size=4 * vision_hidden, num_hidden_layers=vision_layers,
        num_attention_heads=vision_hidden // 32, image_size=IMAGE_SIZE, patch_size=patch, hidden_act="quick_gelu",
        projection_dim=vision_hidden,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=-(-8 * hidden // 3 // 32) * 32,
        num_hidden_layers=layers, num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32,
        max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=(IMAGE_SIZE // patch) ** 2,
        projector_hidden_act="gelu", vision_feature_select_strategy="default", vision_feature_layer=-2,
        tie_word_embeddings=False, pad_token_id=PAD_ID,
    )  # fmt: skip


def _corpus(n_scenes: int = 1500):
    """Lines in the forms a tokenizer meets: after a newline, after a space, as an answer."""
    for seed in range(n_scenes):
        scene, rng = make_scene(seed), random.Random(seed)
        pairs = [ask(scene, task, rng) for task in TASKS] + [auxiliary(scene, rng)]
        for question, answer in filter(None, pairs):
            yield f"{question} ASSISTANT: {answer}"
            yield f"USER: {question} ASSISTANT: {answer}"


def _merges(spm: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Byte-pair merges, first applied first: every split of a piece into two pieces, in order of the pieces' scores."""
    scores = {spm.id_to_piece(i): spm.get_score(i) for i in range(PIECES) if not spm.is_control(i) and not spm.is_byte(i)}
    pairs = (
        (-score, rank, piece[:cut], piece[cut:])
        for rank, (piece, score) in enumerate(scores.items())
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    return [(left, right) for _, _, left, right in sorted(pairs)]


def make_tokenizer() -> tuple[LlamaTokenizer, bytes]:
    """Trains the sentencepiece model (seconds, deterministic).

    Returns:
        The Hugging Face tokenizer and the bytes of its ``tokenizer.model``.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, split_digits=True, num_threads=1, minloglevel=2, hard_vocab_limit=True,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = LlamaTokenizer(
        vocab={spm.id_to_piece(i): i for i in range(PIECES)}, merges=_merges(spm),
        add_prefix_space=False, add_bos_token=True, add_eos_token=False, legacy=False,
    )  # fmt: skip
    special = dict(special=True, normalized=False, lstrip=False, rstrip=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", **special)]})
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", **special)})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 4096
    if (tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id) != (IMAGE_ID, PAD_ID):
        raise RuntimeError("special tokens did not get the ids that the configuration names")
    return tokenizer, model.getvalue()


def make_processor(tokenizer: LlamaTokenizer, patch: int) -> LlavaProcessor:
    """CLIP preprocessing and the tokenizer in one, for visual tokens of ``patch`` pixels a side."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
    return LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes a loadable checkpoint with float16 weights; every file is replaced atomically.

    Args:
        model: float32 model, left as it is.
        folder: created where missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, sentencepiece_model = make_tokenizer()
    half = LlavaForConditionalGeneration(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=PAD_ID, do_sample=False)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        half.save_pretrained(staging)
        processor = make_processor(tokenizer, model.config.vision_config.patch_size)
        processor.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        processor.image_processor.save_pretrained(staging)
        Path(staging, "tokenizer.model").write_bytes(sentencepiece_model)
        # converters read the prefix flag here, whatever a tokenizer class leaves out
        config_path = Path(staging, "tokenizer_config.json")
        config = json.loads(config_path.read_text())
        config.update(add_prefix_space=False, add_bos_token=True, add_eos_token=False, legacy=False)
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for path in sorted(Path(staging).iterdir()):
            target = folder / (path.name + ".tmp")
            shutil.copyfile(path, target)
            os.replace(target, folder / path.name)
