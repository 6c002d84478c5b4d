"""The command `qcache`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import LAZY_LAYERS, N_VISUAL, ask, load, picture, tiny_llava, user

from ggml_qcache import __version__
from ggml_qcache.cli import main
from ggml_qcache_convert import convert


@pytest.fixture(autouse=True)
def built():
    """Builds the model before a test captures output."""
    tiny_llava()


@pytest.fixture
def photo(tmp_path) -> str:
    picture().save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def run(*arguments: str) -> int:
    """Runs `qcache run` on the tiny model."""
    return main(["run", tiny_llava().visual, "--threads", "1", "--n-ctx", "256", *arguments])


def fails(capfd, status: int, reason: str) -> None:
    """One line on stderr, nothing on stdout, exit status 1."""
    out, err = capfd.readouterr()
    assert status == 1 and out == ""
    assert err.startswith("qcache: error: ") and err.count("\n") == 1 and reason in err


def test_run(capfd, photo):
    with load("visual") as llm:
        expected = ask(llm, [user("How many?", picture())], 20)
        usage = llm.kv_cache_usage()
    assert run("--mmproj", tiny_llava().mmproj, "--image", photo, "-p", "How many?", "--max-tokens", "20") == 0
    out, err = capfd.readouterr()
    assert out == expected + "\n"
    assert f"{usage['bytes']:,} bytes" in err and "tokens/s" in err and err.count("\n") == 1


def test_run_json_and_options(capfd, photo):
    images = ["--mmproj", tiny_llava().mmproj, "--image", photo, "--image", Path(photo).as_uri()]
    options = ["--json", "--lazy-layers", "6-7", "--lazy-mode", "global", "--type-k", "q8_0", "--max-tokens", "5", "--temp", "0.7", "--seed", "3"]
    assert run(*images, "-p", "How many?", *options) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert err == "" and result["finish_reason"] in ("length", "stop")
    kv = result["kv_cache"]
    assert (kv["visual_tokens"], kv["lazy_layers"], kv["lazy_mode"]) == (2 * N_VISUAL, 2, "global")
    assert result["timings"]["prefill_tokens"] > 2 * N_VISUAL and result["device"]["weights"] == "CPU"


def test_run_stats_without_image(capfd):
    assert run("-p", "How many?", "--max-tokens", "3", "--stats") == 0
    err = capfd.readouterr().err
    assert "  bytes_block_visual: " in err and "  decode_tokens: 2" in err


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["-p", "x", "--image", "/nowhere.png"], "mmproj_path"),
        (["-p", "x", "--mmproj", "MMPROJ", "--image", "/nowhere.png"], "/nowhere.png"),
        (["-p", "x", "--mmproj", "/nowhere.gguf"], "/nowhere.gguf"),
        (["-p", "x", "--lazy-layers", "0"], "layer 0"),
        (["-p", "x " * 400], "n_ctx=256"),
        (["-p", "x", "--mmproj", "MMPROJ", "--image", "http://127.0.0.1:9/x.png"], "allow_http"),
    ],
    ids=repr,
)
def test_run_errors(capfd, arguments, reason):
    arguments = [tiny_llava().mmproj if argument == "MMPROJ" else argument for argument in arguments]
    fails(capfd, run(*arguments), reason)


def test_files_that_are_no_models(capfd, tmp_path):
    path = tmp_path / "x.gguf"
    for content, reason in ((b"", "x.gguf"), (b"text", "x.gguf"), (Path(tiny_llava().plain).read_bytes()[:3000], "truncated")):
        path.write_bytes(content)
        fails(capfd, main(["inspect", str(path)]), reason)
        fails(capfd, main(["run", str(path), "-p", "x"]), "x.gguf")
    fails(capfd, main(["inspect", "/nowhere.gguf"]), "/nowhere.gguf")
    fails(capfd, main(["inspect", str(tmp_path)]), str(tmp_path))


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "m.gguf"], ["inspect"], ["fly"], ["run", "m.gguf", "-p", "x", "--lazy-mode", "both"]])
def test_usage(capfd, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: qcache" in capfd.readouterr().err


def test_inspect(capfd):
    assert main(["inspect", tiny_llava().visual]) == 0
    out = capfd.readouterr().out
    assert "5 of 8 layers lazy, visual mode" in out and "1,024,000" in out and "68.8%" in out
    drawn = [line.split() for line in out.splitlines() if line.endswith(("V", "V  ", "V     ")) and line.split()[0].isdigit()]
    assert [line[0] for line in drawn] == [str(layer) for layer in range(8)]
    assert [line[1] for line in drawn] == ["full", "┌", "├", "└", "┌", "├", "├", "└"]
    assert ["V" in line[-1] and line[-2] == "·" for line in drawn] == [False, False, True, True, False, True, True, True]


@pytest.mark.parametrize("file, text, visual", [("plain", 1024000, 1024000), ("visual", 1024000, 704000), ("global_", 704000, 704000)])
def test_inspect_json(capfd, file, text, visual):
    assert main(["inspect", getattr(tiny_llava(), file), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["kind"] == "model" and facts["architecture"] == "llama" and facts["n_layer"] == 8
    assert facts["kv_bytes_per_1000_tokens"] == {"type_k": "f16", "type_v": "f16", "full": 1024000, "text": text, "visual": visual}
    assert facts["lazy"]["leader"] == ([0, 1, 1, 1, 4, 4, 4, 4] if file != "plain" else list(range(8))), LAZY_LAYERS
    with load(file) as llm:
        info = llm._native_model.info
        for name in ("n_params", "n_embd", "n_head", "n_head_kv", "head_dim", "n_vocab", "n_ctx_train"):
            assert facts[name] == getattr(info, name), name


def test_inspect_agrees_with_the_cache(capfd):
    for type_k in ("f16", "q8_0"):
        main(["inspect", tiny_llava().visual, "--json", "--type-k", type_k])
        kv = json.loads(capfd.readouterr().out)["kv_bytes_per_1000_tokens"]
        with load("visual", type_k=type_k) as llm:
            usage = llm.kv_cache_usage()
            for name in ("full", "text", "visual"):
                assert kv[name] == usage[f"bytes_block_{name}"] * 1000 / usage["block_tokens"]


def test_inspect_mmproj(capfd):
    assert main(["inspect", tiny_llava().mmproj, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["kind"], facts["projector"], facts["n_embd_text"], facts["visual_tokens_per_image"]) == ("mmproj", "mlp", 64, N_VISUAL)
    assert main(["inspect", tiny_llava().mmproj]) == 0
    assert "mmproj" in capfd.readouterr().out


def test_as_a_program(photo):
    command = [sys.executable, "-m", "ggml_qcache"]
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
    assert result.stdout == f"qcache {__version__}\n"
    arguments = ["run", tiny_llava().visual, "--mmproj", tiny_llava().mmproj, "--image", photo, "-p", "How?", "--threads", "1"]
    # the reader goes away after a few bytes
    piped = subprocess.Popen([*command, *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    piped.stdout.close()
    assert (piped.wait(120), piped.stderr.read()) == (1, "")


def test_loading_quantised_weights_is_silent(tmp_path):
    # ggml reports every tensor that it repacks; in a new process, where nothing has set a log level yet
    path = tmp_path / "m.gguf"
    convert(tiny_llava().folder / "checkpoint", path, None, "q4_0")
    result = subprocess.run([sys.executable, "-c", f"from ggml_qcache import Llama; Llama({str(path)!r})"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
