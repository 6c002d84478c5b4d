"""Importance matrices: bytes equal to those of llama.cpp's own quantiser with the same one, and what is refused."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hf_models import build_llava

from ggml_qcache_convert import ConversionError, convert
from ggml_qcache_convert.cli import main
from ggml_qcache_convert.make_lazy import make_lazy
from ggml_qcache_convert.outtypes import OUTTYPES

N_LAYER = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its f32 GGUF."""
    folder = tmp_path_factory.mktemp("model")
    # rows of 288 values are no whole blocks of 256; 8 layers have one in the first eighth
    build_llava(folder / "hf", n_layer=N_LAYER, hidden=256, n_ff=288)
    convert(folder / "hf", folder / "f32.gguf", None, "f32")
    return folder / "hf", folder / "f32.gguf"


def write_imatrix(path: Path, gguf: Path, change: Callable[[dict[str, np.ndarray]], object] = lambda _: None, kind: str = "imatrix") -> dict[str, np.ndarray]:
    """Writes an importance matrix for a model's layers, as llama-imatrix does: sums of squares and counts of rows.

    Returns:
        The mean squares by matrix.
    """
    rng = np.random.default_rng(5)
    tensors: dict[str, np.ndarray] = {}
    for tensor in GGUFReader(gguf).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            tensors[f"{tensor.name}.in_sum2"] = (rng.gamma(0.3, 1.0, (1, int(tensor.shape[0]))) * 77).astype(np.float32)
            tensors[f"{tensor.name}.counts"] = np.array([[77.0]], np.float32)
    tensors["blk.2.attn_v.weight.counts"][:] = 0  # never seen
    change(tensors)
    writer = GGUFWriter(path, arch="")
    writer.kv_data[0].clear()
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["captions.txt"])
    writer.add_uint32("imatrix.chunk_count", 12)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    means = {}
    for name in list(tensors):
        if name.endswith(".in_sum2"):
            count = tensors.get(name.removesuffix("in_sum2") + "counts", np.ones(1, np.float32)).reshape(-1)[0]
            means[name.removesuffix(".in_sum2")] = tensors[name][0] / count if count > 0 else np.ones_like(tensors[name][0])
    return means


def quantised_by_llama_cpp(source: Path, target: Path, outtype: str, means: dict[str, np.ndarray]) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = OUTTYPES[outtype].file_type, 1
    kept = {name: np.ascontiguousarray(values, np.float32) for name, values in means.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for entry, (name, values) in zip(entries, kept.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


@pytest.mark.parametrize("outtype", ["q4_k_m", "q6_k", "q4_0", "q5_1", "q8_0"])
def test_bytes_are_those_of_llama_cpp(tmp_path: Path, model: tuple[Path, Path], outtype: str) -> None:
    checkpoint, f32 = model
    means = write_imatrix(tmp_path / "i.gguf", f32)
    convert(checkpoint, tmp_path / "ours.gguf", None, outtype, imatrix=tmp_path / "i.gguf")
    make_lazy(f32, tmp_path / "again.gguf", outtype=outtype, imatrix=tmp_path / "i.gguf")
    convert(checkpoint, tmp_path / "without.gguf", None, outtype)
    quantised_by_llama_cpp(f32, tmp_path / "theirs.gguf", outtype, means)
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "theirs.gguf").tensors}
    without = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "without.gguf").tensors}
    for name in ("ours", "again"):
        reader = GGUFReader(tmp_path / f"{name}.gguf")
        same = [tensor for tensor in reader.tensors if tensor.tensor_type == theirs[tensor.name].tensor_type]
        # their mixes of the older types give some matrices more bits than ours
        assert len(same) == len(theirs) or outtype in ("q4_0", "q4_1", "q5_0", "q5_1") and len(theirs) - len(same) <= 2
        assert all(np.array_equal(tensor.data, theirs[tensor.name].data) for tensor in same)
        changed = [tensor.name for tensor in reader.tensors if not np.array_equal(tensor.data, without[tensor.name].data)]
        assert len(changed) > 4 * N_LAYER or outtype == "q8_0"  # q8_0 has nothing to choose
        assert reader.fields["quantize.imatrix.dataset"].contents() == "captions.txt"
        assert reader.fields["quantize.imatrix.entries_count"].contents() == 7 * N_LAYER
        assert reader.fields["quantize.imatrix.chunks_count"].contents() == 12


def set_value(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][0, 0] = value

    return change


SUMS = "blk.1.ffn_up.weight.in_sum2"
CASES = {
    "nan": (set_value(SUMS, float("nan")), f"'{SUMS}' has values that are negative, NaN or infinite"),
    "negative": (set_value(SUMS, -1.0), f"'{SUMS}' has values that are negative"),
    "count": (set_value("blk.1.ffn_up.weight.counts", float("inf")), "'blk.1.ffn_up.weight.counts' has values that are negative"),
    "no-counts": (lambda t: t.pop("blk.1.ffn_up.weight.counts"), f"'{SUMS}' has no 'blk.1.ffn_up.weight.counts' beside it"),
    "experts": (lambda t: t.update({"blk.1.ffn_up.weight.counts": np.ones((2, 1), np.float32)}), "'blk.1.ffn_up.weight' has 2 matrices"),
    "width": (lambda t: t.update({SUMS: np.ones((1, 128), np.float32)}), "'blk.1.ffn_up.weight' has 128 inputs, the model's has 256"),
    "empty": (lambda t: (t.clear(), t.update(x=np.ones(3, np.float32))), "has no tensors NAME.in_sum2"),
    "other-model": (
        lambda t: (t.clear(), t.update({"dec.0.q.in_sum2": np.ones((1, 256), np.float32), "dec.0.q.counts": np.ones((1, 1), np.float32)})),
        "has none of the model's quantised tensors; it is of dec.0.q",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_nothing_written(tmp_path: Path, model: tuple[Path, Path], case: str) -> None:
    change, message = CASES[case]
    write_imatrix(tmp_path / "i.gguf", model[1], change)
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(model[0], tmp_path / "m.gguf", None, "q4_k_m", imatrix=tmp_path / "i.gguf")
    with pytest.raises(ConversionError, match=re.escape(message)):
        make_lazy(model[1], tmp_path / "m.gguf", outtype="q4_k_m", imatrix=tmp_path / "i.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_command(tmp_path: Path, model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, f32 = map(str, model)
    write_imatrix(Path("i.gguf"), model[1])
    assert main([checkpoint, "--outfile", "a.gguf", "--mmproj", "mm.gguf", "--outtype", "q4_k_m", "--imatrix", "i.gguf", "--quiet"]) == 0
    assert main([f32, "--outfile", "b.gguf", "--outtype", "q4_k_m", "--imatrix", "i.gguf", "--quiet"]) == 0
    a, b = (GGUFReader(name).tensors for name in ("a.gguf", "b.gguf"))
    assert all(np.array_equal(one.data, other.data) for one, other in zip(a, b, strict=True))
    Path("old.dat").write_bytes(b"\x40\0\0\0")
    for arguments, message in (
        ([checkpoint, "--imatrix", "i.gguf"], "an importance matrix goes with a quantised outtype, got f16"),
        ([f32, "--imatrix", "i.gguf"], "an importance matrix goes with a quantised outtype, got None"),
        ([f32, "--imatrix", f32, "--outtype", "q4_0"], "isn't an importance matrix: general.type is 'model'"),
        ([f32, "--imatrix", "old.dat", "--outtype", "q4_0"], "the older .dat form isn't read"),
        ([f32, "--imatrix", "none.gguf", "--outtype", "q4_0"], "No such file"),
    ):
        for more in ([], ["--dry-run"]):
            assert main([*arguments, *more, "--outfile", "x.gguf"]) == 1
            assert message in capsys.readouterr().err and not Path("x.gguf").exists()
