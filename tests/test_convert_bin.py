"""PyTorch's .bin checkpoints: the same files come out as of safetensors, and what is damaged or hostile is refused."""

import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import build_llava
from safetensors.torch import load_file

from ggml_qcache_convert import ConversionError, convert

Q = "language_model.model.layers.1.self_attn.q_proj.weight"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same bfloat16 model as safetensors, one .bin and two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    build_llava(folder / "a" / "hf", n_layer=2, dtype=torch.bfloat16)
    source = folder / "a" / "hf" / "model.safetensors"
    tensors = load_file(source)
    for name in ("b", "c"):
        shutil.copytree(folder / "a", folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    # as old transformers saved it: a buffer of integers, and here and there a view of a larger storage
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    both = torch.cat([tensors[Q], tensors[Q]])
    tensors[Q] = both[len(tensors[Q]) :]
    torch.save(tensors, folder / "b" / "hf" / "pytorch_model.bin")
    names = list(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, part in zip(SHARDS, parts):
        torch.save({name: torch.nn.Parameter(tensors[name], tensors[name].is_floating_point()) for name in part}, folder / "c" / "hf" / shard)
    weight_map = {name: shard for shard, part in zip(SHARDS, parts) for name in part}
    (folder / "c" / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {"safetensors": folder / "a" / "hf", "bin": folder / "b" / "hf", "sharded": folder / "c" / "hf"}


def test_same_bytes_as_of_safetensors(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    written = []
    for name, path in checkpoints.items():
        convert(path, tmp_path / f"{name}.gguf", tmp_path / f"{name}-mm.gguf", "q8_0")
        written.append(((tmp_path / f"{name}.gguf").read_bytes(), (tmp_path / f"{name}-mm.gguf").read_bytes()))
    assert written[0] == written[1] == written[2]


def test_files_of_old_torch(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    shutil.copytree(checkpoints["bin"], tmp_path / "hf")
    rezip(_as_of_old)(tmp_path / "hf")
    for path, name in ((checkpoints["bin"], "a"), (tmp_path / "hf", "b")):
        convert(path, tmp_path / f"{name}.gguf", tmp_path / f"{name}-mm.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a-mm.gguf").read_bytes() == (tmp_path / "b-mm.gguf").read_bytes()


def test_safetensors_are_preferred(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    shutil.copytree(checkpoints["safetensors"], tmp_path / "hf")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"not read")
    convert(tmp_path / "hf", tmp_path / "m.gguf", None)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


def rezip(change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    """Rewrites the members of a single .bin; None leaves one out."""

    def apply(path: Path) -> None:
        file = path / "pytorch_model.bin"
        target = io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w", compression) as new:
            for member in old.infolist():
                content = change(member.filename, old.read(member))
                if content is not None:
                    new.writestr(member.filename, content)
        file.write_bytes(target.getvalue())

    return apply


def _as_of_old(name: str, content: bytes) -> bytes | None:
    """Leaves out what torch.save adds from 2.6 on: by it torch reckons where a storage must lie, instead of looking."""
    return None if name.endswith((".format_version", ".storage_alignment", "/byteorder", "serialization_id")) else content


def save(change: Callable[[dict[str, Any]], Any], **options: Any) -> Callable[[Path], None]:
    """Saves a single .bin again with other content."""

    def apply(path: Path) -> None:
        content = torch.load(path / "pytorch_model.bin", weights_only=True)
        torch.save(change(content) or content, path / "pytorch_model.bin", **options)

    return apply


def set_value(index: tuple[int, int], value: float) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[Q] = content[Q].clone()
        content[Q][index] = value

    return change


def shard_map(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "pytorch_model.bin.index.json"
        content = json.loads(file.read_text())
        change(content["weight_map"])
        file.write_text(json.dumps(content))

    return apply


def cut(n: int) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        content = (path / "pytorch_model.bin").read_bytes()
        (path / "pytorch_model.bin").write_bytes(content[:n])

    return apply


def link_away(name: str) -> Callable[[Path], None]:
    """Moves a file out of the directory and leaves a link."""

    def apply(path: Path) -> None:
        elsewhere = path / ".." / "elsewhere"
        elsewhere.mkdir()
        (path / name).rename(elsewhere / name)
        (path / name).symlink_to(elsewhere / name)

    return apply


CASES = {
    "code": ("bin", save(lambda t: t.update(extra=_Code())), "pytorch_model.bin: refused, the pickle in it loads exec, which isn't"),
    "code-in-a-shard": (
        "sharded",
        lambda path: torch.save({"x": _Code()}, path / SHARDS[1]),
        f"{SHARDS[1]}: refused, the pickle in it loads exec, which isn't",
    ),
    "unknown-class": ("bin", save(lambda t: t.update(extra=Path("x"))), "refused, the pickle in it loads pathlib."),
    "empty": ("bin", cut(0), "pytorch_model.bin: isn't a readable PyTorch file: File is not a zip file"),
    "truncated": ("bin", cut(-100), "pytorch_model.bin: isn't a readable PyTorch file"),
    "pickle-damaged": (
        "bin",
        rezip(lambda name, content: b"\x80\x02\xff" + content if name.endswith("/data.pkl") else content),
        "pytorch_model.bin: isn't a readable PyTorch file",
    ),
    "truncated-early": ("bin", cut(2000), "pytorch_model.bin: isn't a readable PyTorch file"),
    "old-format": ("bin", save(lambda t: None, _use_new_zipfile_serialization=False), "in the format of before torch 1.6"),
    "compressed": ("bin", rezip(lambda name, content: content, zipfile.ZIP_DEFLATED), "in it is compressed, which torch.save never does"),
    "byte-order": (
        "bin",
        rezip(lambda name, content: b"big" if name.endswith("/byteorder") else content),
        "its byte order is b'big', supported is little-endian",
    ),
    "no-storage": ("bin", rezip(lambda name, content: None if name.endswith("/data/0") else content), "pytorch_model.bin: isn't a readable PyTorch file"),
    "short-storage": (
        "bin",
        rezip(lambda name, content: content[:4] if name.endswith("/data/0") else _as_of_old(name, content)),
        "bytes, its storage in the file has 4",
    ),
    "packed-again": ("bin", rezip(lambda name, content: content), "isn't where torch.save puts it; load the file and save it again"),
    "not-a-dict": ("bin", save(lambda t: list(t.values())), "pytorch_model.bin: holds a list, expected tensors by name"),
    "nested": ("bin", save(lambda t: {"state_dict": t}), "'state_dict' is a dict, expected tensors by name"),
    "transposed": (
        "bin",
        save(lambda t: t.update({Q: t[Q].t().contiguous().t()})),
        f"tensor '{Q}' of shape [64, 64] isn't stored row by row but with strides [1, 64]",
    ),
    "sparse": ("bin", save(lambda t: t.update({Q: t[Q].float().to_sparse()})), f"tensor '{Q}' is sparse or quantised"),
    "dtype": ("bin", save(lambda t: t.update({Q: t[Q].to(torch.int8)})), f"'{Q}' is of type int8; supported: F32"),
    "shape": ("bin", save(lambda t: t.update({Q: t[Q][:32]})), f"'{Q}' has shape [32, 64], the configuration needs [64, 64]"),
    "missing-tensor": ("bin", save(lambda t: {k: v for k, v in t.items() if k != Q}), "no tensor 'text.layers.1.self_attn.q_proj.weight'"),
    "nan": ("bin", save(set_value((3, 7), float("nan"))), f"pytorch_model.bin: tensor '{Q}' has 1 NaN or infinite values, the first at [3, 7]"),
    "inf": ("sharded", lambda path: _inf_in_a_shard(path), "has 1 NaN or infinite values, the first at [0]"),
    "missing-shard": ("sharded", lambda path: (path / SHARDS[1]).unlink(), f"1 of 2 shards are missing: {SHARDS[1]}"),
    "shard-path": ("sharded", shard_map(lambda m: m.update({Q: "../b/pytorch_model.bin"})), "points to '../b/pytorch_model.bin', which isn't"),
    "shard-absolute": ("sharded", shard_map(lambda m: m.update({Q: "/etc/passwd"})), "points to '/etc/passwd', which isn't"),
    "shard-lacks": ("sharded", shard_map(lambda m: m.update(extra=SHARDS[0])), f"'extra' isn't in {SHARDS[0]}"),
    "shard-link": ("sharded", link_away(SHARDS[0]), f"{SHARDS[0]}: is a link to "),
    "file-link": ("bin", link_away("pytorch_model.bin"), "outside the checkpoint directory"),
    "safetensors-link": ("safetensors", link_away("model.safetensors"), "outside the checkpoint directory"),
}


def _inf_in_a_shard(path: Path) -> None:
    content = torch.load(path / SHARDS[1], weights_only=True)
    name = next(name for name, tensor in content.items() if tensor.dim() == 1)
    content[name] = content[name].detach().clone().fill_(1)
    content[name][0] = float("inf")
    torch.save(content, path / SHARDS[1])


@pytest.mark.parametrize("case", CASES)
def test_refused_with_nothing_written(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    base, damage, message = CASES[case]
    shutil.copytree(checkpoints[base], tmp_path / "hf")
    damage(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(tmp_path / "hf", Path("m.gguf"), Path("mm.gguf"))
    assert list((tmp_path / "out").iterdir()) == []


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(checkpoints["sharded"].iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "m.gguf", tmp_path / "mm.gguf")


def test_torch_is_optional(tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ConversionError, match=r"needs torch 2.7 or later, installed is 2.5.1\+cpu"):
        convert(checkpoints["bin"], tmp_path / "m.gguf", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: reading .* needs torch: pip install 'ggml-qcache\[torch\]'"):
        convert(checkpoints["bin"], tmp_path / "m.gguf", None)
    convert(checkpoints["safetensors"], tmp_path / "m.gguf", None)
