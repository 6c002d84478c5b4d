"""The mini-LLaVA's scenes, training targets and the quality benchmark."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
MINI_LLAVA = ROOT / "examples" / "mini-llava"
sys.path[:0] = [str(ROOT / "bench"), str(MINI_LLAVA)]

import bench_quality
import report
from eval import score, test_set as held_out_questions
from forward import forward
from packing import Batch, collate, encode, sample, tokenizer
from scenes import SHAPES, make_scene, mentions
from transformers import LlavaForConditionalGeneration


@pytest.mark.parametrize(
    "question, fits",
    [
        ("How many large red stars are there?", lambda t: (t.size, t.colour, t.kind) == ("large", "red", "star")),
        ("Is there a circle?", lambda t: t.kind == "circle"),
        ("How many green shapes do you see?", lambda t: t.colour == "green"),
        ("How many digits are there?", lambda t: t.is_digit),
        ("Can you see the digit 7?", lambda t: t.value == 7),
    ],
)
def test_mentions_are_the_objects_that_fit(question, fits):
    for seed in range(20):
        scene = make_scene(seed)
        ((end, things),) = mentions(scene, question)
        assert things == [t for t in scene.things if fits(t)]
        assert question[end] in " ?"


def test_a_place_is_not_a_mention():
    assert mentions(make_scene(0), "What colour is the shape at the top left?") == []


def test_grounds_lie_on_the_last_word_of_a_phrase():
    words = {*SHAPES, *(f"{shape}s" for shape in SHAPES), "shape", "shapes", "digits", *map(str, range(10))}
    for seed in range(10):
        packed = sample(seed, "train")
        rows, slots = np.nonzero(packed["grounds"] >= 0)
        assert len(rows) > 10
        for row, slot in zip(rows, slots):
            start = slot
            while start and packed["branch"][row, start - 1] == packed["branch"][row, slot]:
                start -= 1
            text = tokenizer().decode(packed["tokens"][row, start : slot + 1])
            assert text.split()[-1].rstrip("?") in words, text
            assert packed["grounds"][row, slot] < 2**9


def test_packed_branches_are_dialogues_on_their_own():
    model = LlavaForConditionalGeneration.from_pretrained(MINI_LLAVA / "model", dtype=torch.float32).eval()
    batch: Batch = collate([sample(seed, "heldout", single=True) for seed in (1, 2)])
    with torch.no_grad():
        out = forward(model, batch)
        places = out.chosen.nonzero()
        # the first answer token of the second branch of each sample
        for n in (0, 1):
            row, slot = (batch.branch[n] == 1).nonzero()[0].tolist()
            target = next(i for i, (s, r, c) in enumerate(places.tolist()) if (s, r) == (n, row) and c >= slot)
            column = places[target][2].item()
            ids = [1, *encode("USER: "), *[model.config.image_token_id] * 144, *batch.tokens[n, row, slot : column + 1].tolist()]
            wanted = model(input_ids=torch.tensor([ids]), pixel_values=batch.pixels[n : n + 1]).logits[0, -1]
            torch.testing.assert_close(out.logits[target], wanted, atol=2e-3, rtol=2e-3)


def test_score_of_right_answers_is_full():
    tests = held_out_questions(3)
    result = score(tests, [test[3] for test in tests])
    assert result["closed_mean"] == 1.0 and not result["wrong"]
    assert result["caption"] == {"recalled": 1.0, "hallucinated": 0.0}


def test_quality_benchmark(tmp_path):
    path = tmp_path / "quality.json"
    arguments = ["--scenes", "2", "--modes", "visual", "--metrics", "js", "--budgets", "0.2", "--calibration-samples", "2"]
    assert bench_quality.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "q8_0", "js", "random"]
    none, q8_0, js, _ = rows
    assert none["kv_saved"] == none["mean_loss_points"] == none["kl_first_token"] == 0
    assert q8_0["kv_saved"] == pytest.approx(1 - 34 / 64)
    assert 0.15 < js["kv_saved"] < 0.3 and len(js["lazy_layers"]) > 2
    readme, chart = tmp_path / "README.md", tmp_path / "pareto.png"
    readme.write_text("before\n<!-- bench:quality -->\nold\n<!-- /bench:quality -->\nafter\n")
    assert report.main([str(path), "--write", str(readme), "--pareto", str(chart)]) == 0
    assert f"| js | visual | {len(js['lazy_layers'])} | {js['kv_saved']:.1%} |" in readme.read_text()
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert set(none["tasks"]) == {"existence", "counting", "colour", "relation", "digit", "caption"}
