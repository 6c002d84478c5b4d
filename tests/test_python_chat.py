"""Chat with images: places, order, reuse between turns, and that a failure leaves the model usable."""

import base64
import contextlib
import ctypes
import io

import llama_cpp
import numpy as np
import pytest
from core_helpers import rewrite_gguf
from llama_cpp import mtmd_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler
from tiny_llava import N_HEAD_KV, N_LAYER, N_LAZY, N_VISUAL, ask, complete, load, picture, tiny_llava, user

from ggml_qcache import NoBlocksError, UnsupportedError
from ggml_qcache.chat import ChatTemplate
from ggml_qcache.images import ImageLoader
from ggml_qcache.native import MtmdCorrection

QUESTION = "How many red squares are there?"


def data_url(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def llm():
    with load("visual") as llm:
        yield llm


def test_answers_are_stock_llama_cpps(monkeypatch):
    """The same prompt, image and answer as llama.cpp with its own decoder and multimodal helper gives, once it encodes rightly."""
    correction, defaults = MtmdCorrection(), mtmd_cpp.mtmd_context_params_default

    def corrected():
        params = defaults()
        params.cb_eval = ctypes.cast(correction.callback, type(params.cb_eval))
        params.cb_eval_user_data = correction.user_data
        return params

    monkeypatch.setattr(mtmd_cpp, "mtmd_context_params_default", corrected)
    handler = MTMDChatHandler(clip_model_path=tiny_llava().mmproj, verbose=False)
    stock = llama_cpp.Llama(tiny_llava().plain, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, chat_handler=handler)
    conversations = (
        [user(QUESTION, data_url(picture()))],
        [user(QUESTION, data_url(picture(1)), data_url(picture(2)))],
        [user(QUESTION, data_url(picture())), {"role": "assistant", "content": "Two."}, user("And now?", data_url(picture(3)))],
    )
    with contextlib.closing(stock), load() as llm:
        for messages in conversations:
            assert ask(llm, messages, 32) == ask(stock, messages, 32)


def test_streaming_gives_the_same_answer(llm):
    messages = [user(QUESTION, picture())]
    expected = ask(llm, messages)
    chunks = llm.create_chat_completion(messages, max_tokens=16, temperature=0.0, stream=True)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


@pytest.mark.parametrize("file, mode", [("plain", "off"), ("visual", "visual"), ("global_", "global")])
def test_kv_usage(file, mode):
    with load(file, block_tokens=16) as llm:
        ask(llm, [user(QUESTION, picture(), picture(1))])
        usage = llm.kv_cache_usage()
        k = 16 * N_HEAD_KV * 32
        full, lazy = N_LAYER * 2 * k, 0 if mode == "off" else N_LAZY * k
        text = full - (lazy if mode == "global" else 0)
        assert usage["visual_tokens"] == 2 * N_VISUAL and usage["blocks_visual"] == 2
        assert usage["bytes"] == usage["blocks_text"] * text + 2 * (full - lazy)
        assert usage["bytes_if_full"] == usage["blocks"] * full
        assert usage["text_tokens"] + usage["visual_tokens"] == llm.n_tokens


def test_a_follow_up_evaluates_its_own_tokens_alone(llm):
    messages = [user(QUESTION, picture())]
    answer = ask(llm, messages)
    messages += [{"role": "assistant", "content": answer}, user("And blue ones?")]
    n_before = llm.n_tokens
    second = ask(llm, messages)
    timings = llm.last_timings
    assert timings["image_ms"] == 0 and timings["prefill_tokens"] <= llm.n_tokens - N_VISUAL
    assert timings["prefill_tokens"] < n_before
    with load("visual") as fresh:
        assert ask(fresh, messages) == second
    # a picture more in the next turn
    messages += [{"role": "assistant", "content": second}, user("And here?", picture(1))]
    third = ask(llm, messages)
    with load("visual") as fresh:
        assert ask(fresh, messages) == third


def test_another_picture_is_not_taken_for_the_first(llm):
    answers = [ask(llm, [user(QUESTION, picture(seed))]) for seed in (0, 1, 0)]
    assert answers[0] == answers[2] != answers[1]
    swapped = [ask(llm, [user(QUESTION, picture(a), picture(b))]) for a, b in ((0, 1), (1, 0), (0, 1))]
    assert swapped[0] == swapped[2] != swapped[1]
    # twice the same picture is two pictures
    ask(llm, [user(QUESTION, picture(), picture())])
    assert llm.kv_cache_usage()["visual_tokens"] == 2 * N_VISUAL


def test_another_question_needs_no_encoder(llm):
    ask(llm, [{"role": "system", "content": "Be brief."}, user(QUESTION, picture())])
    encoded = llm._vision.encode
    llm._vision.encode = lambda chunk: pytest.fail("encoded again") if chunk.key not in llm._vision._embeddings else encoded(chunk)
    ask(llm, [{"role": "system", "content": "Be verbose."}, user(QUESTION, picture())])
    assert llm.kv_cache_usage()["visual_tokens"] == N_VISUAL


def test_streams_made_first_and_read_later(llm):
    expected = [ask(llm, [user(QUESTION, picture(seed))]) for seed in (0, 1)]
    streams = [
        llm.create_chat_completion([user(QUESTION, picture(seed))], max_tokens=16, temperature=0.0, stream=True) for seed in (0, 1)
    ]
    for stream, answer in zip(streams, expected):
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream) == answer


@pytest.mark.parametrize("n_batch", [1, 5, 16])
def test_an_image_in_pieces(n_batch):
    messages = [user(QUESTION, picture(), picture(1))]
    with load("visual") as whole, load("visual", n_batch=n_batch) as llm:
        assert ask(llm, messages) == ask(whole, messages)


def test_prefix_reuse_inside_an_image(llm):
    """A state cut in the middle of an image continues there."""
    messages = [user(QUESTION, picture())]
    expected = ask(llm, messages)
    first = int(np.flatnonzero(llm._input_ids < 0)[0])
    llm._context.seq_rm(0, first + 5)
    llm.n_tokens = first + 5
    llm._requires_eval = True
    assert ask(llm, messages) == expected


def test_a_saved_state_with_an_image_continues(llm):
    messages = [user(QUESTION, picture())]
    answer = ask(llm, messages)
    state = llm.save_state()
    messages += [{"role": "assistant", "content": answer}, user("And blue ones?")]
    expected = ask(llm, messages)
    with load("visual") as other:
        other.load_state(state)
        assert ask(other, messages) == expected
        assert other.last_timings["image_ms"] == 0


def test_log_probabilities_after_an_image():
    with load("visual", logits_all=True) as llm:
        response = llm.create_chat_completion(
            [user(QUESTION, picture())], max_tokens=4, temperature=0.0, logprobs=True, top_logprobs=2
        )
        values = [token["logprob"] for token in response["choices"][0]["logprobs"]["content"]]
        assert len(values) == 4 and max(values) <= 0
        assert [token["token"] for token in response["choices"][0]["logprobs"]["content"]] == [
            token["top_logprobs"][0]["token"] for token in response["choices"][0]["logprobs"]["content"]
        ]


def test_a_tool_call_about_an_image(llm):
    tool = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {"n": {"enum": [3]}}, "required": ["n"]}}}
    response = llm.create_chat_completion(
        [user(QUESTION, picture())],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "count"}},
        max_tokens=40,
        temperature=0.0,
    )
    call = response["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "count" and "".join(call["arguments"].split()) == '{"n":3}'


def test_the_word_image_is_a_word(llm):
    messages = [user("What does <image> mean?", picture())]
    ask(llm, messages)
    assert llm.kv_cache_usage()["visual_tokens"] == N_VISUAL
    ask(llm, [{"role": "user", "content": "What does <image> mean?"}])
    assert llm.kv_cache_usage()["visual_tokens"] == 0


def test_prompts_over_n_ctx(llm):
    expected = ask(llm, [user(QUESTION, picture())])
    usage = llm.kv_cache_usage()
    long = "red squares " * 200
    for call in (
        lambda: ask(llm, [user(long, picture())]),
        lambda: ask(llm, [user(QUESTION, *[picture(seed) for seed in range(16)])]),
        lambda: llm.create_chat_completion([user(long, picture())], stream=True),
        lambda: complete(llm, long),
        lambda: complete(llm, [5] * 256),
        lambda: complete(llm, "red", suffix=long),
    ):
        with pytest.raises(ValueError, match=r"\b(2[5-9]\d|[3-9]\d\d|\d{4}) tokens.*n_ctx=256"):
            call()
    assert llm.kv_cache_usage() == usage  # nothing was computed
    assert ask(llm, [user(QUESTION, picture())]) == expected
    with pytest.raises(ValueError, match=r"tokens don't fit n_ctx=256"):
        llm.eval([5] * 256)
    assert ask(llm, [user(QUESTION, picture())]) == expected


def test_an_answer_may_fill_the_context():
    with load(n_ctx=40) as llm:
        response = llm.create_chat_completion([user(QUESTION, picture())], max_tokens=None, temperature=0.0, logit_bias={2: -100})
        assert response["choices"][0]["finish_reason"] == "length"
        assert 38 <= llm.n_tokens <= 40


def test_no_blocks_left():
    messages = [user(QUESTION, picture())]
    with load("visual") as unlimited:
        expected = ask(unlimited, messages, 12)
        block = unlimited.kv_cache_usage()["bytes_block_full"]
    with load("visual", kv_bytes_max=4 * block, block_tokens=16) as llm:
        with pytest.raises(NoBlocksError, match=str(4 * block)):  # while it answers
            ask(llm, messages, 200, logit_bias={2: -100})
        assert llm.kv_cache_usage()["bytes"] <= 4 * block
        assert llm.n_tokens == llm._context.seq_len()
        assert ask(llm, messages, 12) == expected
        with pytest.raises(NoBlocksError):  # within the prompt
            ask(llm, [user(QUESTION, *[picture(seed) for seed in range(8)])])
        assert llm.n_tokens == llm._context.seq_len()
        assert ask(llm, messages, 12) == expected


@pytest.mark.parametrize(
    "content, reason",
    [
        ([{"type": "image_url", "image_url": {"url": "/nowhere.png"}}], "/nowhere.png"),
        ([{"type": "image_url", "image_url": {}}], "no url"),
        ([{"type": "image_url"}], "image_url"),
        ([{"type": "input_audio", "input_audio": {}}], "input_audio"),
        ([{"type": "text"}], "text"),
        ([{"type": "image_url", "image_url": "http://127.0.0.1:9/x.png"}], "allow_http"),
        ([{"type": "image_url", "image_url": picture(width=2000, height=3)}], "2000 x 3 pixels"),
        ([42], "int"),
    ],
)
def test_a_bad_part_leaves_the_model_usable(llm, content, reason):
    messages = [user(QUESTION, picture())]
    expected = ask(llm, messages)
    with pytest.raises(ValueError, match=reason):
        ask(llm, [{"role": "user", "content": content}])
    assert ask(llm, messages) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (3000, 31)])
def test_images_of_any_size(llm, size):
    assert ask(llm, [user(QUESTION, picture(0, *size))])
    assert llm.kv_cache_usage()["visual_tokens"] == N_VISUAL


def test_http_only_where_allowed():
    with load(allow_http=True) as llm, pytest.raises(ValueError, match="can't be fetched"):
        ask(llm, [user(QUESTION, "http://127.0.0.1:9/x.png")])


def test_images_need_an_mmproj():
    with load(mmproj_path=None) as llm:
        with pytest.raises(ValueError, match="mmproj_path"):
            ask(llm, [user(QUESTION, picture())])
        assert ask(llm, [user(QUESTION)])


def test_a_named_format_places_no_images():
    with load(chat_format="vicuna") as llm:
        with pytest.raises(ValueError, match="'vicuna'"):
            ask(llm, [user(QUESTION, picture())])
        assert ask(llm, [{"role": "user", "content": QUESTION}])
    handler = MTMDChatHandler(clip_model_path=tiny_llava().mmproj, verbose=False)
    with load(chat_handler=handler) as llm, pytest.raises(UnsupportedError):
        ask(llm, [user(QUESTION, data_url(picture()))])


def test_a_file_without_template_talks_as_llava_does():
    path = rewrite_gguf(tiny_llava().plain, tiny_llava().folder / "bare.gguf", {"tokenizer.chat_template": None})
    with load(str(path)) as llm:
        ask(llm, [user(QUESTION, picture()), {"role": "assistant", "content": "Two."}, user("Sure?")])
        ids = llm._input_ids.tolist()
        visual = [i for i, token in enumerate(ids) if token < 0]
        before, after = ids[: visual[0]], ids[visual[-1] + 1 :]
        assert before == llm.tokenize(b"USER: ", add_bos=True, special=True)
        text = f"\n{QUESTION} ASSISTANT: Two.</s>USER: Sure? ASSISTANT:".encode()
        expected = llm.tokenize(text, add_bos=False, special=True)
        assert after[: len(expected)] == expected


# templates as checkpoints have them: what each renders for an image, a text, an answer and a second text
HF_LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PRINTS_ANYTHING = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    "template, expected, adds_bos",
    [
        (HF_LLAVA, "USER: @\nwhat <image> is ASSISTANT: this USER: more ASSISTANT:", True),
        (
            CHATML,
            "<|im_start|>user\n@\nwhat <image> is<|im_end|>\n<|im_start|>assistant\nthis<|im_end|>\n"
            "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
            True,
        ),
        (PRINTS_ANYTHING, "<s>[user] @\nwhat <image> is\n[assistant] this\n[user] more\n", False),
    ],
    ids=["llava", "chatml", "prints anything"],
)
def test_templates(template, expected, adds_bos):
    chat = ChatTemplate(template, bos_token="<s>", eos_token="</s>", eos_token_id=2, adds_bos=True, loader=ImageLoader())
    messages = [user("what <image> is", picture()), {"role": "assistant", "content": "this"}, user("more")]
    response = chat(messages=messages)
    assert "".join(part if isinstance(part, str) else "@" for part in response.prompt.parts) == expected
    assert response.added_special is not adds_bos and response.stop == ["</s>"]
    # the same words without the image
    plain = chat(messages=[{"role": "user", "content": "what <image> is"}, *messages[1:]]).prompt
    assert plain == expected.replace("@\n", "")


def test_templates_that_fail():
    with pytest.raises(ValueError, match="can't be compiled"):
        ChatTemplate("{% for %}", bos_token="", eos_token="", eos_token_id=-1, adds_bos=False, loader=None)
    drops = ChatTemplate("{{ 'nothing' }}", bos_token="", eos_token="", eos_token_id=-1, adds_bos=False, loader=ImageLoader())
    with pytest.raises(ValueError, match="places for 0 of 1 images"):
        drops(messages=[user("what", picture())])
    refuses = ChatTemplate("{{ raise_exception('no') }}", bos_token="", eos_token="", eos_token_id=-1, adds_bos=False, loader=None)
    with pytest.raises(ValueError, match="no"):
        refuses(messages=[user("what")])
