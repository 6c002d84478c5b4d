"""Chat prompts of each family: token ids of `create_chat_completion` against Hugging Face's chat template and tokenizer."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hf_models import build_llava, edit_json
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ggml_qcache import Llama
from ggml_qcache_convert import convert

# images first, then text, as the templates of llava-hf's checkpoints do
_IMAGES = "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
_TEXTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
_TRAINED = "{% generation %}" + _TEXTS + "{% endgeneration %}"


@dataclass(frozen=True)
class Family:
    """A checkpoint's class, tokenizer and chat template. ``end`` ends an answer; ``system`` whether the template takes one."""

    model: str
    text: str
    tokenizer: str
    template: str
    extra: tuple[str, ...] = ()
    end: str = "</s>"
    system: bool = True


FAMILIES = {
    "vicuna": Family(
        "llava_next",
        "llama",
        "spm",
        "{% for message in messages %}{% if message['role'] == 'system' %}" + _TEXTS + " {% else %}"
        "{{ message['role'] | upper }}: " + _IMAGES + "{% if message['role'] == 'assistant' %}" + _TRAINED + "{{ eos_token }}"
        "{% else %}" + _TEXTS + " {% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    ),
    "mistral": Family(
        "llava_next",
        "mistral",
        "spm-metaspace",
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] " + _IMAGES + _TEXTS + " [/INST]"
        "{% elif message['role'] == 'assistant' %} " + _TRAINED + "{{ eos_token }}{% else %}"
        "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        system=False,
    ),
    "llama-3": Family(
        "llava_next",
        "llama",
        "llama-bpe",
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n" + _IMAGES + _TEXTS + "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "onevision": Family(
        "llava_onevision",
        "qwen2",
        "qwen2",
        "{% for message in messages %}<|im_start|>{{ message['role'] }} "
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}<video>{% endfor %}"
        "{% if message['role'] != 'assistant' %}\n" + _TEXTS + "{% else %}{% generation %}\n" + _TEXTS + "{% endgeneration %}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    # strings alone, as text-only fine-tunes have them: the image goes on a line of its own
    "chatml": Family(
        "llava",
        "qwen2",
        "qwen2",
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
}


class Chat:
    """A tiny checkpoint of a family, by transformers and by the runtime."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.family = family
        checkpoint = folder / "hf"
        build_llava(checkpoint, family.model, text=family.text, tokenizer=family.tokenizer, n_layer=1)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.add_special_tokens({"additional_special_tokens": [*family.extra, "<image>"]})
        tokenizer.chat_template = family.template
        tokenizer.save_pretrained(checkpoint)
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(family.end)]
        (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert convert(checkpoint, folder / "m.gguf", folder / "mm.gguf", "f32").warnings == ()
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(checkpoint)
        self.image_id = tokenizer.convert_tokens_to_ids("<image>")
        self.llm = Llama(str(folder / "m.gguf"), mmproj_path=str(folder / "mm.gguf"), n_ctx=1024, n_threads=1, n_threads_batch=1)

    def expected(self, messages: list[dict]) -> list[int]:
        """Ids by Hugging Face, one for each image; BOS is added where the template has none, as its processors do."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        return self.tokenizer(text, add_special_tokens=bos is None or not text.startswith(bos)).input_ids

    def got(self, messages: list[dict]) -> list[int]:
        """Ids of the prompt by the runtime, one for each image."""
        self.llm.reset()
        self.llm.create_chat_completion(messages, max_tokens=1, temperature=0.0, logit_bias={self.llm.token_eos(): -100})
        ids = self.llm._input_ids[: self.llm.last_timings["prefill_tokens"]].copy()
        ids[[start for start, _ in self.llm._images if start < len(ids) and ids[start] < 0]] = self.image_id
        return ids[ids >= 0].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    chat = Chat(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])
    with contextlib.closing(chat.llm):
        yield chat


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30 + seed, 70, 3), dtype=np.uint8))


def text(words: str) -> dict:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
CONVERSATIONS = {
    "text": [{"role": "user", "content": [text("How many red squares?")]}],
    "image first": [{"role": "user", "content": [IMAGE, text("How many?")]}],
    "image in the middle": [{"role": "user", "content": [text("Look at"), IMAGE, text("and count.")]}],
    "image last": [{"role": "user", "content": [text("What is this?"), IMAGE]}],
    "several images": [{"role": "user", "content": [IMAGE, text("and"), IMAGE, IMAGE, text("compare.")]}],
    "system": [{"role": "system", "content": [text("Be brief.")]}, {"role": "user", "content": [IMAGE, text("Well?")]}],
    "turns": [
        {"role": "user", "content": [IMAGE, text("What is this?")]},
        {"role": "assistant", "content": [text("A red square.")]},
        {"role": "user", "content": [text(" And  this?\n"), IMAGE]},
    ],
    "awkward": [{"role": "user", "content": [IMAGE, text("  café 😀\t中文 </p>\n\n")]}],
}


def as_users_write(messages: list[dict]) -> list[dict]:
    """OpenAI's form: images by URL; a message of text alone as a string."""
    seeds = iter(range(9))

    def content(parts: list[dict]) -> object:
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return [{"type": "image_url", "image_url": {"url": picture(next(seeds))}} if part["type"] == "image" else part for part in parts]

    return [{**message, "content": content(message["content"])} for message in messages]


def as_strings(messages: list[dict]) -> list[dict]:
    """For templates that take strings alone."""
    return [{**message, "content": "\n".join(part.get("text", "<image>") for part in message["content"])} for message in messages]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_equal_hugging_face(chat: Chat, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    if conversation == "system" and not chat.family.system:
        with pytest.raises(ValueError, match="only user and assistant"):
            chat.got(as_users_write(messages))
        return
    expected = chat.expected(as_strings(messages) if chat.family is FAMILIES["chatml"] else messages)
    assert expected.count(chat.image_id) == sum(part is IMAGE for message in messages for part in message["content"])
    assert chat.got(as_users_write(messages)) == expected


def test_an_answer_ends_where_the_template_ends_it(chat: Chat) -> None:
    end = chat.tokenizer.convert_tokens_to_ids(chat.family.end)
    response = chat.llm.create_chat_completion(
        as_users_write(CONVERSATIONS["image first"]), max_tokens=4, temperature=0.0, logit_bias={end: 100.0}
    )
    choice = response["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


def test_video_is_refused(chat: Chat) -> None:
    for part in ({"type": "video", "video": "a.mp4"}, {"type": "video_url", "video_url": {"url": "a.mp4"}}):
        with pytest.raises(ValueError, match=f"'{part['type']}'.*video isn't supported"):
            chat.got([{"role": "user", "content": [part, text("What happens?")]}])
