"""Saved states: what is loaded continues as if nothing had happened, and what isn't a state is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from core_helpers import N_LAYER, CoreModel, CoreModels, Prompt, assert_close, decode, make_context, make_prompt, rewrite_gguf
from gguf import GGUFValueType

from ggml_qcache.errors import FileError, NoBlocksError, StateError
from ggml_qcache.native import Context, Model
from ggml_qcache_convert import leaders_of

LEADER = leaders_of([1, 2, 4, 7], N_LAYER)
HEADER_WORDS = 3 + 11 + N_LAYER  # magic, version, count, then the fingerprint with the leaders


@pytest.fixture(scope="module")
def model(core_models: CoreModels) -> CoreModel:
    return core_models["llama-gqa-32"]


@pytest.fixture(params=["off", "global", "visual"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def lazy_context(model: CoreModel, mode: str, **params) -> Context:
    leader = None if mode == "off" else LEADER
    return make_context(model.native, **{"lazy_mode": mode, "lazy_leader": leader, "n_seq_max": 3, **params})


def fill(context: Context, model: CoreModel) -> dict[int, int]:
    """Three sequences, two of them sharing blocks; returns their lengths."""
    decode(context, make_prompt(model.native, "t7 v37 t5 v20 t9"))
    context.seq_cp(0, 2, 50)
    decode(context, make_prompt(model.native, "v12 t2", seed=3), 2)
    decode(context, make_prompt(model.native, "v33", seed=4), 1)
    return {i: context.seq_len(i) for i in range(3)}


def continue_all(context: Context, model: CoreModel) -> np.ndarray:
    """Continues every sequence with text, a picture and text; returns all logits."""
    tail: Prompt = make_prompt(model.native, "t3 v17 t4", seed=5)
    logits = [decode(context, part, seq_id) for seq_id in range(3) for part in (tail, tail[:1], tail[3:5])]
    return np.concatenate(logits)


def checksum(state: bytes) -> bytes:
    """The end of a state: FNV-1a over its 32-bit words."""
    value = 0xCBF29CE484222325
    for (word,) in struct.iter_unpack("<I", state):
        value = (value ^ word) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return struct.pack("<Q", value)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "f16"), ("q8_0", "q8_0")], ids="-".join)
def test_continuing_a_loaded_state_equals_never_having_stopped(model: CoreModel, tmp_path: Path, mode: str, types: tuple[str, str]) -> None:
    params = {"type_k": types[0], "type_v": types[1], "block_tokens": 16}
    context = lazy_context(model, mode, **params)
    lengths = fill(context, model)
    usage = context.kv_usage()
    state = context.state_get()
    context.state_save_file(tmp_path / "s.qcache")
    assert (tmp_path / "s.qcache").read_bytes() == state
    assert [path.name for path in tmp_path.iterdir()] == ["s.qcache"]
    expected = continue_all(context, model)

    by_bytes = lazy_context(model, mode, **params)
    by_bytes.state_set(state)
    by_file = lazy_context(model, mode, **params)
    decode(by_file, make_prompt(model.native, "t50", seed=8), 1)  # goes when the state comes
    by_file.state_load_file(tmp_path / "s.qcache")
    context.state_set(state)  # back to then
    for loaded in (by_bytes, by_file, context):
        assert {i: loaded.seq_len(i) for i in lengths} == lengths
        assert loaded.kv_usage() == usage
        with pytest.raises(ValueError, match="no logits|has no"):
            loaded.logits()
        assert loaded.state_get() == state
        assert np.array_equal(continue_all(loaded, model), expected)


def test_other_limits_and_kernels_are_no_obstacle(model: CoreModel) -> None:
    context = lazy_context(model, "visual")
    fill(context, model)
    state = context.state_get()
    expected = continue_all(context, model)
    other = lazy_context(model, "visual", n_ctx=256, n_seq_max=5, n_ubatch=9, attn_impl="scalar", score_cache="off")
    other.state_set(state)
    assert_close(continue_all(other, model), expected, "rounding")


def test_an_empty_state_is_a_state(model: CoreModel) -> None:
    empty = lazy_context(model, "visual").state_get()
    context = lazy_context(model, "visual")
    fill(context, model)
    context.state_set(empty)
    assert context.kv_usage()["bytes"] == 0 and [context.seq_len(i) for i in range(3)] == [0, 0, 0]


class Victim:
    """A context that holds something, and must still hold it after every refused state."""

    def __init__(self, model: CoreModel, **params) -> None:
        self.model = model
        self.context = lazy_context(model, "visual", **params)
        self.prompt = make_prompt(model.native, "t5 v9 t3", seed=6)
        decode(self.context, self.prompt)
        self.state = self.context.state_get()

    def refuses(self, state: bytes, text: str, error: type[Exception] = StateError) -> None:
        """Loading fails with that text, and nothing has changed."""
        with pytest.raises(error, match=text):
            self.context.state_set(state)
        assert self.context.state_get() == self.state

    def still_works(self) -> None:
        """Continues as a context that was never offered anything."""
        fresh = lazy_context(self.model, "visual")
        decode(fresh, self.prompt)
        step = make_prompt(self.model.native, "t2", seed=7)
        assert np.array_equal(decode(self.context, step), decode(fresh, step))


@pytest.fixture(scope="module")
def saved(model: CoreModel) -> bytes:
    context = lazy_context(model, "visual")
    fill(context, model)
    return context.state_get()


def test_damaged_states_are_refused(model: CoreModel, saved: bytes) -> None:
    victim = Victim(model)
    rng = np.random.default_rng(1)
    header = saved.index(struct.pack("<i", N_LAYER)) + 4 * (N_LAYER + 60)
    for position in (*range(8, header, 3), *rng.integers(header, len(saved), 60)):
        damaged = bytearray(saved)
        damaged[position] ^= 1 << rng.integers(8)
        victim.refuses(bytes(damaged), "is damaged")
    for length in (0, 1, 3, 4, 8, 11, 12, 50, header, len(saved) // 2, len(saved) - 8, len(saved) - 4, len(saved) - 1):
        victim.refuses(saved[:length], rf"saved state of {length} bytes is damaged|damaged at byte")
    victim.refuses(saved + bytes(4), "is damaged")
    victim.refuses(b"GGUF" + saved[4:], "does not start as a state does")
    victim.refuses(saved[:4] + struct.pack("<i", 3) + saved[8:], "unknown version 3")
    victim.refuses(rng.bytes(1000), "does not start as a state does")
    victim.still_works()


@pytest.mark.parametrize(("word", "value", "text"), [
    (HEADER_WORDS, 0x7FFFFFFF, "number of sequences or blocks 2147483647"),
    (HEADER_WORDS, -1, "number of sequences or blocks -1"),
    (HEADER_WORDS, 0, "belongs to no sequence"),
    (HEADER_WORDS + 1, 0x7FFFFFFF, "number of sequences or blocks 2147483647"),
    (HEADER_WORDS + 1, -5, "number of sequences or blocks -5"),
    (HEADER_WORDS + 2, 2, "modality 2"),
    (HEADER_WORDS + 2, -1, "modality -1"),
    (HEADER_WORDS + 2, 1, "bytes of blocks that follow"),
    ("blocks of a sequence", 0x7FFFFFFF, "blocks of a sequence 2147483647"),
    ("blocks of a sequence", -1, "blocks of a sequence -1"),
    ("id", 0x7FFFFFFF, "block 2147483647"),
    ("id", -1, "block -1"),
    ("tokens", 0, "damaged.*block 0"),
    ("tokens", 33, "damaged.*block 0"),
    ("tokens", -1, "damaged.*block 0"),
])  # fmt: skip
def test_wrong_values_under_a_right_checksum_are_refused(model: CoreModel, saved: bytes, word: int | str, value: int, text: str) -> None:
    n_blocks = struct.unpack_from("<i", saved, 4 * (HEADER_WORDS + 1))[0]
    first = HEADER_WORDS + 2 + n_blocks
    names = {"blocks of a sequence": first, "id": first + 1, "tokens": first + 2}
    wrong = bytearray(saved[:-8])
    struct.pack_into("<i", wrong, 4 * names.get(word, word), value)
    victim = Victim(model)
    victim.refuses(bytes(wrong) + checksum(wrong), text)
    victim.refuses(bytes(saved[:-12]) + checksum(saved[:-12]), "bytes of blocks that follow")
    victim.still_works()


@pytest.mark.parametrize(("params", "text"), [
    ({"lazy_mode": "off", "lazy_leader": None}, "lazy_mode 0, this context has 2"),
    ({"lazy_mode": "global"}, "lazy_mode 1, this context has 2"),
    ({"lazy_leader": leaders_of([1, 4, 7], N_LAYER)}, "leader of layer 2 2, this context has 0"),
    ({"type_k": "q8_0"}, "type_k 8, this context has 1"),
    ({"type_v": "q8_0"}, "type_v 8, this context has 1"),
    ({"block_tokens": 64}, "n_block_tokens 64, this context has 32"),
])  # fmt: skip
def test_states_of_another_configuration_are_refused(model: CoreModel, params: dict, text: str) -> None:
    other = lazy_context(model, "visual", **params)
    fill(other, model)
    victim = Victim(model)
    victim.refuses(other.state_get(), text)
    victim.still_works()


def test_states_of_another_model_are_refused(model: CoreModel, core_models: CoreModels, tmp_path: Path) -> None:
    victim = Victim(model)
    for shape, text in {"llama-mha-64": "n_head 2, this context has 4", "qwen2-gqa-64": "n_embd 256, this context has 64",
                        "llama-gqa-80": "n_head_kv 1, this context has 2"}.items():
        other = make_context(core_models[shape].native, lazy_mode="visual", lazy_leader=LEADER)
        decode(other, make_prompt(core_models[shape].native, "t5"))
        victim.refuses(other.state_get(), text)
    fewer = {"llama.block_count": (GGUFValueType.UINT32, N_LAYER - 1)}
    tensors = {tensor: None for tensor in _tensors_of_layer(model.path, N_LAYER - 1)}
    with Model(rewrite_gguf(model.path, tmp_path / "m.gguf", keys=fewer, tensors=tensors)) as native:
        other = make_context(native)
        victim.refuses(other.state_get(), "another number of layers")
    victim.still_works()


def _tensors_of_layer(path: Path, il: int) -> list[str]:
    from gguf import GGUFReader

    return [tensor.name for tensor in GGUFReader(path).tensors if tensor.name.startswith(f"blk.{il}.")]


def test_states_that_do_not_fit_are_refused(model: CoreModel, saved: bytes) -> None:
    victim = Victim(model, n_seq_max=2)
    victim.refuses(saved, "holds sequence 2, this context has n_seq_max 2")
    victim = Victim(model, n_ctx=60)
    victim.refuses(saved, r"holds 78 tokens in sequence 0, n_ctx is 60")
    limit = victim.context.kv_usage()["bytes"] + 1
    victim = Victim(model, kv_bytes_max=limit)
    victim.refuses(saved, rf"needs \d+ bytes of KV, kv_bytes_max is {limit}", NoBlocksError)
    victim.still_works()


def test_files_that_cannot_be_used(model: CoreModel, saved: bytes, tmp_path: Path) -> None:
    victim = Victim(model)
    for path, error, text in (
        (tmp_path / "missing", FileError, "missing: No such file"),
        (tmp_path, FileError, "cannot be read|directory"),
    ):
        with pytest.raises(error, match=text):
            victim.context.state_load_file(path)
    (tmp_path / "cut").write_bytes(saved[: len(saved) // 2])
    with pytest.raises(StateError, match="damaged"):
        victim.context.state_load_file(tmp_path / "cut")
    with pytest.raises(FileError, match="no/such/folder"):
        victim.context.state_save_file(tmp_path / "no/such/folder/s.qcache")
    # what is there stays when the new state can't be written
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder"):
        victim.context.state_save_file(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "folder"]
    assert victim.context.state_get() == victim.state
    victim.still_works()
