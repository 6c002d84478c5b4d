"""The command and its files: both or none, progress, peak memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from hf_models import build_llava, edit_json
from safetensors.torch import load_file, save_file

from ggml_qcache_convert import conversion, convert
from ggml_qcache_convert.cli import main
from ggml_qcache_convert.writer import AtomicFiles


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build_llava(tmp_path / "tiny", n_layer=4)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["tiny", "--outtype", "q8_0", "--lazy-layers", "2-3", "--lazy-mode", "global", "--keep-qk"]) == 0
    output = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["mmproj-tiny-f16.gguf", "tiny-q8_0.gguf"]
    assert "tiny-q8_0.gguf: llama, 4 layers" in output.out and "2 lazy layers, global mode: 2 (1), 3 (1)" in output.out
    assert "converting: 100%" in output.err
    assert GGUFReader("tiny-q8_0.gguf").fields["general.name"].contents() == "tiny"


@pytest.mark.parametrize("flag", ["--quiet", "--no-progress"])
def test_command_can_be_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    build_llava(tmp_path / "tiny", n_layer=1)
    capsys.readouterr()
    assert main([str(tmp_path / "tiny"), "--outfile", str(tmp_path / "a"), "--mmproj", str(tmp_path / "b"), flag]) == 0
    output = capsys.readouterr()
    assert output.err == "" and (output.out == "") is (flag == "--quiet")


def test_module_is_the_command(tmp_path: Path) -> None:
    package = str(Path(conversion.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-m", "ggml_qcache_convert", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": package},
    )
    assert run.returncode == 1 and "config.json" in run.stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("fail_at", [1, 20, 60])
def test_failure_mid_write_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    fail_at: int,
) -> None:
    build_llava(tmp_path / "hf", n_layer=3)
    (tmp_path / "m.gguf").write_bytes(b"an older model")
    capsys.readouterr()
    calls = 0

    def open_to_write(path: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        nonlocal calls
        calls += mode == "r+b"  # these tensors are a chunk each
        if mode == "r+b" and calls == fail_at:
            raise error
        return original(path, mode, *arguments, **options)

    original = Path.open
    monkeypatch.setattr(Path, "open", open_to_write)
    status = main(
        [
            str(tmp_path / "hf"),
            "--outfile",
            str(tmp_path / "m.gguf"),
            "--mmproj",
            str(tmp_path / "mm.gguf"),
            "--no-progress",
        ]
    )
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert calls == fail_at
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"an older model"
    assert capsys.readouterr().err.startswith("convert_to_gguf: ")


def test_second_file_that_cannot_be_moved_takes_the_first_along(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with pytest.raises(OSError), AtomicFiles([first, second]) as files:
        files.path(first).write_bytes(b"1")
        files.path(second).write_bytes(b"2")
        second.mkdir()
        files.commit()
    assert list(tmp_path.iterdir()) == [second]


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    build_llava(tmp_path / "hf", n_layer=2)
    for name in "ab":
        convert(tmp_path / "hf", tmp_path / f"{name}.gguf", tmp_path / f"{name}-mm.gguf", "q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a-mm.gguf").read_bytes() == (tmp_path / "b-mm.gguf").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_peak_memory_is_near_the_largest_tensor(tmp_path: Path, form: str) -> None:
    """100 MB of bfloat16 in tensors of at most 2 MB are converted within a few chunks of memory."""
    build_llava(tmp_path / "hf", n_layer=1, hidden=512, n_head=8, n_head_kv=8, n_ff=2048, dtype=torch.bfloat16)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    first = "language_model.model.layers.0."
    n_layer = 12
    for layer in range(1, n_layer):
        tensors.update(
            {
                name.replace(".0.", f".{layer}.", 1): tensor.clone()
                for name, tensor in tensors.items()
                if name.startswith(first)
            }
        )
    if form == "bin":
        file.unlink()
        file = file.with_name("pytorch_model.bin")
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    edit_json(tmp_path / "hf" / "config.json", text_config__num_hidden_layers=n_layer)
    assert file.stat().st_size > 100e6
    # not ru_maxrss: a child starts with its parent's
    code = (
        "import sys; from pathlib import Path; from ggml_qcache_convert import convert;"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024;"
        "before = peak(); convert(Path('hf'), Path('m.gguf'), Path('mm.gguf'), sys.argv[1]); print(peak() - before)"
    )
    if form == "bin":  # what torch itself needs to unpickle anything at all doesn't count
        load = "import io, torch\nfrom torch._subclasses.fake_tensor import FakeTensorMode\nf = io.BytesIO()\ntorch.save({}, f)\nf.seek(0)\n"
        code = load + "with FakeTensorMode():\n    torch.load(f)\n" + code
    env = {**os.environ, "PYTHONPATH": str(Path(conversion.__file__).parents[1])}
    for outtype in ("f32", "q8_0"):
        run = subprocess.run(
            [sys.executable, "-c", code, outtype], cwd=tmp_path, capture_output=True, text=True, check=True, env=env
        )
        print(f"{outtype}: {int(run.stdout) / 1e6:.0f} MB over Python's own")
        assert int(run.stdout) < 40e6
