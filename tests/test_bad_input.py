"""Whatever `Llama` is given that it can't use: one exception with the values that failed, and it loads and answers as before."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from core_helpers import rewrite_gguf
from gguf import GGUFReader, GGUFValueType
from hf_models import Vision as Tower
from hf_models import build_llava
from llama_cpp._ggml import libggml
from tiny_llava import complete, load, tiny_llava

from ggml_qcache import FileError, InvalidArgumentError, Llama, ModelError, QCacheError, UnsupportedError, native
from ggml_qcache.errors import VersionError
from ggml_qcache_convert import convert

U32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY


@pytest.fixture(autouse=True)
def still_works():
    """After every refusal a good file loads and answers as before."""
    with load("visual") as llm:
        expected = complete(llm, max_tokens=4)
    yield
    with load("visual") as llm:
        assert complete(llm, max_tokens=4) == expected


def refuses(error: type[Exception], reason: str, file: object = "visual", **arguments: object) -> None:
    """Loading fails with that very exception; the text matches."""
    with pytest.raises(error, match=reason) as caught:
        load(str(file), **arguments)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 600


# arguments


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"lazy_layers": "0-3"}, "layer 0"),
        ({"lazy_layers": [0]}, "layer 0"),
        ({"lazy_layers": "5-8"}, "layer 8.*0 to 7"),
        ({"lazy_layers": [-1]}, "-1"),
        ({"lazy_layers": "7-5"}, "7-5"),
        ({"lazy_layers": "some"}, "'some'"),
        ({"lazy_layers": "3,3"}, "layer 3"),
        ({"lazy_mode": "both"}, "lazy_mode='both'"),
        ({"lazy_layers": "none", "lazy_mode": "visual"}, "lazy_mode='visual'.*'none'"),
        ({"file": "plain", "lazy_mode": "global"}, "no lazy layers"),
        ({"type_k": "q5_0"}, "type_k='q5_0'.*'f16', 'q8_0', 'q4_0'"),
        ({"type_v": 7}, "type_v=7"),
        ({"type_v": True}, "type_v=True"),
        ({"attn_impl": "magic"}, "attn_impl='magic'"),
        ({"score_cache": "maybe"}, "score_cache='maybe'"),
        ({"v_skip": -0.1}, "v_skip=-0.1"),
        ({"v_skip": 1}, "v_skip=1"),
        ({"v_skip": float("nan")}, "v_skip=nan"),
        ({"n_batch": 0}, "n_batch=0"),
        ({"n_ubatch": -1}, "n_ubatch=-1"),
        ({"n_ctx": 2**40}, f"n_ctx={2**40}"),
        ({"kv_bytes_max": -1}, "kv_bytes_max=-1"),
        ({"split_mode": 2}, "split_mode=2"),
        ({"embedding": True}, "embedding=True"),
        ({"lora_path": "adapter.gguf"}, "lora_path='adapter.gguf'"),
        ({"rope_freq_base": 5e5}, "rope_freq_base"),
        ({"flash_attn": True}, "flash_attn=True"),
        ({"mmproj_path": "/nowhere.gguf"}, "mmproj_path.*'/nowhere.gguf'"),
        ({"mmproj_path": "/tmp"}, "mmproj_path.*'/tmp'"),
        ({"file": "/nowhere.gguf"}, "model_path.*'/nowhere.gguf'"),
        ({"file": ""}, "model_path.*''"),
    ],
    ids=repr,
)
def test_arguments(arguments, reason):
    refuses(ValueError, reason, **arguments)


@pytest.mark.parametrize("arguments, reason", [({"n_ctx": -5}, "-5"), ({"block_tokens": 20}, "20"), ({"n_threads": -2}, "-2")])
def test_arguments_that_the_native_library_refuses(arguments, reason):
    refuses(InvalidArgumentError, reason, **arguments)


def test_unknown_arguments():
    refuses(TypeError, "'lazy_layer'", lazy_layer="5-7")
    refuses(TypeError, "'kwargs'", kwargs={})
    with pytest.raises(TypeError):
        Llama()


def test_defaults_of_the_base_class_pass():
    with load(n_gpu_layers=0, lora_path=None, embedding=False, use_mmap=True, flash_attn=False, vocab_only=False) as llm:
        assert complete(llm)


# files


def test_files_that_are_no_models(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    refuses(ModelError, f"{path}.*not a GGUF file", path)
    refuses(ModelError, f"{path}.*not GGUF", mmproj_path=str(path))
    path.write_bytes(Path(tiny_llava().plain).read_bytes()[:-1000])
    refuses(ModelError, f"{path}.*truncated", path)
    # each where the other belongs
    refuses(UnsupportedError, "clip", tiny_llava().mmproj)
    refuses(ModelError, "'llama', not 'clip'", mmproj_path=tiny_llava().plain)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.99])
def test_truncated_mmproj(tmp_path, share):
    data = Path(tiny_llava().mmproj).read_bytes()
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(data[: int(share * len(data))])
    refuses(ModelError, str(path), mmproj_path=str(path))


def test_mmproj_of_another_width(tmp_path):
    build_llava(tmp_path / "wide", n_layer=2, hidden=96, n_head=6)
    convert(tmp_path / "wide", tmp_path / "wide.gguf", tmp_path / "wide-mmproj.gguf", "f32")
    refuses(ModelError, r"wide-mmproj.gguf'.*width 96.*plain.gguf'.*64", "plain", mmproj_path=str(tmp_path / "wide-mmproj.gguf"))
    refuses(ModelError, r"mmproj.gguf'.*width 64.*wide.gguf'.*96", tmp_path / "wide.gguf")


@pytest.mark.parametrize(
    "keys, tensors, reason",
    [
        ({"clip.vision.block_count": None}, {}, "block_count"),
        ({"clip.projector_type": (STRING, "magic")}, {"mm.2.weight": None}, "magic"),
        ({}, {"mm.2.weight": None}, "mm.2.weight"),
        ({}, {"v.blk.1.attn_q.weight": None}, "v.blk.1.attn_q.weight"),
        ({}, {"v.blk.1.attn_q.weight": np.zeros((32, 16), np.float32)}, r"attn_q.weight.*\[16, 32\].*\[32, 32\]"),
        ({"clip.vision.image_size": (U32, 70)}, {}, r"v.position_embd.weight.*\[32, 17\].*\[32, 26\]"),
        ({"clip.vision.attention.head_count": (U32, 5)}, {}, "32 values for 5 heads"),
    ],
)
def test_damaged_mmproj(tmp_path, keys, tensors, reason):
    path = rewrite_gguf(Path(tiny_llava().mmproj), tmp_path / "mmproj.gguf", keys, tensors)
    refuses(ModelError, reason, mmproj_path=str(path))


def test_unsupported_architecture(tmp_path):
    path = rewrite_gguf(Path(tiny_llava().plain), tmp_path / "model.gguf", {"general.architecture": (STRING, "mamba")})
    refuses(UnsupportedError, "mamba", path)


@pytest.mark.parametrize(
    "leader",
    [
        [0, 1, 4, 3, 4, 5, 6, 7],  # forward
        [0, 1, 1, 2, 4, 5, 6, 7],  # a chain
        [0, 0, 1, 1, 4, 5, 6, 7],  # of a lazy leader
        [0, 1, 1, 3, 1, 5, 6, 7],  # a hole in the block
        [0, 1, 1, 3],
        [0, 1, 1, 3, 4, 5, 6, 7, 8],
        [-1, 1, 1, 3, 4, 5, 6, 7],
    ],
    ids=str,
)
def test_lazy_leaders_that_break_the_rules(tmp_path, leader):
    path = rewrite_gguf(Path(tiny_llava().visual), tmp_path / "model.gguf", {"qcache.lazy.leader": (ARRAY, np.array(leader, np.int32))})
    refuses(ModelError, "qcache.lazy.leader", path)


def test_missing_tensors(tmp_path):
    path = rewrite_gguf(Path(tiny_llava().visual), tmp_path / "model.gguf", tensors={"blk.2.attn_q.weight": None})
    refuses(ModelError, "blk.2.attn_q.weight", path)
    # global mode left them out, so these layers can't be full
    refuses(UnsupportedError, "attn_[qk]", "global_", lazy_layers="none")
    refuses(UnsupportedError, "attn_[qk]", "global_", lazy_mode="visual")
    refuses(UnsupportedError, "v_skip 0.1 needs .* got attn_impl 1", "global_", v_skip=0.1, attn_impl="scalar")
    refuses(UnsupportedError, "v_skip 0.1 needs .* score_cache 1", "global_", v_skip=0.1, score_cache="off")
    with load("global_") as llm:
        assert complete(llm)


def test_tokenizer_and_model_that_don_t_match(tmp_path):
    tokens = GGUFReader(tiny_llava().plain).fields["tokenizer.ggml.tokens"]
    weight = next(tensor for tensor in GGUFReader(tiny_llava().plain).tensors if tensor.name == "output.weight").data
    tensors = {"output.weight": weight[:-2], "token_embd.weight": weight[:-2]}
    path = rewrite_gguf(Path(tiny_llava().plain), tmp_path / "model.gguf", {"llama.vocab_size": (U32, len(tokens.data) - 2)}, tensors)
    with pytest.raises(ModelError, match=str(len(tokens.data))):
        load(str(path))
    path = rewrite_gguf(Path(tiny_llava().plain), tmp_path / "model.gguf", {"tokenizer.ggml.model": (STRING, "magic")})
    refuses(ModelError, f"{path}.*vocabulary", path)


def test_tower_of_another_shape_is_fine(tmp_path):
    build_llava(tmp_path / "other", n_layer=2, vision=Tower(n_embd=48, n_head=6))
    convert(tmp_path / "other", tmp_path / "model.gguf", tmp_path / "mmproj.gguf", "f32")
    with load("plain", mmproj_path=str(tmp_path / "mmproj.gguf")) as llm:
        assert complete(llm)


# tokens


def test_tokens_out_of_range():
    with load() as llm:
        expected = complete(llm)
        for tokens in ([5, llm.n_vocab()], [5, -7], [5, 2**31 + 5]):
            with pytest.raises(ValueError, match=f"token {tokens[1]}"):
                complete(llm, tokens)
        for tokens in ([llm.n_vocab()], [-7]):
            with pytest.raises(ValueError, match=str(tokens[0])):
                llm.eval(tokens)
        assert complete(llm) == expected


# versions


def test_another_ggml_is_refused(monkeypatch):
    with pytest.raises(VersionError, match=r"0\.9\.9"):
        native.check(native.lib.qcache_check_ggml_version(b"0.9.9"))
    built_for = libggml.ggml_version().decode()

    class Other:
        @staticmethod
        def ggml_version():
            return b"0.9.9"

    monkeypatch.setattr(native, "libggml", Other)
    with pytest.raises(ImportError, match=rf"(?=.*0\.9\.9)(?=.*{built_for})"):
        native.check_ggml_version()


def test_import_is_quiet_and_complete():
    code = "import ggml_qcache as q; print(q.__version__, sorted(n for n in q.__all__ if not hasattr(q, n)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.split()[1:], result.stderr) == (0, ["[]"], "")


def test_errors_are_qcache_errors():
    for error in (FileError, InvalidArgumentError, ModelError, UnsupportedError):
        assert issubclass(error, QCacheError)
    assert issubclass(InvalidArgumentError, ValueError)
