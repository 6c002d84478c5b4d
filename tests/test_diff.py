"""`qcache diff` on files that are the same, and that differ in known things."""

import json
from pathlib import Path

import numpy as np
import pytest
from core_helpers import rewrite_gguf
from gguf import GGUFReader, GGUFValueType
from tiny_llava import tiny_llava

from ggml_qcache.cli import main
from ggml_qcache.comparison import diff_files
from ggml_qcache_convert.make_lazy import make_lazy

V = "blk.3.attn_v.weight"


@pytest.fixture(autouse=True)
def built() -> None:
    """Builds the model before a test captures output."""
    tiny_llava()


def plain() -> Path:
    return Path(tiny_llava().plain)


def tensor(path: Path, name: str) -> np.ndarray:
    return np.array(next(one.data for one in GGUFReader(path).tensors if one.name == name))


def test_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = rewrite_gguf(plain(), tmp_path / "copy.gguf", {"general.name": None, "a": (GGUFValueType.STRING, "x")})
    copy = rewrite_gguf(copy, tmp_path / "again.gguf", {"a": None, "general.name": (GGUFValueType.STRING, "checkpoint")})
    assert copy.read_bytes() != plain().read_bytes()  # another order of the keys
    for other in (plain(), copy):
        assert main(["diff", str(plain()), str(other)]) == 0
        assert capsys.readouterr() == ("", "")
    assert main(["diff", tiny_llava().mmproj, tiny_llava().mmproj, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_keys(tmp_path: Path) -> None:
    scores = np.array(GGUFReader(plain()).get_field("tokenizer.ggml.scores").contents(), np.float32)
    keys = {
        "general.name": (GGUFValueType.STRING, "other"),
        "llama.context_length": (GGUFValueType.UINT64, 512),
        "tokenizer.chat_template": None,
        "new.key": (GGUFValueType.FLOAT32, 1.5),
        "tokenizer.ggml.scores": (GGUFValueType.ARRAY, scores[:-2]),
    }
    facts = diff_files(plain(), rewrite_gguf(plain(), tmp_path / "b.gguf", keys))
    assert facts["same"] is False and facts["tensors"] == {} and facts["lazy"] is None
    assert facts["metadata"].pop("tokenizer.chat_template")["b"] == "(missing)"
    assert facts["metadata"] == {
        "general.name": {"a": "'checkpoint'", "b": "'other'"},
        "llama.context_length": {"a": "512 (uint32)", "b": "512 (uint64)"},
        "new.key": {"a": "(missing)", "b": "1.5"},
        "tokenizer.ggml.scores": {"a": f"{len(scores)} values, [{len(scores) - 2}] is {scores[-2]}", "b": f"{len(scores) - 2} values"},
    }


def test_tensors(tmp_path: Path) -> None:
    values = tensor(plain(), V)
    near, broken = values.copy(), values.copy()
    near[5, 7] += 0.25
    broken[0, :3] = np.nan, np.inf, values[0, 2] + 1
    other = {V: near, "blk.2.attn_v.weight": None, "extra": np.zeros(3, np.float32), "blk.1.attn_v.weight": values[:4], "blk.4.attn_v.weight": broken}
    facts = diff_files(
        rewrite_gguf(plain(), tmp_path / "a.gguf", tensors={"blk.4.attn_v.weight": values}),
        rewrite_gguf(plain(), tmp_path / "b.gguf", tensors=other),
    )
    shape = f"f32 {list(values.shape)}"
    assert facts["metadata"] == {} and set(facts["tensors"]) == set(other)
    got = facts["tensors"]
    assert got[V]["max_abs_difference"] == pytest.approx(0.25) and got[V]["max_abs"] == np.abs(values).max() and got[V]["n_not_finite"] == 0
    assert got["blk.2.attn_v.weight"] == {"a": shape, "b": "(missing)"} and got["extra"] == {"a": "(missing)", "b": "f32 [3]"}
    assert got["blk.1.attn_v.weight"] == {"a": shape, "b": f"f32 [4, {values.shape[1]}]"}
    assert got["blk.4.attn_v.weight"]["n_not_finite"] == 2 and got["blk.4.attn_v.weight"]["max_abs_difference"] == pytest.approx(1)


def test_types_and_lazy_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_lazy(plain(), tmp_path / "b.gguf", "2-3", "visual", outtype="q8_0")
    assert main(["diff", str(plain()), str(tmp_path / "b.gguf"), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["lazy"] == {
        "a": {"mode": "off", "lazy_layers": [], "dropped_layers": []},
        "b": {"mode": "visual", "lazy_layers": [2, 3], "dropped_layers": []},
    }
    assert set(facts["metadata"]) == {"qcache.version", "qcache.lazy.mode", "qcache.lazy.leader", "general.file_type"}
    assert set(facts["tensors"]) == {one.name for one in GGUFReader(plain()).tensors if len(one.shape) == 2}
    one = facts["tensors"][V]
    # a step of q8_0 is 1/127 of the largest value of its block, and rounding errs by half of one
    assert one["b"].startswith("q8_0 [") and 0 < one["max_abs_difference"] <= one["max_abs"] / 127 / 2 * 1.01


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    files = tiny_llava()
    assert main(["diff", files.visual, files.global_]) == 1
    out = capsys.readouterr().out
    assert "Lazy Blocks of a: visual mode, lazy layers 2, 3, 5, 6, 7" in out and "Lazy Blocks of b: global mode" in out
    assert "metadata that differs: 1" in out and "tensors that differ: 10" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("blk.2.attn_q.weight"))
    assert row == ["blk.2.attn_q.weight", "f32", "[64,", "64]", "(missing)"]


def test_trouble_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(plain().read_bytes()[:3000])
    for other, message in (("x.gguf", "truncated or damaged"), ("none.gguf", "No such file")):
        assert main(["diff", str(plain()), str(tmp_path / other)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("qcache: error: ") and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["diff", str(plain())])
    assert caught.value.code == 2
