"""`Llama` as a drop-in for llama_cpp's: the same answers with lazy layers off, and everything the base class offers."""

import gc
import pickle
import time

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LlamaRAMCache, LogitsProcessorList, StoppingCriteriaList
from tiny_llava import LAZY_LAYERS, N_HEAD_KV, N_LAYER, N_LAZY, complete, load, tiny_llava

from ggml_qcache import NoBlocksError, QCacheError, StateError, UnsupportedError

PROMPT = "How many red squares"


@pytest.fixture
def stock():
    llm = llama_cpp.Llama(tiny_llava().plain, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
    yield llm
    llm.close()


@pytest.fixture
def llm():
    with load() as llm:
        yield llm


def streamed(chunks) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_greedy_text_is_stock_llama_cpps(llm, stock):
    assert complete(llm, PROMPT, 100) == complete(stock, PROMPT, 100)


def test_seeded_sampling_is_stock_llama_cpps(llm, stock):
    sampling = {"max_tokens": 12, "temperature": 0.9, "top_k": 20, "repeat_penalty": 1.2, "presence_penalty": 0.3, "seed": 5}
    expected = stock.create_completion(PROMPT, **sampling)["choices"]
    assert llm.create_completion(PROMPT, **sampling)["choices"] == expected
    assert llm.create_completion(PROMPT, **sampling)["choices"] == expected  # from the cached prompt


def test_chat_text_is_stock_llama_cpps(llm, stock):
    messages = [{"role": "user", "content": "Is the green triangle left?"}]
    prompt = "USER: Is the green triangle left?\nASSISTANT:"
    expected = stock.create_completion(prompt, max_tokens=24, temperature=0.0, stop=["</s>"])["choices"][0]["text"]
    answer = llm.create_chat_completion(messages, max_tokens=24, temperature=0.0)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == len(llm.tokenize(prompt.encode(), add_bos=True, special=True))


def test_streaming_gives_the_same_text(llm):
    expected = complete(llm, PROMPT, 40)
    assert streamed(llm.create_completion(PROMPT, max_tokens=40, temperature=0.0, stream=True)) == expected


def test_threads_sleep_between_tokens():
    with load(n_threads=2, n_threads_batch=2) as llm:
        complete(llm, PROMPT, 8)
        time.sleep(0.2)
        busy = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - busy < 0.05  # of two threads that spin: 0.5 or more


def test_an_abandoned_stream_leaves_no_trace(llm):
    expected = complete(llm)
    chunks = llm.create_completion("Is the green triangle", max_tokens=20, temperature=0.0, stream=True)
    next(chunks)
    del chunks
    assert complete(llm) == expected


def test_log_probabilities(stock):
    with load(logits_all=True) as llm:
        for arguments in ({}, {"echo": True}):
            ours, theirs = (
                model.create_completion(PROMPT, max_tokens=8, temperature=0.0, logprobs=3, **arguments)["choices"][0]["logprobs"]
                for model in (llm, stock)
            )
            assert ours["tokens"] == theirs["tokens"]
            assert [value is None for value in ours["token_logprobs"]] == [value is None for value in theirs["token_logprobs"]]
            pairs = [pair for pair in zip(ours["token_logprobs"], theirs["token_logprobs"]) if None not in pair]
            np.testing.assert_allclose(*zip(*pairs), atol=2e-2)
            assert [top and max(top, key=top.get) for top in ours["top_logprobs"]] == [
                top and max(top, key=top.get) for top in theirs["top_logprobs"]
            ]


def test_log_probabilities_need_logits_all(llm):
    with pytest.raises(ValueError, match="logits_all"):
        llm.create_completion(PROMPT, max_tokens=2, logprobs=1)
    assert complete(llm)


def test_stream_with_log_probabilities():
    with load(logits_all=True) as llm:
        whole = llm.create_completion(PROMPT, max_tokens=6, temperature=0.0, logprobs=1)["choices"][0]["logprobs"]
        llm.reset()  # else the prompt's last token comes alone, and ggml rounds otherwise for one row
        chunks = list(llm.create_completion(PROMPT, max_tokens=6, temperature=0.0, logprobs=1, stream=True))
        values = [chunk["choices"][0]["logprobs"]["token_logprobs"][0] for chunk in chunks if chunk["choices"][0]["logprobs"]]
        np.testing.assert_allclose(values, whole["token_logprobs"], atol=1e-5)


def test_grammar(llm):
    grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    assert complete(llm, grammar=grammar) in ("yes", "no")
    response = llm.create_chat_completion(
        [{"role": "user", "content": "Say something."}],
        response_format={"type": "json_object", "schema": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}},
        max_tokens=60,
        temperature=0.0,
    )
    assert response["choices"][0]["message"]["content"].replace(" ", "").replace("\n", "") in ('{"n":1}', '{"n":2}')


def test_a_grammar_that_leaves_no_token_is_an_error(llm):
    expected = complete(llm)

    def forbid_everything(_ids, logits):
        return np.full_like(logits, -np.inf)

    with pytest.raises(QCacheError, match="no token"):
        complete(llm, logits_processor=LogitsProcessorList([forbid_everything]))
    assert complete(llm) == expected


def test_processors_bias_stop_and_criteria(llm):
    token = llm.tokenize(b" red", add_bos=False)[-1]

    def only(_ids, logits):
        return np.where(np.arange(len(logits)) == token, logits, -np.inf).astype(np.float32)

    text = complete(llm, max_tokens=3, logits_processor=LogitsProcessorList([only]))
    assert text == llm.detokenize([token] * 3).decode()
    assert complete(llm, max_tokens=3, logit_bias={token: 1000.0}) == text

    answer = complete(llm)
    assert complete(llm, stop=[answer[5]]) == answer[: answer.index(answer[5])]
    seen = []
    criteria = StoppingCriteriaList([lambda ids, logits: seen.append((len(ids), logits.shape)) or len(seen) == 4])
    complete(llm, stopping_criteria=criteria)
    assert len(seen) >= 4 and set(shape for _, shape in seen) == {(llm.n_vocab(),)}


def test_eval_sample_and_scores(llm):
    tokens = llm.tokenize(PROMPT.encode())
    llm.reset()
    llm.eval(tokens)
    assert llm.n_tokens == len(tokens) and llm._input_ids.tolist() == tokens
    assert llm.sample(temp=0.0) == int(np.argmax(llm.eval_logits[-1]))
    generated = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(5))]
    again = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(5))]
    assert generated == again
    # one row at a time gives what one batch gives
    llm.reset()
    for token in tokens:
        llm.eval([token])
    assert llm.sample(temp=0.0) == generated[0]


@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 0.9, "repeat_penalty": 1.3, "mirostat_mode": 2}], ids=["greedy", "mirostat"])
def test_generation_is_that_of_the_base_class(llm, sampling):
    """With a criterion for stopping, every token goes through the base class's loop."""
    tokens, never = llm.tokenize(PROMPT.encode()), StoppingCriteriaList([lambda ids, logits: False])
    results = []
    for more in ({}, {"stopping_criteria": never}):
        llm.set_seed(7)
        llm.reset()
        generated = [token for token, _ in zip(llm.generate(tokens, **sampling, **more), range(30))]
        results.append((generated, llm._input_ids.tolist(), llm.n_tokens, llm.last_timings["decode_tokens"], llm.eval_logits[-1]))
    assert results[0] == results[1]


def test_processors_see_what_was_generated(llm):
    tokens, never = llm.tokenize(PROMPT.encode()), StoppingCriteriaList([lambda ids, logits: False])
    seen = ([], [])
    for ids_seen, more in zip(seen, ({}, {"stopping_criteria": never})):
        processors = LogitsProcessorList([lambda ids, logits: ids_seen.append(ids.tolist()) or logits])
        llm.reset()
        generated = [token for _, token in zip(range(6), llm.generate(tokens, temp=0.0, logits_processor=processors, **more))]
        assert ids_seen == [[*tokens, *generated[:n]] for n in range(6)]


def test_tokens_sent_to_a_generation(llm):
    tokens = llm.tokenize(PROMPT.encode())
    steps = llm.generate(tokens, temp=0.0)
    first = next(steps)
    then = [steps.send(np.array([9, 8])), next(steps)]
    assert llm._input_ids.tolist() == [*tokens, first, 9, 8, then[0]]
    assert then == [token for token, _ in zip(llm.generate([*tokens, first, 9, 8], temp=0.0), range(2))]


def test_generations_that_end_early(llm):
    tokens = llm.tokenize(PROMPT.encode())
    expected = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(8))]
    steps, n = llm.generate(tokens, temp=0.0), 0
    with pytest.raises(ValueError, match=r"256 \+ 1 tokens don't fit n_ctx=256"):
        for _ in steps:
            n += 1
    assert n == 256 - len(tokens) + 1 and llm.n_tokens == 256
    assert [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(8))] == expected
    steps = llm.generate(tokens, temp=0.0)
    next(steps)
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        next(steps)


def test_a_generation_without_blocks_left():
    with load(block_tokens=16) as llm:
        block = llm.kv_cache_usage()["bytes_block_text"]
    with load(block_tokens=16, kv_bytes_max=2 * block) as llm:
        tokens = llm.tokenize(PROMPT.encode())
        steps, generated = llm.generate(tokens, temp=0.0), []
        with pytest.raises(NoBlocksError, match="kv_bytes_max"):
            for token in steps:
                generated.append(token)
        assert llm.n_tokens == 32 == len(tokens) + len(generated) - 1
        assert llm._input_ids.tolist() == [*tokens, *generated[:-1]]
        assert generated == [token for _, token in zip(generated, llm.generate(tokens, temp=0.0))]


@pytest.mark.parametrize("n_batch", [1, 3, 512])
def test_prompt_in_pieces(n_batch):
    with load(n_batch=n_batch) as llm, load() as whole:
        assert complete(llm) == complete(whole)


def test_sampling_needs_logits(llm):
    with pytest.raises(ValueError, match="no logits"):
        llm.sample()
    complete(llm)
    llm.load_state(llm.save_state())
    with pytest.raises(ValueError, match="no logits"):
        llm.sample()


def test_sampling_at_a_position():
    with load(logits_all=True) as llm:
        tokens = llm.tokenize(PROMPT.encode())
        llm.eval(tokens)
        assert [llm.sample(temp=0.0, idx=i) for i in range(len(tokens))] == llm.scores[: len(tokens)].argmax(-1).tolist()
        for idx in (-1, len(tokens)):
            with pytest.raises(ValueError, match=f"idx={idx} isn't the position of one of the {len(tokens)} tokens"):
                llm.sample(temp=0.0, idx=idx)


def test_a_saved_state_continues(llm):
    tokens = llm.tokenize(PROMPT.encode())
    text = complete(llm, max_tokens=8)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    n_tokens = llm.n_tokens
    continued = complete(llm, prompt=PROMPT + text, max_tokens=8)
    complete(llm, prompt="Something else entirely", max_tokens=8)
    llm.load_state(state)
    assert llm.n_tokens == n_tokens and llm._input_ids[: len(tokens)].tolist() == tokens
    assert complete(llm, prompt=PROMPT + text, max_tokens=8) == continued
    with load() as other:
        other.load_state(state)
        assert complete(other, prompt=PROMPT + text, max_tokens=8) == continued


def test_a_foreign_or_damaged_state_is_refused(llm):
    expected = complete(llm)
    state = llm.save_state()
    with load("visual") as other:
        answer = complete(other)
        with pytest.raises(StateError):
            other.load_state(state)
        assert complete(other) == answer
    state.llama_state = state.llama_state[: len(state.llama_state) // 2]
    with pytest.raises(StateError):
        llm.load_state(state)
    assert complete(llm) == expected
    with load(n_ctx=16) as small, pytest.raises(ValueError, match="n_ctx=16"):
        small.load_state(llm.save_state())


def test_cache(llm):
    llm.set_cache(LlamaRAMCache(capacity_bytes=2**26))
    first = complete(llm)
    other = complete(llm, prompt="Something else")
    assert complete(llm) == first and complete(llm, prompt="Something else") == other
    assert llm.last_timings["prefill_tokens"] == 1  # restored states replay one token for its logits


def test_pickle_loads_anew():
    with load("visual", type_k="q8_0", lazy_layers="6,7", lazy_mode="global") as llm:
        expected = complete(llm)
        copied = pickle.loads(pickle.dumps(llm))
    with copied:
        assert complete(copied) == expected
        assert copied.lazy == llm.lazy


@pytest.mark.parametrize("type_k, type_v, row_k, row_v", [(None, None, 32, 32), ("q8_0", "f16", 34, 32), (8, 8, 34, 34)])
@pytest.mark.parametrize("file, mode", [("plain", "off"), ("visual", "visual"), ("global_", "global")])
def test_kv_usage_is_the_formula(file, mode, type_k, type_v, row_k, row_v):
    with load(file, type_k=type_k, type_v=type_v, block_tokens=16) as llm:
        complete(llm, max_tokens=30)
        usage = llm.kv_cache_usage()
        n_tokens = llm.n_tokens
        k, v = (16 * N_HEAD_KV * row for row in (row_k, row_v))  # bytes of a head's row: 16 values, in q8_0 one block of 32
        lazy = {"off": 0, "visual": N_LAZY, "global": N_LAZY}[mode]
        full = N_LAYER * (k + v)
        text = full - (lazy * k if mode == "global" else 0)
        blocks = -(-n_tokens // 16)
        assert usage == {
            "bytes": blocks * text,
            "bytes_if_full": blocks * full,
            "bytes_max": 0,
            "blocks": blocks,
            "blocks_text": blocks,
            "blocks_visual": 0,
            "block_tokens": 16,
            "bytes_block_text": text,
            "bytes_block_visual": full - lazy * k,
            "bytes_block_full": full,
            "text_tokens": n_tokens,
            "visual_tokens": 0,
            "lazy_layers": lazy,
            "dropped_layers": 0,
            "v_rows": 0,
            "v_rows_skipped": 0,
            "lazy_mode": mode,
        }
        llm.reset()
        assert llm.kv_cache_usage()["bytes"] == 0


def test_lazy_layers_argument():
    file_leader = (0, 1, 1, 1, 4, 4, 4, 4)
    for arguments, mode, leader in (
        ({}, "visual", file_leader),
        ({"lazy_layers": "none"}, "off", tuple(range(8))),
        ({"lazy_layers": None}, "off", tuple(range(8))),
        ({"lazy_layers": []}, "off", tuple(range(8))),
        ({"lazy_mode": "global"}, "global", file_leader),
        ({"lazy_layers": "1,3-4"}, "visual", (0, 0, 2, 2, 2, 5, 6, 7)),
        ({"lazy_layers": [7, 6], "lazy_mode": "global"}, "global", (0, 1, 2, 3, 4, 5, 5, 5)),
    ):
        with load("visual", **arguments) as llm:
            assert (llm.lazy.mode, llm.lazy.leader) == (mode, leader), arguments
            assert llm.lazy.n_lazy == llm.kv_cache_usage()["lazy_layers"]
    with load("plain", lazy_layers=LAZY_LAYERS) as explicit, load("visual") as file:
        assert explicit.lazy == file.lazy
        assert complete(explicit) == complete(file)


@pytest.mark.parametrize("attn_impl", ["scalar", "composed"])
@pytest.mark.parametrize("score_cache", ["off", "on"])
def test_kernels_agree(attn_impl, score_cache):
    with load("visual") as llm, load("visual", attn_impl=attn_impl, score_cache=score_cache) as other:
        assert complete(other) == complete(llm)
        assert attn_impl in other.device_report()["attention"]


def test_timings(llm):
    complete(llm, max_tokens=10)
    timings = llm.last_timings
    assert timings["prefill_tokens"] == len(llm.tokenize(PROMPT.encode())) and timings["decode_tokens"] == 9
    assert timings["prefill_ms"] > 0 and timings["decode_ms"] > 0 and timings["image_ms"] == 0
    complete(llm, max_tokens=5)
    assert llm.last_timings["prefill_tokens"] == 1  # the prompt was cached, its last token is replayed


def test_what_needs_a_llama_context_says_so(llm):
    for call in (lambda: llm.embed("text"), lambda: llm.create_embedding("text"), lambda: llm.ctx):
        with pytest.raises(UnsupportedError):
            call()
    assert complete(llm)


def test_closed(llm):
    chunks = llm.create_completion(PROMPT, max_tokens=20, stream=True)
    next(chunks)
    llm.close()
    llm.close()
    calls = (
        lambda: complete(llm),
        lambda: llm.tokenize(b"text"),
        lambda: llm.detokenize([5]),
        lambda: llm.eval([5]),
        lambda: llm.n_ctx(),
        lambda: llm.token_bos(),
        lambda: llm.kv_cache_usage(),
        lambda: llm.save_state(),
        lambda: llm.reset(),
        lambda: list(chunks),
    )
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()



@pytest.mark.parametrize("explicit", [True, False], ids=["close", "collect"])
def test_a_hundred_loads_do_not_grow(explicit):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()

    def round_trip():
        llm = load("visual", n_ctx=128)
        complete(llm, max_tokens=2)
        if explicit:
            llm.close()
        del llm
        gc.collect()

    growth = []
    gc.freeze()  # what was there before isn't searched: torch's objects alone take a quarter of a second
    try:
        for n in (10, 50, 50):
            before = process.memory_info().rss
            for _ in range(n):
                round_trip()
            growth.append((process.memory_info().rss - before) / n)
    finally:
        gc.unfreeze()
    print(f"growth {growth} bytes a round")
    # the allocator takes a few MB more now and then; what leaks grows both times. The model alone has 1.7 MB
    assert min(growth[1:]) < 20_000
