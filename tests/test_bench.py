"""The benchmarks: their models load in both engines and agree, a tiny run gives what is promised, the report renders."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bench_calibration
import bench_conversion
import bench_decode
import report
from engines import LlamaCppEngine, LlamaCppModel, QcacheEngine
from make_checkpoint import make_checkpoint
from make_model import PRESETS, make_model
from test_convert_text import hf_logits, llama_logits
from transformers import LlavaForConditionalGeneration

from ggml_qcache.native import Model
from ggml_qcache_convert import convert

SHRINK = {"llava-1.5-7b": 16, "llava-1.5-13b": 20, "llava-next-mistral-7b": 8, "llava-onevision-0.5b": 2, "llava-onevision-7b": 4}
# f16 differs in how attention rounds; quantised weights meet activations of eight bits, rounded the other way now and then
NMSE = {"f32": 1e-5, "f16": 1e-5, "q8_0": 1e-3, "q4_0": 1e-3, "q4_k": 1e-3, "q6_k": 1e-3}


def both_logits(path: Path, n_tokens: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the last token in llama.cpp and in ours."""
    peer, ours = LlamaCppModel(path, 0), Model(path)
    prompt = bench_decode.make_prompt(n_tokens, ours.info.n_vocab, seed=3)
    _, theirs = LlamaCppEngine(peer, False, "f16", "f16", 1).prefill(prompt)
    _, logits = QcacheEngine(ours, "none", (), "f16", 1).prefill(prompt)
    peer.close()
    ours.close()
    return theirs, logits


def assert_same_logits(path: Path, weight_type: str) -> None:
    theirs, ours = both_logits(path)
    nmse = np.mean((theirs - ours) ** 2) / np.mean(theirs**2)
    print(f"NMSE {nmse:.1e}, logits of spread {theirs.std():.2f}")
    assert 0.05 < theirs.std() < 50
    assert nmse <= NMSE[weight_type]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_both_engines(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "m.gguf"
    shapes = make_model(preset, path, n_layer=2, weight_type="q8_0", shrink=SHRINK[preset])
    assert shapes.n_head // shapes.n_head_kv == PRESETS[preset].n_head // PRESETS[preset].n_head_kv
    assert shapes.head_dim == PRESETS[preset].head_dim
    assert_same_logits(path, "q8_0")


@pytest.mark.parametrize("weight_type", ["f32", "f16", "q4_0", "q4_k", "q6_k"])
def test_types_in_both_engines(tmp_path: Path, weight_type: str) -> None:
    path = tmp_path / "m.gguf"
    make_model("llava-1.5-7b", path, n_layer=2, weight_type=weight_type, shrink=16)
    assert_same_logits(path, weight_type)


def test_model_is_reproducible(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model("llava-1.5-7b", tmp_path / name, n_layer=1, shrink=16, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("arguments", [{"preset": "llava-9"}, {"weight_type": "q1"}, {"n_layer": 0}, {"shrink": 0}])
def test_model_refusals(tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        make_model(**{"preset": "llava-1.5-7b", "out": tmp_path / "m.gguf", **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lazy", bench_decode.LAZY)
def test_repeated_sequences_own_their_blocks(tmp_path: Path, lazy: str) -> None:
    path = tmp_path / "m.gguf"
    make_model("llava-1.5-7b", path, n_layer=4, shrink=16)
    with Model(path) as model:
        leaders = bench_decode.three_quarters_lazy(4)
        engine = QcacheEngine(model, lazy, leaders, "f16", 1)
        _, logits = engine.prefill(bench_decode.make_prompt(70, model.info.n_vocab, seed=3))
        same = engine.session(70, 1, 4)
        tokens = np.array([301, 301, 301], np.int32)
        same.step(tokens[:1])
        three = engine.session(70, 3, 4)
        three.step(tokens)
        assert three.kv_bytes() == 3 * same.kv_bytes()
        for row in range(3):
            np.testing.assert_allclose(three._context.logits(row), same._context.logits(), rtol=1e-3, atol=1e-3)
        longer = engine.session(200, 2, 4)
        longer.step(tokens[:2])
        assert longer._context.seq_len(0) == longer._context.seq_len(1) == 201


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a tiny run."""
    folder = tmp_path_factory.mktemp("bench")
    make_model("llava-1.5-7b", folder / "m.gguf", n_layer=4, shrink=16)
    status = bench_decode.main(
        [
            "--model", str(folder / "m.gguf"), "--contexts", "64,160", "--seqs", "1,2", "--steps", "3", "--threads", "1",
            "--prefill", "48", "--kv", "f16,q8_0", "--json", str(folder / "r.json"),
        ]
    )  # fmt: skip
    assert status == 0
    return folder / "r.json"


def test_decode_result(result: Path) -> None:
    content = json.loads(result.read_text())
    assert {"commit", "machine", "versions", "command", "read_bandwidth", "prefill", "load_seconds", "rows"} <= set(content)
    assert 0 < content["python_seconds_per_token"] < 5e-3
    rows = content["rows"]
    assert len(rows) == 2 * 2 * (4 + 2 * 3)
    promised = {"context", "n_seq", "lazy", "ms_per_step", "ratio_peer", "ratio_lazy_off", "kv_bytes", "kv_gbps"}
    assert all(promised <= set(row) and row["ms_per_step"] > 0 and row["kv_bytes"] > 0 for row in rows)
    for context in (64, 160):
        case = [row for row in rows if row["context"] == context and row["n_seq"] == 2]
        (peer,) = (row for row in case if row["lazy"] is None and row["ratio_peer"] == 1)
        assert all(row["peer"] == peer["setting"] for row in case)
        size = {(row["kv"], row["lazy"]): row["kv_bytes"] for row in case if row["lazy"]}
        for kv in ("f16", "q8_0"):
            assert size[kv, "global"] < size[kv, "visual"] < size[kv, "none"]
            assert all(row["ratio_lazy_off"] == row["ratio_lazy_off_limit"] == 1 for row in case if row["kv"] == kv and row["lazy"] == "none")
        assert size["q8_0", "none"] == size["f16", "none"] * 17 / 32


def test_decode_refusals(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing")
    assert bench_decode.main(["--model", str(tmp_path / "m.gguf")]) == 1
    assert "bench_decode: error: " in capfd.readouterr().err
    for arguments in (["--contexts", "8"], ["--lazy", "some"], ["--kv", "f16,q9"], ["--seqs", "0"]):
        with pytest.raises(SystemExit):
            bench_decode.main(arguments)


def test_report(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    markers = "<!-- bench:speed -->\nold\n<!-- /bench:speed -->\n<!-- bench:decode -->\nold\n<!-- /bench:decode -->"
    readme.write_text(f"before\n{markers}\nafter\n")
    assert report.main([str(result), "--png", str(tmp_path / "p.png"), "--write", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 160 | 2 | ggml-qcache, lazy global, f16 |" in text
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([str(result)]) == 0
    assert set(capsys.readouterr().out.split("\n")) <= {*text.split("\n")} | {""}
    kernel = json.loads(result.read_text())["kernel"]
    assert kernel and f"m: 2 heads, 2 KV heads of 128; {kernel} | 160 | 2 |" in text
    readme.write_text("no markers")
    assert report.main([str(result), "--write", str(readme)]) == 1
    (tmp_path / "x.json").write_text("{}")
    assert report.main([str(tmp_path / "x.json")]) == 1


def test_calibration_benchmark(tmp_path, capsys):
    path = tmp_path / "calibration.json"
    arguments = ["--preset", "llava-1.5-7b", "--shrink", "32", "--layers", "2,3,4", "--samples", "1", "--threads", "1", "--correct"]
    assert bench_calibration.main([*arguments, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [row["measure"] > 0 for row in result["rows"]] == [True] * 3 and result["n_layer"] == 32
    assert set(result["minutes"]) == {"answer", "measure", "check", "correct"}
    assert "32 layers, 16 images" in capsys.readouterr().out
    assert report.main([str(path)]) == 0
    assert "for 32 layers and 16 images from models with 2, 3, 4 layers" in capsys.readouterr().out


def test_report_of_the_operation_alone(tmp_path, capsys):
    row = {"head_dim": 80, "n_head": 32, "n_head_kv": 8, "type": "q8_0", "n_seq": 8, "gbps": 20.0, "bandwidth_share": 0.8, "cached_gbps": 31.0}
    result = {"benchmark": "lazy_attn", "kernel": "avx2", "threads": 2, "keys": 3072}
    result["rows"] = [{**row, "mode": mode} for mode in ("off", "global", "visual")]
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert report.main([str(tmp_path / "r.json")]) == 0
    assert "| 32 heads, 8 KV heads of 80 | q8_0 | 8 | 20.0 (80 %) | 20.0 (80 %) | 20.0 (80 %) | 31.0 |" in capsys.readouterr().out


def test_report_of_products(tmp_path, capsys):
    rows = [
        {"type": "q4_0", "columns": n, "weights": weights, "gflops": gflops * n, "ratio_best": gflops / 150}
        for n in (1, 8) for weights, gflops in (("ours", 300.0), ("CPU", 100.0), ("CPU_REPACK", 150.0))
    ]  # fmt: skip
    result = {"benchmark": "matmul", "kernel": "avx512vnni", "threads": 2, "k": 4096, "m": 11008, "rows": rows}
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert report.main([str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    assert "| type | 1 row | 8 rows |" in shown and "| q4_0 | 300 (2.0 x) | 2400 (2.0 x) |" in shown


def test_extrapolation():
    assert bench_calibration.extrapolated([2, 4, 6], [5, 9, 13], 1, 32) == pytest.approx(65)
    assert bench_calibration.extrapolated([2, 4, 6], [4, 16, 36], 2, 32) == pytest.approx(1024)


def test_checkpoint_is_one_of_transformers(tmp_path: Path) -> None:
    total = make_checkpoint(tmp_path / "hf", n_layer=2, shrink=16, shard_bytes=2_000_000)
    shards = sorted(tmp_path.glob("hf/*.safetensors"))
    assert len(shards) > 2 and sum(file.stat().st_size for file in shards) > total
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype="float32")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    convert(tmp_path / "hf", tmp_path / "m.gguf", tmp_path / "mm.gguf", "f32")
    ids = np.random.default_rng(0).integers(4, 300, 24).tolist()
    logits = llama_logits(tmp_path / "m.gguf", ids)
    expected = hf_logits(model, ids)
    assert 0.05 < expected.std() < 50 and np.mean((logits - expected) ** 2) / np.mean(expected**2) < 1e-5
    with pytest.raises(ValueError, match="at least one layer, got 0"):
        make_checkpoint(tmp_path / "none", n_layer=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_conversion_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "conversion.json"
    assert bench_conversion.main(["--layers", "1", "--outtypes", "q8_0", "--repeats", "2", "--shrink", "16", "--folder", str(tmp_path), "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["seconds"] > 0 and 0 < row["peak_bytes"] < 1e9 and 0 < row["written_bytes"] < row["read_bytes"]
    assert "1 layers, q8_0:" in capsys.readouterr().out and list(tmp_path.iterdir()) == [path]
    assert row["disk_share"] > 0 and report.main([str(path)]) == 0
    assert f"| 1 | q8_0 | {row['read_bytes'] / 1e9:.2f} |" in capsys.readouterr().out
