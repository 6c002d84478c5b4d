"""`qcache eval`: its data, its scores against what the models really say, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_llava import N_LAYER, ask, load, picture, tiny_llava, user

from ggml_qcache.cli import main
from ggml_qcache.evaluation import Item, evaluate, normalise, read_items, sentences

LAZY = {"lazy_layers": "2-3,5-7", "lazy_mode": "global"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of three pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    return [str(folder / f"{seed}.png") for seed in range(3)]


def test_scores_are_what_the_models_say(images: list[str]) -> None:
    with load("plain", lazy_layers="none") as plain, load("plain", **LAZY) as lazy:
        questions = ["How many?", "What colour?", "Where?"]
        said = [ask(plain, [user(question, image)], 6).strip() for question, image in zip(questions, images)]
        # the untouched model is right but for the last; the tasks weigh the same
        items = [Item(image, question, text, "a") for image, question, text in zip(images, questions, said)]
        items += [Item(images[0], "Why?", "No. Nobody knows", "b")]
        first, second = evaluate([("untouched", plain), ("lazy", lazy)], items, 6)
        lazily = [ask(lazy, [user(question, image)], 6).strip() for question, image in zip(questions, images)]
    assert first["tasks"]["a"] == {"n": 3, "accuracy": 1.0, "stderr": 0.0} and first["tasks"]["b"]["accuracy"] == 0
    agree = sum(normalise(a) == normalise(b) for a, b in zip(said, lazily))
    assert second["tasks"]["a"]["accuracy"] == pytest.approx(agree / 3)
    assert second["mean_loss_points"] == pytest.approx(100 * (1 - agree / 3) / 2)
    assert first["kl"] == first["mean_loss_points"] == first["kv_saved"] == 0 and first["top1_agreement"] == 1
    assert second["kl"] > 1e-4 and second["top1_agreement"] < 1
    assert second["mode"] == "global" and second["lazy_layers"] == [2, 3, 5, 6, 7]
    assert second["kv_saved"] == pytest.approx(5 / 2 / N_LAYER)  # in global mode every lazy layer saves its K
    assert first["sentences"]["recalled"] < 1  # of the answer that nobody gives


def test_perplexity_is_that_of_the_answer(images: list[str]) -> None:
    item = Item(images[0], "How many?", "three of them", "all")
    with load("plain", lazy_layers="none", logits_all=True) as llm:
        (row,) = evaluate([("untouched", llm)], [item], 4)
        llm.create_chat_completion([user(item.question, item.image)], temperature=0.0, max_tokens=1)
        answer = [*llm.tokenize(b" three of them", add_bos=False), llm.token_eos()]
        # one token at a time, after the prompt
        nll = 0.0
        for token in answer:
            logits = llm.scores[llm.n_tokens - 1].astype(np.float64)
            nll += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token]
            llm.eval([token])
    assert row["perplexity"] == pytest.approx(np.exp(nll / len(answer)), rel=1e-3)


def test_continuation_logits(images: list[str]) -> None:
    with load("visual", logits_all=True) as llm:
        tokens = llm.tokenize(b"How many red squares are there in all")
        llm.eval(tokens)
        expected = llm.scores[4 : len(tokens) - 1].copy()
        np.testing.assert_allclose(llm.continuation_logits(5, tokens[5:]), expected, rtol=1e-3, atol=1e-4)
        assert llm.n_tokens == 0 and llm.kv_cache_usage()["bytes"] == 0
        llm.eval(tokens)
        for n_past, rest in ((0, [5]), (len(tokens) + 1, [5]), (3, [])):
            with pytest.raises(ValueError, match=f"{len(rest)} tokens after {n_past} of {len(tokens)}"):
                llm.continuation_logits(n_past, rest)


def test_sentences() -> None:
    assert sentences("There is one.  At the top, a Cat.\nAnd so on.") == ["there is one", "at the top, a cat", "and so on"]
    assert sentences(" . ") == [] and normalise(" Yes. ") == "yes"


def test_data(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"image": "a.png", "question": "Q", "answer": "A", "task": "t"}\n\n{"image": "data:image/png;base64,xx", "question": "Q", "answer": "B"}\n'
    )
    assert read_items(path) == [Item(str(tmp_path / "a.png"), "Q", "A", "t"), Item("data:image/png;base64,xx", "Q", "B", "all")]
    for text, message in (
        ("", "has no questions"),
        ("{", "line 1: not JSON"),
        ('\n{"image": "a.png", "answer": 3}', "line 2: question, answer missing or no text"),
        ("[1]", "line 1: image, question, answer missing"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_items(path)


def test_command(tmp_path: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    files, data, out = tiny_llava(), tmp_path / "q.jsonl", tmp_path / "rows.json"
    lines = [json.dumps({"image": image, "question": "How many?", "answer": "3", "task": "counting"}) for image in images]
    data.write_text("\n".join(lines))
    common = ["eval", files.visual, "--mmproj", files.mmproj, "--data", str(data), "--max-tokens", "3", "--n-ctx", "128"]
    assert main([*common, "--against", files.plain, "--json", str(out)]) == 0
    shown = capsys.readouterr()
    assert "3 questions" in shown.out and "KL divergence" in shown.out and "visual.gguf" in shown.out and "100%" in shown.err
    untouched, lazy = json.loads(out.read_text())["rows"]
    assert untouched["lazy_layers"] == [] and lazy["lazy_layers"] == [2, 3, 5, 6, 7]
    assert main([*common, "--limit", "1", "--no-progress", "--type-k", "q4_0"]) == 0
    shown = capsys.readouterr()
    assert "1 questions" in shown.out and "KL divergence" not in shown.out and shown.err == ""
    for arguments, message in (
        (["--limit", "0"], "--limit 0 leaves no questions"),
        (["--data", str(tmp_path / "none")], "No such file"),
        (["--against", str(tmp_path / "none")], "there is no file"),
    ):
        assert main([*common, *arguments]) == 1
        assert message in capsys.readouterr().err
    data.write_text(json.dumps({"image": "nowhere.png", "question": "Q", "answer": "A"}))
    assert main(common) == 1
    assert "nowhere.png" in capsys.readouterr().err
