"""Model files that can't be used: one exception with the values that failed, no crash, and the library as usable as before."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from core_helpers import make_context, rewrite_gguf
from gguf import GGUFReader, GGUFValueType
from hf_models import build_llava

from ggml_qcache import native
from ggml_qcache._native import lib
from ggml_qcache.errors import FileError, InvalidArgumentError, ModelError, QCacheError, UnsupportedError, VersionError
from ggml_qcache.native import Context, Model
from ggml_qcache_convert import convert

U32, I32, F32, STR, ARRAY = (GGUFValueType[name] for name in ("UINT32", "INT32", "FLOAT32", "STRING", "ARRAY"))
N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF = 6, 64, 4, 2, 96
SEED, N_MUTANTS = 3, 150


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file: a llama of six layers, of which 2, 3 and 5 are lazy in visual mode."""
    folder = tmp_path_factory.mktemp("files")
    build_llava(folder / "hf", n_layer=N_LAYER, hidden=N_EMBD, n_head=N_HEAD, n_head_kv=N_HEAD_KV, n_ff=N_FF, seed=5)
    convert(folder / "hf", folder / "good.gguf", None, "f32", lazy_layers=[2, 3, 5], lazy_mode="visual")
    return folder / "good.gguf"


@pytest.fixture(autouse=True)
def still_works(good: Path):
    """After every test the library loads a good file and computes."""
    yield
    with Model(good) as model:
        make_context(model).decode([5, 6, 7])


def refuses(path: Path, error: type[QCacheError], *texts: str) -> None:
    """Loading fails with that very error, which names the file and says all of these."""
    with pytest.raises(error) as caught:
        Model(path)
    print(caught.value)
    assert type(caught.value) is error
    for text in (str(path), *texts):
        assert text in str(caught.value)


#
# not a model at all
#


def test_missing_file(tmp_path: Path) -> None:
    refuses(tmp_path / "no such.gguf", FileError, "No such file")


def test_directory(tmp_path: Path) -> None:
    refuses(tmp_path, FileError, "directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good.read_bytes())
    path.chmod(0)
    refuses(path, FileError, "Permission denied")


def test_nul_in_path() -> None:
    with pytest.raises((ValueError, QCacheError)):
        Model("a\0b.gguf")


@pytest.mark.parametrize("content", [b"", b"G", b"GGU", b"GGML" + bytes(100), b"PK\x03\x04" + bytes(100), bytes(5000), b"\xff" * 64])
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refuses(tmp_path / "m.gguf", ModelError, "is not a GGUF file")


@pytest.mark.parametrize("where", [4, 5, 8, 12, 16, 23, 24, 25, 40, 0.1, 0.5, 0.9, 0.99, -1, "data", "data+1", "middle", "end"])
def test_truncated(good: Path, tmp_path: Path, where: int | float | str) -> None:
    content, reader = good.read_bytes(), GGUFReader(good)
    header = reader.tensors[-1].field.offset + 50
    last = reader.tensors[-1]
    sizes = {-1: header - 1, "data": reader.data_offset, "data+1": reader.data_offset + 1, "middle": len(content) // 2,
             "end": last.data_offset + last.n_bytes - 1}
    size = sizes.get(where, where if isinstance(where, int) else int(header * where) if isinstance(where, float) else None)
    (tmp_path / "m.gguf").write_bytes(content[:size])
    refuses(tmp_path / "m.gguf", ModelError, "truncated")


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000])
def test_other_gguf_versions(good: Path, tmp_path: Path, version: int) -> None:
    content = good.read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:4] + version.to_bytes(4, "little") + content[8:])
    refuses(tmp_path / "m.gguf", ModelError, "damaged")


@pytest.mark.parametrize(("offset", "value"), [(8, 2**62), (8, 2**63), (8, 2**31), (16, 2**62), (16, 2**63), (16, 2**31)])
def test_absurd_numbers_of_keys_and_tensors(good: Path, tmp_path: Path, offset: int, value: int) -> None:
    content = good.read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:offset] + value.to_bytes(8, "little") + content[offset + 8 :])
    refuses(tmp_path / "m.gguf", ModelError, "damaged")


#
# keys
#


OUT_OF_RANGE = "which is out of range"
WRONG_VALUES = [
    ("block_count", U32, 0, f"is 0, {OUT_OF_RANGE}"),
    ("block_count", U32, 1025, "1025 layers are out of range"),
    ("block_count", U32, 2**31 - 1, f"is 2147483647, {OUT_OF_RANGE}"),
    ("block_count", U32, 2**32 - 1, f"is 4294967295, {OUT_OF_RANGE}"),
    ("block_count", I32, -1, f"is -1, {OUT_OF_RANGE}"),
    ("block_count", U32, 7, "qcache.lazy.leader has 6 values, the model has 7 layers"),
    ("embedding_length", U32, 0, f"is 0, {OUT_OF_RANGE}"),
    ("embedding_length", U32, 1, "token_embd.weight is [64, 566, 1, 1], expected [1, 566]"),
    ("embedding_length", U32, 2**29 - 1, "expected [536870911, 566]"),
    ("embedding_length", U32, 2**32 - 1, f"is 4294967295, {OUT_OF_RANGE}"),
    ("feed_forward_length", U32, 0, f"is 0, {OUT_OF_RANGE}"),
    ("feed_forward_length", U32, 97, "blk.0.ffn_gate.weight is [64, 96, 1, 1], expected [64, 97]"),
    ("attention.head_count", U32, 0, f"is 0, {OUT_OF_RANGE}"),
    ("attention.head_count", U32, 3, "3 heads do not divide into 2 KV heads"),
    ("attention.head_count", U32, 8, "blk.0.attn_q.weight is [64, 64, 1, 1], expected [64, 128]"),
    ("attention.head_count", U32, 2**28, "expected [64, 4294967296]"),
    ("attention.head_count_kv", U32, 0, f"is 0, {OUT_OF_RANGE}"),
    ("attention.head_count_kv", U32, 8, "4 heads do not divide into 8 KV heads"),
    ("attention.head_count_kv", U32, 4, "blk.0.attn_k.weight is [64, 32, 1, 1], expected [64, 64]"),
    ("attention.key_length", U32, 0, f"is 0, {OUT_OF_RANGE}"),
    ("context_length", U32, 0, f"is 0, {OUT_OF_RANGE}"),
    ("context_length", U32, 2**32 - 1, f"is 4294967295, {OUT_OF_RANGE}"),
    ("rope.dimension_count", U32, 15, "is 15, expected an even number up to head_dim 16"),
    ("rope.dimension_count", U32, 18, "is 18, expected an even number up to head_dim 16"),
    ("rope.freq_base", F32, 0.0, f"is 0, {OUT_OF_RANGE}"),
    ("rope.freq_base", F32, -1.0, f"is -1, {OUT_OF_RANGE}"),
    ("rope.freq_base", F32, np.inf, f"is inf, {OUT_OF_RANGE}"),
    ("rope.scaling.factor", F32, -2.0, f"is -2, {OUT_OF_RANGE}"),
    ("attention.layer_norm_rms_epsilon", F32, -1.0, f"is -1, {OUT_OF_RANGE}"),
    ("attention.layer_norm_rms_epsilon", F32, np.nan, f"nan, {OUT_OF_RANGE}"),
    ("block_count", STR, "6", "is of type str, expected u32"),
    ("block_count", F32, 6.0, "is of type f32, expected u32"),
    ("block_count", ARRAY, np.int32([6]), "is of type i32[], expected u32"),
    ("embedding_length", STR, "64", "is of type str, expected u32"),
    ("feed_forward_length", ARRAY, np.int32([96] * N_LAYER), "is of type i32[], expected u32"),
    ("attention.head_count", ARRAY, np.int32([4] * N_LAYER), "is of type i32[], expected u32"),
    ("attention.head_count_kv", STR, "2", "is of type str, expected u32"),
    ("context_length", STR, "512", "is of type str, expected u32"),
    ("rope.dimension_count", STR, "16", "is of type str, expected u32"),
    ("rope.freq_base", U32, 10000, "is of type u32, expected f32"),
    ("rope.scaling.type", U32, 1, "is of type u32, expected str"),
    ("attention.layer_norm_rms_epsilon", STR, "1e-5", "is of type str, expected f32"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "kind", "value", "text"), WRONG_VALUES, ids=lambda x: getattr(x, "name", None) or str(x))
def test_hyper_parameter_of_wrong_value_or_type(
    good: Path, tmp_path: Path, key: str, kind: GGUFValueType, value: object, text: str
) -> None:
    path = rewrite_gguf(good, tmp_path / "m.gguf", keys={f"llama.{key}": (kind, value)})
    refuses(path, ModelError, text, *([key] if text.startswith("is ") else []))


@pytest.mark.parametrize("key", ["general.architecture", "llama.block_count", "llama.embedding_length", "llama.feed_forward_length",
                                 "llama.attention.head_count", "llama.context_length", "llama.attention.layer_norm_rms_epsilon",
                                 "qcache.version", "qcache.lazy.mode", "qcache.lazy.leader"])  # fmt: skip
def test_missing_key(good: Path, tmp_path: Path, key: str) -> None:
    refuses(rewrite_gguf(good, tmp_path / "m.gguf", keys={key: None}), ModelError, f"key {key} is missing")


@pytest.mark.parametrize(("key", "value", "text"), [
    ("general.architecture", (STR, "bert"), "architecture 'bert' is not supported (llama, qwen2 are)"),
    ("llama.rope.scaling.type", (STR, "longrope"), "rope scaling 'longrope' is not supported"),
    ("llama.expert_count", (U32, 8), "mixture-of-experts"),
    ("llama.attention.key_length", (U32, 32), "key length 32 and value length 16 differ"),
    ("qcache.version", (U32, 3), "qcache.version is 3, this library reads versions 1 and 2"),
])  # fmt: skip
def test_what_this_version_does_not_run(good: Path, tmp_path: Path, key: str, value: tuple[GGUFValueType, object], text: str) -> None:
    refuses(rewrite_gguf(good, tmp_path / "m.gguf", keys={key: value}), UnsupportedError, text)


def test_head_size_that_the_cache_does_not_hold(tmp_path: Path) -> None:
    build_llava(tmp_path / "hf", n_layer=1, n_head=2, n_head_kv=1, head_dim=12)
    convert(tmp_path / "hf", tmp_path / "m.gguf", None, "f32")
    with Model(tmp_path / "m.gguf") as model, pytest.raises(UnsupportedError, match="type 1 .f16. with head_dim 12"):
        Context(model)


#
# lazy layers
#


WRONG_LEADERS = {
    "forward reference": ([0, 1, 2, 4, 4, 5], "[3] is 4: a leader comes before its lazy layers"),
    "forward reference of layer 0": ([1, 1, 2, 3, 4, 5], "[0] is 1: a leader comes before its lazy layers"),
    "dropped leader": ([0, -1, 1, 3, 4, 5], "[2] is 1, but layer 1 has no attention"),
    "chain": ([0, 0, 1, 3, 4, 5], "[2] is 1, but layer 1 is lazy itself (its leader is 0)"),
    "lazy leader": ([0, 0, 0, 2, 4, 5], "[3] is 2, but layer 2 is lazy itself (its leader is 0)"),
    "hole": ([0, 0, 2, 0, 4, 5], "[3] is 0, but layer 2 between them has leader 2: a Lazy Block is consecutive"),
    "too few": ([0, 0, 0, 3, 4], "has 5 values, the model has 6 layers"),
    "too many": ([0, 0, 0, 3, 4, 5, 5], "has 7 values, the model has 6 layers"),
    "negative": ([0, -2, 2, 3, 4, 5], "[1] is -2, expected 0 .. 5, or -1 for no attention"),
    "hole after a dropped layer": ([0, 1, -1, 0, 4, 5], "[3] is 0, but layer 1 between them has leader 1: a Lazy Block is consecutive"),
    "past the end": ([0, 1, 2, 3, 4, 6], "[5] is 6, expected 0 .. 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_LEADERS)
def test_leaders_that_break_the_rules(good: Path, tmp_path: Path, case: str) -> None:
    leader, text = WRONG_LEADERS[case]
    path = rewrite_gguf(good, tmp_path / "m.gguf", keys={"qcache.lazy.leader": (ARRAY, np.int32(leader))})
    refuses(path, ModelError, f"qcache.lazy.leader{text if text[0] == '[' else ' ' + text}")
    # and the same leaders as an argument
    for mode in ("visual", "global"):
        with Model(good) as model, pytest.raises(InvalidArgumentError, match=re.escape(text)):
            Context(model, lazy_mode=mode, lazy_leader=leader)


def test_version_1_has_no_layers_without_attention(good: Path, tmp_path: Path) -> None:
    keys = {"qcache.lazy.leader": (ARRAY, np.int32([0, 0, -1, 0, 4, 5]))}
    refuses(rewrite_gguf(good, tmp_path / "m.gguf", keys=keys), ModelError, "qcache.lazy.leader[2] is -1", "version 1 of the format has not")
    keys["qcache.version"] = (U32, 2)
    with Model(rewrite_gguf(good, tmp_path / "m.gguf", keys=keys)) as model:
        assert model.info.lazy_leader == (0, 0, -1, 0, 4, 5)


@pytest.mark.parametrize(("value", "kind"), [
    ((ARRAY, np.uint32([0, 1, 1, 1, 4, 4])), "u32[]"),
    ((ARRAY, np.float32([0, 1, 1, 1, 4, 4])), "f32[]"),
    ((ARRAY, np.int64([0, 1, 1, 1, 4, 4])), "i64[]"),
    ((STR, "0,1,1,1,4,4"), "str"),
    ((I32, 0), "i32"),
])  # fmt: skip
def test_leaders_of_wrong_type(good: Path, tmp_path: Path, value: tuple[GGUFValueType, object], kind: str) -> None:
    path = rewrite_gguf(good, tmp_path / "m.gguf", keys={"qcache.lazy.leader": value})
    refuses(path, ModelError, f"key qcache.lazy.leader is of type {kind}, expected i32[n_layer]")


@pytest.mark.parametrize("mode", ["both", "VISUAL", "off"])
def test_unknown_lazy_mode(good: Path, tmp_path: Path, mode: str) -> None:
    path = rewrite_gguf(good, tmp_path / "m.gguf", keys={"qcache.lazy.mode": (STR, mode)})
    refuses(path, ModelError, f"qcache.lazy.mode is '{mode}', expected 'visual' or 'global'")


def test_leaders_go_with_a_lazy_mode(good: Path) -> None:
    with Model(good) as model:
        for mode in (None, "off"):
            with pytest.raises(InvalidArgumentError, match=r"lazy_leader goes with lazy_mode 1 \(global\) or 2 \(visual\)"):
                Context(model, lazy_mode=mode, lazy_leader=[0] * N_LAYER)


#
# tensors
#


@pytest.mark.parametrize(("mode", "missing"), [
    ("visual", "blk.0.attn_q.weight"),
    ("visual", "blk.2.attn_q.weight"),  # lazy, but text rows need it
    ("visual", "blk.3.attn_k.weight"),
    ("global", "blk.1.attn_q.weight"),  # a leader
    ("global", "blk.4.attn_k.weight"),
    ("global", "blk.2.attn_v.weight"),
    ("visual", "token_embd.weight"),
    ("visual", "output_norm.weight"),
    ("visual", "blk.5.ffn_down.weight"),
])  # fmt: skip
def test_missing_tensor(good: Path, tmp_path: Path, mode: str, missing: str) -> None:
    path = rewrite_gguf(good, tmp_path / "m.gguf", keys={"qcache.lazy.mode": (STR, mode)}, tensors={missing: None})
    refuses(path, ModelError, f"tensor {missing} is missing")


@pytest.mark.parametrize(("name", "array", "text"), [
    ("blk.0.attn_q.weight", np.zeros((64, 32), np.float32), "is [32, 64, 1, 1], expected [64, 64]"),
    ("blk.1.attn_norm.weight", np.zeros(32, np.float32), "is [32, 1, 1, 1], expected [64, 1]"),
    ("blk.0.ffn_gate.weight", np.zeros((2, 96, 64), np.float32), "is [64, 96, 2, 1], expected [64, 96]"),
    ("output.weight", np.zeros((10, 64), np.float32), "is [64, 10, 1, 1], expected [64, 566]"),
    ("blk.2.attn_vis_bias.weight", np.zeros(3, np.float32), "is [3, 1, 1, 1], expected [4, 1]"),
    ("blk.2.attn_vis_bias.weight", np.zeros(4, np.float16), "is of type f16, expected f32"),
    ("blk.2.attn_norm.weight", np.zeros(64, np.float16), "is of type f16, expected f32"),
    ("rope_freqs.weight", np.zeros(7, np.float32), "is [7, 1, 1, 1], expected [8, 1]"),
    # ggml aborts the process when it computes with these
    ("token_embd.weight", np.zeros((566, 64), np.int32), "is of type i32, which a matrix of weights cannot have"),
    ("output.weight", np.zeros((566, 64), np.float64), "is of type f64, which a matrix of weights cannot have"),
    ("blk.3.ffn_up.weight", np.zeros((96, 64), np.int8), "is of type i8, which a matrix of weights cannot have"),
], ids=str)  # fmt: skip
def test_tensor_of_wrong_shape_or_type(good: Path, tmp_path: Path, name: str, array: np.ndarray, text: str) -> None:
    refuses(rewrite_gguf(good, tmp_path / "m.gguf", tensors={name: array}), ModelError, f"tensor {name} {text}")


@pytest.mark.parametrize("name", ["something", "blk.6.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.00.attn_norm.weight",
                                  "v.blk.0.attn_q.weight"])  # fmt: skip
def test_tensor_that_the_architecture_does_not_have(good: Path, tmp_path: Path, name: str) -> None:
    path = rewrite_gguf(good, tmp_path / "m.gguf", tensors={name: np.zeros(16, np.float32)})
    refuses(path, UnsupportedError, f"tensor {name} is not one that architecture 'llama' has")


def test_model_of_vectors_instead_of_text(good: Path, tmp_path: Path) -> None:
    convert(good.parent / "hf", tmp_path / "m.gguf", tmp_path / "mmproj.gguf", "f16")
    refuses(tmp_path / "mmproj.gguf", UnsupportedError, "architecture 'clip' is not supported")


#
# ggml
#


def test_another_ggml_is_refused() -> None:
    native.check(lib.qcache_check_ggml_version(b"0.25.3"))
    for version in (b"0.25.4", b"0.2", b"", b"1.25.3", b"0.25.3-dev"):
        with pytest.raises(VersionError, match=f"built for ggml 0.25.3, but ggml {version.decode()} is loaded"):
            native.check(lib.qcache_check_ggml_version(version))
    with pytest.raises(VersionError, match="null"):
        native.check(lib.qcache_check_ggml_version(native.ffi.NULL))


#
# damaged headers
#


# loads every file it is given and computes with what loads; a line per file before it is touched and one after it
LOAD_ALL = """
import resource, sys
from pathlib import Path
from ggml_qcache.errors import QCacheError
from ggml_qcache.native import Context, Model

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for path in sys.argv[1:]:
    print(path, end=" ", flush=True)
    try:
        with Model(path, use_extra_bufts=False) as model:
            Context(model, n_ctx=64, n_threads=1, n_threads_batch=1).decode([1, 2, 3])
            print("loads", flush=True)
    except QCacheError as error:
        print("raises", type(error).__name__, str(error)[-120:], flush=True)
"""


def mutants(source: Path, folder: Path) -> list[Path]:
    """Copies of a file, each with one to three bytes of its header changed, or its end cut off there."""
    content, n_header = source.read_bytes(), GGUFReader(source).data_offset
    rng = np.random.default_rng(SEED)
    paths = []
    for i in range(N_MUTANTS):
        changed = bytearray(content)
        if i % 10 == 9:
            del changed[rng.integers(n_header) :]
        else:
            for position in rng.integers(n_header, size=1 + i % 3):
                changed[position] = rng.choice([changed[position] ^ 1 << rng.integers(8), 0, 0xFF, 0x7F, rng.integers(256)])
        paths.append(folder / f"{i}.gguf")
        paths[-1].write_bytes(changed)
    return paths


def test_damaged_headers_load_or_raise(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    build_llava(tmp_path / "hf", n_layer=3, hidden=32, n_head=2, n_head_kv=1, n_ff=32, seed=5)
    convert(tmp_path / "hf", tmp_path / "whole.gguf", None, "q8_0", lazy_layers=[1, 2], lazy_mode="visual")
    # without the vocabulary, which the core doesn't read
    vocabulary = [key for key in GGUFReader(tmp_path / "whole.gguf").fields if key.startswith("tokenizer.")]
    small = rewrite_gguf(tmp_path / "whole.gguf", tmp_path / "small.gguf", keys=dict.fromkeys(vocabulary))
    todo = [small, *mutants(small, tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    outcomes, crashed = [], []
    while todo:
        run = subprocess.run([sys.executable, "-c", LOAD_ALL, *map(str, todo)], env=env, capture_output=True, text=True, timeout=300)
        lines = [line for line in run.stdout.splitlines() if line.startswith(str(tmp_path))]
        outcomes += lines
        if run.returncode == 0:
            break
        crashed.append(f"{lines[-1]}: exit status {run.returncode}: {run.stderr[:300]}")
        todo = todo[len(lines) :]
    print("\n".join(outcomes))
    assert len(outcomes) == 1 + N_MUTANTS
    assert outcomes[0].endswith("loads")
    assert sum("raises" in line for line in outcomes) > N_MUTANTS / 3
    assert not crashed
