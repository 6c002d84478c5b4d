"""`qcache validate` against files that are right, and wrong in one thing each."""

from pathlib import Path

import numpy as np
import pytest
from core_helpers import rewrite_gguf
from gguf import GGUFValueType
from tiny_llava import N_LAYER, tiny_llava

from ggml_qcache.cli import main
from ggml_qcache.validation import validate_file

LEADER = [0, 1, 1, 1, 4, 4, 4, 4]
VERSION_2 = (GGUFValueType.UINT32, 2)


def leaders(**changed: int) -> tuple[GGUFValueType, object]:
    """The leaders with some changed, by layer: ``l3=2``."""
    return GGUFValueType.ARRAY, np.array([changed.get(f"l{layer}", of) for layer, of in enumerate(LEADER)], dtype=np.int32)


def test_files_of_ours_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    files = tiny_llava()
    for file in (files.plain, files.visual, files.global_, files.dropped):
        assert validate_file(file) == []
    assert main(["validate", files.visual]) == 0
    assert capsys.readouterr().out.endswith(f"{files.visual}: valid\n")
    assert validate_file(files.mmproj)[0].startswith("'clip' is no text model")


def test_version_2_without_dropped_layers_is_valid(tmp_path: Path) -> None:
    assert validate_file(rewrite_gguf(Path(tiny_llava().visual), tmp_path / "m.gguf", {"qcache.version": VERSION_2})) == []


def test_attention_tensors_of_a_dropped_layer_may_be_there(tmp_path: Path) -> None:
    keys = {"qcache.version": VERSION_2, "qcache.lazy.leader": leaders(l2=-1, l0=-1)}
    assert validate_file(rewrite_gguf(Path(tiny_llava().visual), tmp_path / "m.gguf", keys)) == []


@pytest.mark.parametrize(
    ("file", "keys", "tensors", "message"),
    [
        ("visual", {"qcache.version": (GGUFValueType.UINT32, 3)}, {}, "qcache.version is 3, known are 1 and 2"),
        ("visual", {"qcache.lazy.leader": leaders(l2=-1)}, {}, "layer 2 has no attention, which version 1 of the format has not"),
        ("visual", {"qcache.version": VERSION_2, "qcache.lazy.leader": leaders(l1=-1)}, {}, "leader 1 of layer 2 has no attention"),
        ("visual", {"qcache.version": VERSION_2, "qcache.lazy.leader": leaders(l2=-2)}, {}, "leader -2 of layer 2 is not among 0 to 2, nor -1"),
        ("visual", {"qcache.version": VERSION_2, "qcache.lazy.leader": leaders(l2=-1, l3=0)}, {}, "leader of layer 3 is 0, the nearest full layer before it is 1"),
        ("dropped", {}, {"blk.1.attn_v.weight": None}, "blk.1.attn_v.weight is missing, and layer 1 is full"),
        ("visual", {"qcache.version": None}, {}, "qcache.version is missing"),
        ("visual", {"qcache.lazy.mode": (GGUFValueType.STRING, "text")}, {}, "qcache.lazy.mode is 'text'"),
        ("visual", {"qcache.lazy.mode": (GGUFValueType.UINT32, 1)}, {}, "qcache.lazy.mode is of type UINT32, expected STRING"),
        ("visual", {"qcache.lazy.leader": (GGUFValueType.ARRAY, np.arange(N_LAYER, dtype=np.int64))}, {}, "array of INT64, expected INT32"),
        ("visual", {"qcache.lazy.leader": (GGUFValueType.ARRAY, np.zeros(3, np.int32))}, {}, "has 3 values for 8 layers"),
        ("visual", {"qcache.lazy.leader": leaders(l2=5)}, {}, "leader 5 of layer 2 is not among 0 to 2"),
        ("visual", {"qcache.lazy.leader": leaders(l3=2)}, {}, "leader 2 of layer 3 is lazy itself, its leader is 1"),
        ("visual", {"qcache.lazy.leader": leaders(l3=0)}, {}, "leader of layer 3 is 0, the nearest full layer before it is 1"),
        ("visual", {"qcache.lazy.js_divergence": (GGUFValueType.ARRAY, np.zeros(3, np.float32))}, {}, "js_divergence has 3 values, expected 8"),
        ("visual", {"qcache.calibration.pair_divergence": (GGUFValueType.ARRAY, -np.ones(64, np.float32))}, {}, "negative or not finite"),
        ("plain", {"qcache.tokenizer.normalizer": (GGUFValueType.STRING, "NFKC")}, {}, "normalizer is 'NFKC', expected NFC"),
        ("visual", {}, {"blk.2.attn_q.weight": None}, "blk.2.attn_q.weight is missing, and layer 2 is lazy in visual mode"),
        ("plain", {}, {"blk.2.attn_k.weight": None}, "blk.2.attn_k.weight is missing, and layer 2 is full"),
        ("visual", {}, {"blk.2.attn_vis_bias.weight": np.zeros(3, np.float32)}, "blk.2.attn_vis_bias.weight is f32 [3], expected f32 [4]"),
        ("visual", {}, {"blk.2.attn_vis_bias.weight": np.full(4, np.nan, np.float32)}, "blk.2.attn_vis_bias.weight has values that are not finite"),
    ],
)
def test_one_thing_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, keys: dict, tensors: dict, message: str
) -> None:
    bad = rewrite_gguf(Path(getattr(tiny_llava(), file)), tmp_path / "bad.gguf", keys, tensors)
    problems = validate_file(bad)
    assert len(problems) == 1 and message in problems[0], problems
    assert main(["validate", str(bad)]) == 1
    shown = capsys.readouterr()
    assert message in shown.out and "1 problem" in shown.err
