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

from ggml_qcache_convert import convert, leaders_of, parse_layers


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("none", []),
        (" None ", []),
        ("1", [1]),
        ("31", [31]),
        ("9-11,18,30-31", [9, 10, 11, 18, 30, 31]),
        ("5-5", [5]),
        (" 3 , 1 - 2 ", [1, 2, 3]),
        ("1-31", list(range(1, 32))),
    ],
)
def test_parse_layers(spec: str, layers: list[int]) -> None:
    assert parse_layers(spec, 32) == layers


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
    ],
)
def test_parse_layers_refuses(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_layers(spec, 32)


def test_leaders() -> None:
    assert leaders_of([], 4) == [0, 1, 2, 3]
    assert leaders_of([1, 2, 3], 4) == [0, 0, 0, 0]
    assert leaders_of([5, 2, 3], 7) == [0, 1, 1, 1, 4, 4, 6]


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
