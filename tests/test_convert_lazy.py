"""Lazy layers in the converter: the specification, the leaders, the keys and the tensors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from hf_models import build_llava, nmse
from test_convert_text import hf_logits, ids_for, llama_logits

from ggml_qcache_convert import convert, dropped_of, lazy_of, leaders_of, parse_layers, spec_of
from ggml_qcache_convert.cli import main


@pytest.mark.parametrize(
    ("spec", "lazy", "dropped"),
    [
        ("none", [], []),
        (" None ", [], []),
        ("1", [1], []),
        ("31", [31], []),
        ("9-11,18,30-31", [9, 10, 11, 18, 30, 31], []),
        ("5-5", [5], []),
        (" 3 , 1 - 2 ", [1, 2, 3], []),
        ("1-31", list(range(1, 32)), []),
        ("drop:0", [], [0]),
        ("9-11,drop:20-22", [9, 10, 11], [20, 21, 22]),
        ("DROP : 7 , 5,drop:3 - 4,6", [5, 6], [3, 4, 7]),  # drop: counts for its own part alone
    ],
)
def test_parse_layers(spec: str, lazy: list[int], dropped: list[int]) -> None:
    assert parse_layers(spec, 32) == (lazy, dropped)
    assert leaders_of(spec, 32) == leaders_of(lazy, 32, dropped)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("32", "layer 32 is out of range, the model has layers 0 to 31"),
        ("5-99999999999", "layer 99999999999 is out of range"),
        ("15-9", "the range 15-9 is reversed"),
        ("9-12,11", "lazy layer 11 is named twice"),
        ("7,7", "lazy layer 7 is named twice"),
        ("0", "layer 0 can't be lazy"),
        ("0-3", "layer 0 can't be lazy"),
        ("", "'' is neither"),
        ("1,,2", "'' is neither"),
        ("a", "'a' is neither"),
        ("-1", "'-1' is neither"),
        ("1-", "'1-' is neither"),
        ("1-2-3", "'1-2-3' is neither"),
        ("1.5", "'1.5' is neither"),
        ("auto", "'auto' is neither"),
        ("1;2", "'1;2' is neither"),
        ("none,1", "'none' is neither"),
        ("drop", "'drop' is neither"),
        ("drop:", "'drop:' is neither"),
        ("drop:1,drop:none", "'drop:none' is neither"),
        ("drop:drop:1", "'drop:drop:1' is neither"),
        ("-5", "'-5' is neither"),
        ("drop:5,4-6", "layer 5 can't be both lazy and dropped"),
        ("drop:3,drop:2-4", "dropped layer 3 is named twice"),
        ("drop:30-32", "layer 32 is out of range"),
        ("drop:0-2,3", "layer 3 can't be lazy: every layer before it is dropped"),
    ],
)
def test_parse_layers_refuses(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        leaders_of(spec, 32)


def test_leaders() -> None:
    assert leaders_of([], 4) == [0, 1, 2, 3]
    assert leaders_of([1, 2, 3], 4) == [0, 0, 0, 0]
    assert leaders_of([5, 2, 3], 7) == [0, 1, 1, 1, 4, 4, 6]
    assert leaders_of([2, 5], 7, [1, 4]) == [0, -1, 0, 3, -1, 3, 6]  # across dropped layers
    assert leaders_of([2], 3, [0]) == [-1, 1, 1]
    assert leaders_of([], 3, range(3)) == [-1, -1, -1]


def test_specifications_of_leaders() -> None:
    for leaders, spec in (
        ([0, 1, 2], "none"),
        ([0, 0, 0, 3, 3, -1, 6, 6], "1-2,4,7,drop:5"),
        ([-1, 1, -1, -1, 1, -1], "4,drop:0,drop:2-3,drop:5"),
    ):
        assert spec_of(leaders) == spec and leaders_of(spec, len(leaders)) == leaders
        assert {*lazy_of(leaders)} | {*dropped_of(leaders)} == {i for i, of in enumerate(leaders) if of != i}


@pytest.mark.parametrize(
    ("layers", "message"),
    [([0], "layer 0"), ([4], "layer 4 is out of range"), ([-1], "layer -1 is"), ([2, 2], "twice")],
)
def test_leaders_refuse(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leaders_of(layers, 4)


def test_lazy_layers_need_the_standard_library_only() -> None:
    package = Path(sys.modules["ggml_qcache_convert"].__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(package)!r}); import ggml_qcache_convert.lazy_layers;"
        "print('numpy' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def read(path: Path) -> tuple[dict[str, object], set[str]]:
    """The qcache keys and the tensor names of a GGUF."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if name.startswith("qcache.")}
    return keys, {tensor.name for tensor in reader.tensors}


def test_plain_model_has_no_lazy_keys(tmp_path: Path) -> None:
    build_llava(tmp_path / "hf", n_layer=2)
    result = convert(tmp_path / "hf", tmp_path / "m.gguf", None, lazy_layers="none", lazy_mode="global")
    assert read(tmp_path / "m.gguf")[0] == {}
    assert result.leaders == (0, 1)


@pytest.mark.parametrize("mode", ["visual", "global"])
@pytest.mark.parametrize("keep_qk", [False, True])
def test_keys_and_tensors(tmp_path: Path, mode: str, keep_qk: bool) -> None:
    model = build_llava(tmp_path / "hf", n_layer=6, bias=True)
    result = convert(tmp_path / "hf", tmp_path / "m.gguf", None, "f32", "1-2,4", mode, keep_qk)
    keys, names = read(tmp_path / "m.gguf")
    assert keys == {"qcache.version": 1, "qcache.lazy.mode": mode, "qcache.lazy.leader": [0, 0, 0, 3, 3, 5]}
    assert result.leaders == (0, 0, 0, 3, 3, 5)
    left_out = {
        f"blk.{layer}.attn_{part}.{suffix}" for layer in (1, 2, 4) for part in "qk" for suffix in ("weight", "bias")
    }
    if mode == "global" and not keep_qk:
        assert not left_out & names
        assert "blk.3.attn_q.weight" in names and "blk.1.attn_v.weight" in names
    else:
        assert left_out <= names
        ids = ids_for(model.config.text_config.vocab_size)
        assert nmse(llama_logits(tmp_path / "m.gguf", ids), hf_logits(model, ids)) <= 1e-5


def test_leader_type_is_i32(tmp_path: Path) -> None:
    build_llava(tmp_path / "hf", n_layer=2, dtype=torch.float16)
    convert(tmp_path / "hf", tmp_path / "m.gguf", None, lazy_layers=[1])
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert [t.name for t in fields["qcache.lazy.leader"].types] == ["ARRAY", "INT32"]
    assert [t.name for t in fields["qcache.version"].types] == ["UINT32"]


@pytest.mark.parametrize("mode", ["visual", "global"])
@pytest.mark.parametrize("keep_qk", [False, True])
def test_dropped_layers_lose_their_attention_tensors(tmp_path: Path, mode: str, keep_qk: bool) -> None:
    model = build_llava(tmp_path / "hf", n_layer=6, bias=True)
    result = convert(tmp_path / "hf", tmp_path / "m.gguf", None, "f32", "2,drop:0,drop:3-4", mode, keep_qk)
    keys, names = read(tmp_path / "m.gguf")
    assert keys == {"qcache.version": 2, "qcache.lazy.mode": mode, "qcache.lazy.leader": [-1, 1, 1, -1, -1, 5]}
    assert result.leaders == (-1, 1, 1, -1, -1, 5)
    convert(tmp_path / "hf", tmp_path / "plain.gguf", None, "f32")
    every = read(tmp_path / "plain.gguf")[1]
    attention = {name for name in every for layer in (0, 3, 4) if name.startswith(f"blk.{layer}.attn_")}
    assert {name.split(".", 2)[2] for name in attention} >= {"attn_norm.weight", "attn_q.bias", "attn_v.weight", "attn_output.weight"}
    shared = {name for name in every if name.startswith(("blk.2.attn_q.", "blk.2.attn_k."))} if mode == "global" else set()
    assert names == (every if keep_qk else every - attention - shared)
    if keep_qk:
        ids = ids_for(model.config.text_config.vocab_size)
        assert nmse(llama_logits(tmp_path / "m.gguf", ids), hf_logits(model, ids)) <= 1e-5


def test_a_gguf_copied_with_dropped_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_llava(tmp_path / "hf", n_layer=4)
    convert(tmp_path / "hf", tmp_path / "plain.gguf", None, "q8_0")
    convert(tmp_path / "hf", tmp_path / "direct.gguf", None, "q8_0", "2,drop:1", "global")
    copied = tmp_path / "copied.gguf"
    assert main([str(tmp_path / "plain.gguf"), "--outfile", str(copied), "--lazy-layers", "2,drop:1", "--lazy-mode", "global"]) == 0
    assert "1 layers without attention: 1" in capsys.readouterr().out
    assert read(copied) == read(tmp_path / "direct.gguf")
    # what has gone is gone, what is left can be dropped too
    assert main([str(copied), "--outfile", str(tmp_path / "o.gguf"), "--lazy-layers", "none", "--quiet"]) == 1
    assert "has no blk.1.attn_norm.weight: layer 1 was lazy in global mode, or dropped, when it was converted" in capsys.readouterr().err
    assert main([str(copied), "--outfile", str(tmp_path / "o.gguf"), "--lazy-layers", "drop:1-2", "--quiet"]) == 0
    assert read(tmp_path / "o.gguf")[0]["qcache.lazy.leader"] == [0, -1, -1, 3]
