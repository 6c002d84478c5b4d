"""The shipped mini-LLaVA through `Llama`: prompts and answers are Hugging Face's, and lazy layers keep the KV cache small."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_llava import ask, user
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ggml_qcache import Llama
from ggml_qcache_convert import convert

HERE = Path(__file__).parents[1] / "examples" / "mini-llava"
QUESTIONS = json.loads((HERE / "images" / "questions.json").read_text())
LAZY_LAYERS = "1-7,9-15,17-23,25-27,29-31"


@pytest.fixture(scope="module")
def hugging_face():
    return LlavaForConditionalGeneration.from_pretrained(HERE / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mini-llava")
    convert(HERE / "model", folder / "m.gguf", folder / "mm.gguf", "f32", lazy_layers=LAZY_LAYERS, lazy_mode="visual")
    return {"model_path": str(folder / "m.gguf"), "mmproj_path": str(folder / "mm.gguf")}


def inputs(question: dict[str, str], model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """What Hugging Face makes of a question and its image."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    image = Image.open(HERE / "images" / question["image"]).convert("RGB")
    pixels = CLIPImageProcessorPil.from_pretrained(HERE / "model")(image, return_tensors="pt")["pixel_values"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question["question"]}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    n_visual = model.config.image_seq_length
    ids = tokenizer(text.replace("<image>", "<image>" * n_visual), return_tensors="pt")
    return {**ids, "pixel_values": pixels}


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: f"{question['task']}-{question['image']}")
def test_prompts_and_answers_are_hugging_faces(hugging_face, files, question):
    given = inputs(question, hugging_face)
    ids = given["input_ids"][0].tolist()
    with torch.no_grad():
        output = hugging_face.generate(**given, max_new_tokens=200, do_sample=False)[0, len(ids) :].tolist()
    with Llama(**files, n_ctx=512, lazy_layers="none", n_threads=1, n_threads_batch=1) as llm:
        ask(llm, [user(question["question"], HERE / "images" / question["image"])], 200)
        visual = hugging_face.config.image_token_index
        assert [token if token >= 0 else visual for token in llm._input_ids[: len(ids)].tolist()] == ids
        # the last token is not evaluated
        assert llm._input_ids[len(ids) :].tolist() == output[: llm.n_tokens - len(ids)]
        assert llm.n_tokens - len(ids) >= len(output) - 1


def test_two_hundred_tokens_are_hugging_faces(hugging_face, files):
    given = inputs(QUESTIONS[-2], hugging_face)
    n_prompt = given["input_ids"].shape[1]
    with torch.no_grad():
        output = hugging_face.generate(**given, max_new_tokens=200, min_new_tokens=200, do_sample=False)[0, n_prompt:].tolist()
    eos = hugging_face.config.text_config.eos_token_id
    with Llama(**files, n_ctx=512, lazy_layers="none", n_threads=1, n_threads_batch=1) as llm:
        ask(llm, [user(QUESTIONS[-2]["question"], HERE / "images" / QUESTIONS[-2]["image"])], 200, logit_bias={eos: -1e9})
        assert llm._input_ids[n_prompt:].tolist() == output[:199]


def test_v_skipping_is_counted_and_changes_little(files):
    question = [user(QUESTIONS[-2]["question"], HERE / "images" / QUESTIONS[-2]["image"])]
    skipped = []
    for v_skip in (0.0, 0.02, 0.2):
        with Llama(**files, n_ctx=512, n_threads=1, n_threads_batch=1, v_skip=v_skip, block_tokens=16) as llm:
            answer = ask(llm, question, 60)
            usage = llm.kv_cache_usage()
        assert (usage["v_rows"] > 0) == (v_skip > 0) and usage["v_rows_skipped"] <= usage["v_rows"]
        skipped.append(usage["v_rows_skipped"] / max(1, usage["v_rows"]))
        exact = answer if v_skip == 0 else exact
        assert v_skip > 0.02 or answer == exact
    assert 0 == skipped[0] < skipped[1] < skipped[2]


def test_lazy_layers_save_kv_bytes(files):
    with Llama(**files, n_ctx=512, n_threads=1, n_threads_batch=1) as llm:
        ask(llm, [user(QUESTIONS[0]["question"], HERE / "images" / QUESTIONS[0]["image"])])
        usage = llm.kv_cache_usage()
        assert llm.lazy.n_lazy == usage["lazy_layers"] == 27
        # 27 of 32 layers keep no K of visual tokens
        assert usage["bytes_block_visual"] / usage["bytes_block_full"] == 1 - 27 / 64
        assert usage["bytes"] == 8 * usage["bytes_block_visual"] + 2 * usage["bytes_block_text"] < 0.67 * usage["bytes_if_full"]
