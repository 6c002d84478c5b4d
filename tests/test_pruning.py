"""Visual tokens pruned after the first layers: against plain contexts, and what is refused."""

import numpy as np
import pytest
from core_helpers import N_LAYER, CoreModels, assert_close, decode, make_context, make_prompt

from ggml_qcache.errors import ContextFullError, InvalidArgumentError
from ggml_qcache.pruning import PrunedContext
from ggml_qcache_convert import leaders_of

THREADS = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
LEADERS = leaders_of([4, 5, 7], N_LAYER)


@pytest.mark.parametrize("mode", ["off", "visual", "global"])
def test_nothing_pruned_equals_a_plain_context(core_models: CoreModels, mode: str) -> None:
    model = core_models["llama-gqa-32"].native
    prompt = make_prompt(model, "t7 v37 t9")
    lazy = {"lazy_mode": mode} | ({} if mode == "off" else {"lazy_leader": LEADERS})
    with make_context(model, n_seq_max=2, **lazy) as plain, PrunedContext(model, 3, 1.0, n_seq_max=2, **THREADS, **lazy) as pruned:
        expected = [decode(plain, prompt, 1)[-1]]
        assert pruned.prefill(prompt.tokens, prompt.embeddings, prompt.visual, 1).tolist() == list(range(len(prompt)))
        got = [pruned.logits()]
        for token in (9, 4, 11):
            plain.decode([token], seq_id=1)
            pruned.decode([token], [1])
            expected.append(plain.logits())
            got.append(pruned.logits())
        assert_close(np.stack(got), np.stack(expected), "rounding")
        assert pruned.kv_usage()["bytes"] == plain.kv_usage()["bytes"]


@pytest.mark.parametrize("shape", ["llama-mha-64", "qwen2-gqa-64"])
def test_what_stays_is_what_was_attended_to(core_models: CoreModels, shape: str) -> None:
    model = core_models[shape].native
    prompt = make_prompt(model, "t5 v40 t4 v10 t6")
    with make_context(model, block_tokens=16) as plain, PrunedContext(model, 2, 0.25, block_tokens=16, **THREADS) as pruned:
        plain.capture_start("probs", "hidden")
        decode(plain, prompt)
        attention = plain.captured("probs", 1).mean(0)
        hidden = np.stack([plain.captured("hidden", 1, row) for row in range(len(prompt))])
        kept = pruned.prefill(prompt.tokens, prompt.embeddings, prompt.visual)
        visual = np.flatnonzero(prompt.visual)
        gone = np.setdiff1d(visual, kept)
        assert len(gone) == 38 and set(np.flatnonzero(~prompt.visual)) <= set(kept)
        assert attention[gone].max() <= attention[np.intersect1d(visual, kept)].min()
        # the later layers see the rest of the rows, at their places
        with make_context(model, layer_first=2) as rest:
            rest.decode(None, hidden[kept], modality=prompt.visual[kept], pos=kept)
            assert_close(pruned.logits()[None], rest.logits()[None], "rounding")
        # 2 layers hold everything, 6 what is left
        assert pruned.kv_usage()["bytes"] < 0.9 * plain.kv_usage()["bytes"]


def test_sequences_and_rewinding(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    prompts = [make_prompt(model, pattern, seed) for seed, pattern in enumerate(["t5 v30 t4", "t2 v9 t3"])]
    with PrunedContext(model, 2, 0.5, n_seq_max=2, **THREADS) as pruned:
        alone = []
        for prompt in prompts:
            pruned.clear()
            pruned.prefill(*prompt.fields())
            first = pruned.logits()
            pruned.decode([7], [0])
            alone.append((first, pruned.logits()))
        pruned.clear()
        for seq, prompt in enumerate(prompts):
            pruned.prefill(*prompt.fields(), seq)
            assert_close(pruned.logits()[None], alone[seq][0][None], "rounding")
        for _ in range(2):
            pruned.decode([7, 7], [0, 1])
            assert_close(np.stack([pruned.logits(0), pruned.logits(1)]), np.stack([last for _, last in alone]), "rounding")
            for seq, prompt in enumerate(prompts):
                pruned.seq_rm(seq, len(prompt))
        one_by_one = []
        for token in (7, 8, 9):
            pruned.decode([token], [1])
            one_by_one.append(pruned.logits())
        pruned.seq_rm(1, len(prompts[1]))
        pruned.decode([7, 4, 8, 9], [1, 0, 1, 1])
        assert_close(np.stack([pruned.logits(row) for row in (0, 2, 3)]), np.stack(one_by_one), "rounding")
        with pytest.raises(ValueError, match="lies within the prompt of 39 tokens"):
            pruned.seq_rm(0, 20)


def test_refused(core_models: CoreModels) -> None:
    model = core_models["llama-gqa-32"].native
    for layer, keep, message in ((0, 0.5, "layer=0"), (N_LAYER, 0.5, f"after 1 to {N_LAYER - 1} layers"), (2, 0.0, "keep=0.0"), (2, 1.1, "keep=1.1")):
        with pytest.raises(ValueError, match=message):
            PrunedContext(model, layer, keep)
    with pytest.raises(InvalidArgumentError, match="its leader 3 comes before layer_first 4"):
        PrunedContext(model, 4, 0.5, lazy_mode="visual", lazy_leader=LEADERS)
    prompt = make_prompt(model, "t5 v30 t4")
    with PrunedContext(model, 2, 0.5, **{**THREADS, "n_ctx": 40}) as pruned:
        with pytest.raises(ContextFullError):
            pruned.prefill(*make_prompt(model, "t5 v60").fields())
        pruned.prefill(*prompt.fields())
        with pytest.raises(ValueError, match="sequence 0 holds 39 tokens"):
            pruned.prefill(*prompt.fields())
        pruned.decode([5], [0])
        expected = pruned.logits()
        with pytest.raises(ContextFullError):
            pruned.decode([5], [0])
        pruned.seq_rm(0, 39)
        pruned.decode([5], [0])
        assert_close(pruned.logits()[None], expected[None], "rounding")
