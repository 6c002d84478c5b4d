"""``--dry-run``: the plan is what the conversion then writes, and nothing is written."""

import re
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from hf_models import build_llava

from ggml_qcache_convert.checkpoint import Checkpoint
from ggml_qcache_convert.cli import main

ROW = re.compile(r"(\S+)  +(\S+)  +([a-z]\w+)  +\[([\d, ]+)\]  +([\d,]+)\s*")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    build_llava(tmp_path / "tiny", n_layer=5, rope={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                    "original_max_position_embeddings": 64, "rope_theta": 10000.0})  # fmt: skip
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return tmp_path


def rows(output: str) -> dict[str, tuple[str, str, list[int], int]]:
    """Source, type, shape and bytes of each tensor, by name."""
    found = [match.groups() for line in output.splitlines() if (match := ROW.fullmatch(line))]
    return {
        name: (source, qtype, [int(n) for n in shape.split(",")], int(n_bytes.replace(",", "")))
        for name, source, qtype, shape, n_bytes in found
    }


def written(*files: str) -> dict[str, tuple[str, list[int], int]]:
    """The same of what is in GGUF files, without the source."""
    return {
        tensor.name: (tensor.tensor_type.name.lower(), [int(n) for n in reversed(tensor.shape)], int(tensor.n_bytes))
        for file in files
        for tensor in GGUFReader(file).tensors
    }


@pytest.mark.parametrize("outtype", ["f16", "q4_k_m"])
def test_a_checkpoint(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, outtype: str) -> None:
    arguments = ["tiny", "--outtype", outtype, "--lazy-layers", "1-2,4", "--lazy-mode", "global"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_rows", None)  # no weights are read
        assert main([*arguments, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert [path.name for path in tiny.iterdir()] == ["tiny"]
    planned = rows(output)
    assert planned["blk.3.attn_v.weight"][0] == "language_model.model.layers.3.self_attn.v_proj.weight"
    assert planned["v.patch_embd.weight"][0] == "vision_tower.embeddings.patch_embedding.weight"
    assert planned["rope_freqs.weight"][0] == "(computed)" and "blk.1.attn_q.weight" not in planned
    assert "Lazy Block of leader 0: 1-2\nLazy Block of leader 3: 4\n3 of 5 layers lazy, global mode\n" in output
    assert main([*arguments, "--quiet"]) == 0
    files = f"tiny-{outtype}.gguf", "mmproj-tiny-f16.gguf"
    assert {name: row[1:] for name, row in planned.items()} == written(*files)
    for file in files:
        tensors = written(file).values()
        assert f"{file}: {len(tensors)} tensors, {sum(n_bytes for *_, n_bytes in tensors):,} bytes" in output


def test_a_gguf(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--outfile", "m.gguf", "--mmproj", "mm.gguf", "--quiet"]) == 0
    before = sorted(path.name for path in tiny.iterdir())
    arguments = ["m.gguf", "--lazy-layers", "2", "--lazy-mode", "global", "--outtype", "q8_0"]
    assert main([*arguments, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert sorted(path.name for path in tiny.iterdir()) == before
    assert main([*arguments, "--quiet"]) == 0
    assert {name: row[1:] for name, row in rows(output).items()} == written("m-lazy.gguf")
    assert "m-lazy.gguf (llama)" in output and "1 of 5 layers lazy, global mode" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--lazy-layers", "9"], "layer 9 is out of range"),
        (["tiny", "--lazy-layers", "auto", "--calibration-images", "."], "--dry-run goes with named layers"),
        (["tiny", "--outfile", "missing/m.gguf"], "its directory missing doesn't exist"),
        (["nowhere"], "nowhere: no such file or directory"),
        (["tiny/config.json"], "isn't GGUF"),
    ],
)
def test_refused_as_the_conversion_would_be(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([*arguments, "--dry-run"]) == 1
    output = capsys.readouterr()
    assert output.out == "" and message in output.err and [path.name for path in tiny.iterdir()] == ["tiny"]


def test_unreadable_weights_are_no_matter(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan rests on headers alone: NaN comes to light in the conversion only."""
    from safetensors.torch import load_file, save_file

    file = tiny / "tiny" / "model.safetensors"
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(file).items()}, file)
    assert main(["tiny", "--dry-run", "--quiet"]) == 0 and capsys.readouterr().out == ""
    assert main(["tiny", "--quiet"]) == 1
