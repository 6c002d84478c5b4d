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
from eval import score, test_set as held_out_questions, write_questions
from forward import forward
from ggml_qcache.evaluation import read_items
from ggml_qcache_convert import dropped_of
from quality_runs import Prompt
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
        packed = sample(seed, "train", 6)
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
    batch: Batch = collate([sample(seed, "heldout", 6, single=True) for seed in (1, 2)])
    with torch.no_grad():
        out = forward(model, batch)
        places = out.chosen.nonzero()
        # the first answer token of the second branch of each sample
        for n in (0, 1):
            row, slot = (batch.branch[n] == 1).nonzero()[0].tolist()
            target = next(i for i, (s, r, c) in enumerate(places.tolist()) if (s, r) == (n, row) and c >= slot)
            column = places[target][2].item()
            image = [model.config.image_token_id] * model.config.image_seq_length
            ids = [1, *encode("USER: "), *image, *batch.tokens[n, row, slot : column + 1].tolist()]
            wanted = model(input_ids=torch.tensor([ids]), pixel_values=batch.pixels[n : n + 1]).logits[0, -1]
            torch.testing.assert_close(out.logits[target], wanted, atol=2e-3, rtol=2e-3)


def test_score_of_right_answers_is_full():
    tests = held_out_questions(3)
    result = score(tests, [test[3] for test in tests])
    assert result["closed_mean"] == 1.0 and not result["wrong"]
    assert result["caption"] == {"recalled": 1.0, "hallucinated": 0.0}


def test_questions_as_a_file(tmp_path):
    items = read_items(write_questions(tmp_path / "q", 2, 5))
    assert [(item.task, item.question, item.answer) for item in items] == [test[1:] for test in held_out_questions(2, 5)]
    assert {Path(item.image).name for item in items} == {"5.png", "6.png"} and all(Path(item.image).is_file() for item in items)


def test_quality_benchmark(tmp_path):
    path = tmp_path / "quality.json"
    arguments = ["--scenes", "2", "--modes", "visual", "--metrics", "js,output", "--budgets", "0.2", "--calibration-samples", "4"]
    arguments += ["--mixed-budgets", "0.4"]
    assert bench_quality.main([*arguments, "--json", str(path)]) == 0
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    corrected = [f"output + {name}" for name in ("align_heads", "vis_bias", "refit", "all")]
    controls = ["q8_0", "q4_0", "attention dropped", "pruned", "scaled"]
    lazy_rows = ["js", "js + all", "output", "random", *corrected, "output + pruned"]
    mixed = ["mixed, output", *(["mixed, output + all"] if rows["mixed, output"]["lazy_layers"] else [])]
    assert list(rows) == ["none", *controls, *lazy_rows, *mixed]
    none, js = rows["none"], rows["js"]
    assert none["kv_saved"] == none["mean_loss_points"] == none["kl"] == 0 and none["top1_agreement"] == 1
    assert 1 <= none["caption_perplexity"] < 1.5
    for kv_type, row_bytes in (("q8_0", 34), ("q4_0", 18)):
        # K of a layer in a block: 3 heads of 16 rows, in whole cache lines
        assert rows[kv_type]["kv_saved"] == pytest.approx(1 - -(-3 * 16 * row_bytes // 64) * 64 / (3 * 16 * 64))
    assert rows["attention dropped"]["kv_saved"] == 13 / 32  # the second budget's: 12.8 layers
    assert rows["attention dropped"]["mode"] == "off" and rows["attention dropped"]["leaders"].count(-1) == 13
    for method in mixed:
        assert 0.35 < rows[method]["kv_saved"] < 0.5 and 0 < rows[method]["kl"] < rows["attention dropped"]["kl"]
        assert rows[method]["dropped_layers"] == dropped_of(rows[method]["leaders"]) != []
    for method in ("js", "js + all", "output", "random", "pruned", "scaled", "output + pruned", *corrected):
        assert 0.12 < rows[method]["kv_saved"] < 0.35, method
        assert rows[method]["kl"] > 0
    assert rows["output + refit"]["leaders"] == rows["output"]["leaders"]
    assert (rows["output + refit"]["kl"] != rows["output"]["kl"]) == (rows["output + refit"]["refit_step"] > 0)
    assert rows["output"]["refit_step"] is None and rows["output + vis_bias"]["refit_step"] is None
    readme, chart = tmp_path / "README.md", tmp_path / "pareto.png"
    readme.write_text("before\n<!-- bench:quality -->\nold\n<!-- /bench:quality -->\nafter\n")
    assert report.main([str(path), "--write", str(readme), "--pareto", str(chart)]) == 0
    assert f"| js | visual | {len(js['lazy_layers'])} | 0 | {js['kv_saved']:.1%} |" in readme.read_text()
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert set(none["tasks"]) == {"existence", "counting", "colour", "relation", "digit", "caption"}
    # what was computed stays, the untouched model is computed again to compare with
    js["seconds"] = none["seconds"] = 1e6
    begun = {**json.loads(path.read_text()), "commit": "earlier", "rows": [none, js]}
    path.write_text(json.dumps(begun))
    few = ["--modes", "visual", "--metrics", "js", "--budgets", "0.2", "--controls", "", "--calibration-samples", "4"]
    assert bench_quality.main(["--scenes", "2", *few, "--json", str(path), "--resume"]) == 0
    again = json.loads(path.read_text())
    assert again["begun_at_commit"] == "earlier" and [row["seconds"] == 1e6 for row in again["rows"]] == [False, True]
    # corrections are made again on request, on the layers that were chosen
    for method in ("output", *corrected):
        rows[method]["seconds"] = 1e6
    path.write_text(json.dumps({**begun, "rows": [none, rows["output"], *(rows[method] for method in corrected)]}))
    few = ["--modes", "visual", "--metrics", "output", "--budgets", "0.2", "--controls", "corrections", "--calibration-samples", "4"]
    assert bench_quality.main(["--scenes", "2", *few, "--json", str(path), "--resume", "--again", "vis_bias"]) == 0
    again = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert [method for method, row in again.items() if row["seconds"] != 1e6] == ["none", "output + vis_bias"]
    assert again["output + vis_bias"]["kl"] == pytest.approx(rows["output + vis_bias"]["kl"])
    with pytest.raises(SystemExit, match="2 scenes, not 3"):
        bench_quality.main(["--scenes", "3", *few, "--json", str(path), "--resume"])
    path.write_text(json.dumps({**begun, "weights_sha256": "0" * 64}))
    with pytest.raises(SystemExit, match="other weights than those in .*model: sha256 0000"):
        bench_quality.main(["--scenes", "2", *few, "--json", str(path), "--resume"])


def test_scaled_prompts_keep_what_surrounds_the_image():
    rng = np.random.default_rng(0)
    tokens = np.array([1, 5, *[-1] * 144, 7], dtype=np.int32)
    grid = np.add.outer(np.arange(12.0), 2 * np.arange(12.0))  # linear, so it stays linear
    embeddings = np.zeros((147, 3), np.float32)
    embeddings[2:146] = grid.reshape(-1, 1) + np.arange(3)
    prompt = Prompt([0], tokens, embeddings, [], [])
    small = prompt.scaled(6)
    assert small.tokens.tolist() == [1, 5, *[-1] * 36, 7]
    np.testing.assert_allclose(small.embeddings[2:38, 0].reshape(6, 6), grid.reshape(6, 2, 6, 2).mean((1, 3)), rtol=1e-5)
    same = Prompt([0], tokens, rng.normal(size=(147, 3)).astype(np.float32), [], [])
    np.testing.assert_allclose(same.scaled(12).embeddings[2:146], same.embeddings[2:146], rtol=1e-5)
