"""A model by its name on the Hub, fetched from a local stand-in of it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from gguf import GGUFReader
from hf_models import build_llava
from hub_server import HubServer
from safetensors.torch import load_file

from ggml_qcache_convert import ConversionError, convert
from ggml_qcache_convert.cli import main
from ggml_qcache_convert.hub import fetch, is_hub_id

ID = "lab/tiny-llava"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models on the Hub: in shards, with what the converter doesn't need beside them; as .bin alone; without weights."""
    folder = tmp_path_factory.mktemp("hub")
    build_llava(folder / "sharded", n_layer=2, sharded=True, dtype=torch.float16)
    shutil.copytree(folder / "sharded", folder / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copytree(folder / "bin", folder / "none")
    tensors = {name: tensor for file in folder.glob("sharded/*.safetensors") for name, tensor in load_file(file).items()}
    for name in ("sharded", "bin"):
        torch.save(tensors, folder / name / "pytorch_model.bin")
    (folder / "sharded" / "README.md").write_text("a card")
    (folder / "sharded" / "onnx").mkdir()
    (folder / "sharded" / "onnx" / "model.onnx").write_text("another runtime's")
    return {ID: folder / "sharded", "lab/bin": folder / "bin", "lab/none": folder / "none"}


@pytest.fixture
def hub(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(models, ("main", "v1.0")) as server:
        # what HF_ENDPOINT, HF_HUB_CACHE set at import
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_command(tmp_path: Path, hub: HubServer, models: dict[str, Path]) -> None:
    """As a user runs it: both files are those of the local directory, named after the model."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "ggml_qcache_convert", ID, "--outtype", "q8_0"]
    (tmp_path / "out").mkdir()
    run = subprocess.run(command, cwd=tmp_path / "out", env=env, capture_output=True, text=True, check=True)
    assert "tiny-llava-q8_0.gguf: llama, 2 layers" in run.stdout and "converting: 100%" in run.stderr
    assert GGUFReader(tmp_path / "out" / "tiny-llava-q8_0.gguf").fields["general.name"].contents() == "tiny-llava"
    convert(models[ID], tmp_path / "m.gguf", tmp_path / "mm.gguf", "q8_0", name="tiny-llava")
    assert (tmp_path / "out" / "tiny-llava-q8_0.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert (tmp_path / "out" / "mmproj-tiny-llava-f16.gguf").read_bytes() == (tmp_path / "mm.gguf").read_bytes()


def test_only_what_is_needed_is_fetched_and_only_once(hub: HubServer, models: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = fetch(ID)
    needed = {file.name for file in models[ID].iterdir() if file.suffix in (".json", ".jinja", ".safetensors", ".model")}
    assert {file.name for file in folder.iterdir()} == needed and sorted(hub.fetched()) == sorted(needed)
    assert fetch(ID, hub.sha(ID)) == fetch(ID, "v1.0") == folder
    assert sorted(hub.fetched()) == sorted(needed)
    assert "%" not in capfd.readouterr().err  # progress wasn't asked for
    assert "pytorch_model.bin" in {file.name for file in fetch("lab/bin").iterdir()}


def test_a_connection_that_breaks_off_is_taken_up(hub: HubServer, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # 10 MB; what is no whole chunk is fetched again
    shard = sorted(file.name for file in models[ID].glob("*.safetensors"))[1]
    hub.cut = {shard}
    folder = fetch(ID)
    size = (models[ID] / shard).stat().st_size
    assert hub.cut == set() and (folder / shard).read_bytes() == (models[ID] / shard).read_bytes()
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(shard)] == [None, f"bytes={size // 2 // 4096 * 4096}-"]


def test_an_interrupted_download_goes_on(hub: HubServer, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    last = sorted(file.name for file in models[ID].glob("*.safetensors"))[-1]
    hub.down = {last}
    with pytest.raises(ConversionError, match=f"{ID}: can't be fetched from {hub.url} .*503.*the cache lacks .*{last}"):
        fetch(ID)
    before = hub.fetched()
    hub.down = set()
    folder = fetch(ID)
    again = hub.fetched()[len(before) :]
    assert last in again and not set(again) & {"config.json", "tokenizer.json"}
    convert(folder, tmp_path / "m.gguf", tmp_path / "mm.gguf")


def test_without_network_the_cache_has_to_do(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(ID)
    # a port on which nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(ID) == folder
    with pytest.raises(ConversionError, match="lab/other: can't be fetched from http://127.0.0.1:9 .*, and the cache hasn't got it"):
        fetch("lab/other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lab/unknown"], "lab/unknown: no such file or directory, and no such model at http://127.0.0.1"),
        ([ID, "--revision", "v9"], f"{ID}: the model at http://127.0.0.1"),
        (["lab/none"], "lab/none: has no weights: none of model.safetensors, pytorch_model.bin"),
        (["lab--x/y"], "isn't the name of a model on the Hub"),
        ([ID, "--outfile", "missing/m.gguf"], "its directory missing doesn't exist"),
        ([ID, "--lora", "nowhere"], "nowhere: no such file or directory"),
        ([ID, "--mmproj-in", "m.gguf"], "--mmproj-in goes with a GGUF"),
        ([".", "--revision", "v1.0"], "--revision goes with the name of a model on the Hub, and . is a path"),
    ],
)
def test_refused(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert list((tmp_path / "out").iterdir()) == []
    assert not [name for name in hub.fetched() if name.startswith(("model", "pytorch"))]


def test_gated(hub: HubServer) -> None:
    hub.gated = True
    with pytest.raises(ConversionError, match=f"access to this model must be asked for at {hub.url}/{ID}"):
        fetch(ID)


def test_a_path_wins_over_a_name(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    build_llava(tmp_path / ID, n_layer=1)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(ID) and is_hub_id("lab/tiny") and not is_hub_id("lab/tiny.gguf") and not is_hub_id("tiny") and not is_hub_id("../a/b")
    assert main([ID, "--quiet"]) == 0
    assert hub.requests == [] and sorted(path.name for path in tmp_path.glob("*.gguf")) == ["mmproj-tiny-llava-f16.gguf", "tiny-llava-f16.gguf"]


def test_an_index_of_the_hub_cannot_lead_out(hub: HubServer, models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models[ID], tmp_path / "evil")
    index = tmp_path / "evil" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../../../etc/passwd")
    index.write_text(json.dumps(content))
    hub.models = {"lab/evil": tmp_path / "evil"}
    with pytest.raises(ConversionError, match="points to '../../../../etc/passwd', which isn't a plain file name"):
        fetch("lab/evil")
