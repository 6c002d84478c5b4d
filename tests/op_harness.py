"""Drives the lazy-attention operation (tests/native/op_harness.cpp): block tables, packed K and V, ctypes.

A Case is two layers over a few sequences: layer 0 is full, layer 1 has it as its leader and runs in the mode of the
case. Tokens before `n_past` are packed into the blocks here, the next `n_new` are appended by the operation, those after
them have room in the blocks but are not written yet.
"""

import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants

import ref_numpy
from ref_numpy import TEXT, VISUAL

F16, Q8_0, Q4_0 = 1, 8, 2
TYPE_NAMES = {F16: "f16", Q8_0: "q8_0", Q4_0: "q4_0"}
GUARD = 0xFF
NONE, WRITE, READ = 0, 1, 2  # score cache
ON_DEVICE = "QCACHE_OP_DEVICE" in os.environ  # the operation on this machine's GPU, instead of emulated ones


class SeqBlock(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("seq", "id", "first", "n", "modality")]


class Row(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("seq", "pos", "q_own", "block", "modality")]


class Step(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.POINTER(SeqBlock)),
        ("rows", ctypes.POINTER(Row)),
        ("n_blocks", ctypes.c_int32),
        ("n_rows", ctypes.c_int32),
        ("n_seqs", ctypes.c_int32),
        ("n_score_keys", ctypes.c_int32),
        ("scores", ctypes.c_void_p),
        ("v_rows", ctypes.c_int64 * 2),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("head_dim", "n_head", "n_head_kv", "n_block_tokens", "type_k", "type_v")),
        ("scale", ctypes.c_float),
        ("q_source", ctypes.c_int32 * 2 * 2),
        ("score_op", ctypes.c_int32),
        ("k_offset", ctypes.c_int64 * 2 * 2),
        ("v_offset", ctypes.c_int64 * 2),
        ("append_k_offset", ctypes.c_int64 * 2),
        ("n_own", ctypes.c_int32),
        ("n_k", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("vis_bias", "q_own", "q_leader", "k", "v", "out")),
        ("v_skip", ctypes.c_float),
    ]


class HarnessError(Exception):
    """A constructor refused, the graph failed, or a guard was overwritten; carries the library's text."""


def load_library() -> ctypes.CDLL:
    build = Path(os.environ.get("QCACHE_TEST_BUILD", Path(__file__).parents[1] / "build"))
    name = "qcache-op-device" if ON_DEVICE else "qcache-op-harness"
    found = [p for p in build.rglob(f"*{name}*") if p.suffix in (".so", ".dylib", ".dll")]
    if "QCACHE_TEST_BUILD" not in os.environ:
        found = [p for p in found if "asan" not in p.parts]  # python would have to preload the sanitizer
    if not found:
        raise FileNotFoundError(
            f"no {name} library under {build}: build it with `make native-tests`, or set QCACHE_TEST_BUILD "
            "to a build folder made with -DQCACHE_BUILD_TESTS=ON"
        )
    lib = ctypes.CDLL(str(max(found, key=lambda p: p.stat().st_mtime)))
    lib.harness_error.restype = ctypes.c_char_p
    lib.harness_init.restype = ctypes.c_void_p
    lib.harness_init.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    lib.harness_free.argtypes = [ctypes.c_void_p]
    lib.harness_block.restype = ctypes.c_void_p
    lib.harness_block.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    lib.harness_kernel_name.restype = ctypes.c_char_p
    if not ON_DEVICE:
        lib.harness_metal_emulate.restype = ctypes.c_char_p
        lib.harness_metal_emulate.argtypes = [
            ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64,
        ]
        lib.harness_metal_without_barrier.argtypes = [ctypes.c_int32]
        lib.harness_metal_barriers.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    lib.harness_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32]
    return lib


_library = None


def library() -> ctypes.CDLL:
    global _library
    _library = _library or load_library()
    return _library


def kernel_names() -> list[str]:
    """Kernels of this CPU, best first, then the emulated widths."""
    names = []
    while (name := library().harness_kernel_name(len(names))) is not None:
        names.append(name.decode())
    return names


#
# packing
#


def padded(type_: int, head_dim: int) -> int:
    return head_dim if type_ == F16 else (head_dim + 31) // 32 * 32


def pack(x: np.ndarray, type_: int) -> np.ndarray:
    """Rows [..., head_dim] as the bytes [..., row_bytes] that a block holds."""
    if type_ == F16:
        return np.ascontiguousarray(x.astype(np.float16)).view(np.uint8)
    fill = padded(type_, x.shape[-1]) - x.shape[-1]
    x = np.pad(x.astype(np.float32), [(0, 0)] * (x.ndim - 1) + [(0, fill)])
    return quants.quantize(x, GGMLQuantizationType(type_))


def unpack(rows: np.ndarray, type_: int, head_dim: int) -> np.ndarray:
    if type_ == F16:
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float64)
    return quants.dequantize(rows, GGMLQuantizationType(type_))[..., :head_dim].astype(np.float64)


#
# cases
#


@dataclass(frozen=True)
class Shape:
    head_dim: int = 64
    n_head: int = 4
    n_head_kv: int = 4
    type_k: int = F16
    type_v: int = F16
    n_block: int = 32

    def __str__(self):
        return f"d{self.head_dim}-h{self.n_head}kv{self.n_head_kv}-{TYPE_NAMES[self.type_k]}-{TYPE_NAMES[self.type_v]}-b{self.n_block}"


@dataclass
class Sequence:
    pattern: str  # "t5 v40 t3": runs of text and visual tokens
    n_past: int
    n_new: int

    def __post_init__(self):
        runs = [({"t": TEXT, "v": VISUAL}[run[0]], int(run[1:])) for run in self.pattern.split()]
        self.modality = np.array([m for m, n in runs for _ in range(n)])

    @property
    def n(self):
        return len(self.modality)


@dataclass
class Case:
    shape: Shape
    sequences: list[Sequence]
    mode: str = "off"
    vis_bias: np.ndarray | None = None
    seed: int = 1
    q_gain: float = 3.0  # of the queries: how peaked the attention is
    shared: tuple[int, int, int] | None = None  # (a, b, n): sequence b begins with the first n tokens of a, in a's blocks
    order: str = "sequence"  # of the rows; or "shuffled"

    # filled in: K and V of every token by layer, Q of every token by layer
    k: list = field(default_factory=list)
    v: list = field(default_factory=list)
    q: list = field(default_factory=list)
    _packed: dict = field(default_factory=dict)
    _references: dict = field(default_factory=dict)

    def __post_init__(self):
        s, rng = self.shape, np.random.default_rng(self.seed)
        for layer in range(2):
            self.k.append([rng.standard_normal((x.n, s.n_head_kv, s.head_dim)).astype(np.float32) for x in self.sequences])
            self.v.append([rng.standard_normal((x.n, s.n_head_kv, s.head_dim)).astype(np.float32) for x in self.sequences])
            self.q.append([self.q_gain * rng.standard_normal((x.n, s.n_head, s.head_dim)).astype(np.float32) for x in self.sequences])
        if self.shared:
            a, b, n = self.shared
            for x in (*self.k, *self.v):
                x[b][:n] = x[a][:n]
        self._place()
        self.rows = [(i, pos) for i, x in enumerate(self.sequences) for pos in range(x.n_past, x.n_past + x.n_new)]
        if self.order == "shuffled":
            rng.shuffle(self.rows)
        self.modality = np.array([self.sequences[i].modality[pos] for i, pos in self.rows])

    def keeps_k(self, layer: int, modality: int) -> bool:
        return layer == 0 or self.mode == "off" or (self.mode == "visual" and modality == TEXT)

    def _place(self):
        """Block tables and where each layer lies in a block."""
        s = self.shape
        self.blocks = []  # by sequence: (id, first, n, modality)
        self.block_modality = []
        for i, x in enumerate(self.sequences):
            table, pos = [], 0
            if self.shared and i == self.shared[1]:
                a, _, n_shared = self.shared
                for id_, first, n, m in self.blocks[a]:
                    if first < n_shared:
                        assert first + n <= n_shared, "only whole blocks are shared here"
                        table.append((id_, first, n, m))
                        pos = first + n
            while pos < x.n:
                m, n = x.modality[pos], 1
                while n < s.n_block and pos + n < x.n and x.modality[pos + n] == m:
                    n += 1
                table.append((len(self.block_modality), pos, n, m))
                self.block_modality.append(m)
                pos += n
            self.blocks.append(table)

        self.k_bytes, self.v_bytes = (pack(np.zeros((1, s.head_dim)), t).shape[-1] for t in (s.type_k, s.type_v))
        gap = 64
        self.k_offset, self.v_offset, self.block_bytes = {}, {}, [0, 0]
        for m in (TEXT, VISUAL):
            at = gap
            for layer in range(2):
                if self.keeps_k(layer, m):
                    self.k_offset[layer, m] = at
                    at += self.k_bytes * s.n_block * s.n_head_kv + gap
                self.v_offset[layer, m] = at
                at += self.v_bytes * s.n_block * s.n_head_kv + gap
            self.block_bytes[m] = at

    def packed(self, what: str, layer: int, i: int) -> np.ndarray:
        """Bytes [n_tokens, n_head_kv, row_bytes] of "k" or "v" of sequence i."""
        key = what, layer, i
        if key not in self._packed:
            self._packed[key] = pack(getattr(self, what)[layer][i], getattr(self.shape, f"type_{what}"))
        return self._packed[key]

    def images(self, with_new: bool) -> list[np.ndarray]:
        """The bytes of all blocks, 0xff where nothing is written."""
        s = self.shape
        images = [np.full(self.block_bytes[m], GUARD, np.uint8) for m in self.block_modality]
        for i, x in enumerate(self.sequences):
            n_written = x.n_past + (x.n_new if with_new else 0)
            for id_, first, n, m in self.blocks[i]:
                n = min(n, n_written - first)
                if n <= 0:
                    continue
                for layer in range(2):
                    parts = [(self.packed("v", layer, i), self.v_offset[layer, m], self.v_bytes)]
                    if self.keeps_k(layer, m):
                        parts.append((self.packed("k", layer, i), self.k_offset[layer, m], self.k_bytes))
                    for data, offset, row_bytes in parts:
                        size = row_bytes * s.n_block * s.n_head_kv
                        view = images[id_][offset : offset + size].reshape(s.n_head_kv, s.n_block, row_bytes)
                        view[:, :n] = data[first : first + n].transpose(1, 0, 2)
        return images

    def reference(self, layer: int):
        """Outputs [n_rows, n_head, head_dim] and logits [n_rows, n_head, longest sequence] of the judge."""
        if layer in self._references:
            return self._references[layer]
        s = self.shape
        out = np.zeros((len(self.rows), s.n_head, s.head_dim))
        logits = np.full((len(self.rows), s.n_head, max(x.n for x in self.sequences)), np.nan)
        for i, x in enumerate(self.sequences):
            index = [r for r, row in enumerate(self.rows) if row[0] == i]
            if not index:
                continue
            positions = [self.rows[r][1] for r in index]
            stored = [unpack(self.packed("k", il, i), s.type_k, s.head_dim) for il in range(2)]
            v = unpack(self.packed("v", layer, i), s.type_v, s.head_dim)
            mode, bias = (self.mode, self.vis_bias) if layer == 1 else ("off", None)
            out[index], logits[index, :, : x.n] = ref_numpy.attention(
                self.q[layer][i][positions], self.q[0][i][positions], stored[layer], stored[0], v, x.modality, positions, mode, bias
            )
        self._references[layer] = out, logits
        return out, logits

    def run(self, kernel: str, n_threads: int = 1, score_cache: bool = False, n_runs: int = 1, check_blocks: bool = True, edit=None):
        """Runs both layers in one graph.

        Args:
            edit: called with the two Layer structures and the Step before the run, to break them.

        Returns:
            Outputs of both layers [n_rows, n_head, head_dim], and the score cache (None without one).
        """
        s, lib = self.shape, library()
        n_rows = len(self.rows)
        keep = []  # what the structures point to

        def pointer(x):
            x = np.ascontiguousarray(x, np.float32)
            keep.append(x)
            return x.ctypes.data

        sizes = np.array([self.block_bytes[m] for m in self.block_modality], np.int64)
        handle = lib.harness_init(sizes.ctypes.data, len(sizes))
        try:
            memory = [
                np.ctypeslib.as_array(ctypes.cast(lib.harness_block(handle, i), ctypes.POINTER(ctypes.c_uint8)), (int(n),))
                for i, n in enumerate(sizes)
            ]
            for block, image in zip(memory, self.images(with_new=False)):
                block[:] = image

            table = [SeqBlock(i, *map(int, block)) for i, blocks in enumerate(self.blocks) for block in blocks]
            # rows that have a Q of their own in a visual lazy layer come first in it, as in the library
            rows = []
            for i, pos in self.rows:
                index = next(b for b, (_, first, n, _) in enumerate(self.blocks[i]) if first <= pos < first + n)
                rows.append(Row(i, pos, len(rows), index, int(self.sequences[i].modality[pos])))
            if self.mode == "visual" and VISUAL in self.modality:
                order = np.argsort(self.modality, kind="stable")
                for q_own, r in enumerate(order):
                    rows[r].q_own = q_own
            order = np.argsort([row.q_own for row in rows])

            by_row = [np.array([self.q[layer][i][pos] for i, pos in self.rows]) for layer in range(2)]
            n_score_keys = max(sum(self.blocks[row.seq][row.block][1:3]) for row in rows) + 2 if score_cache else 0
            scores = np.zeros((n_rows, n_score_keys * s.n_head), np.float32) if score_cache else None
            step = Step(
                (SeqBlock * len(table))(*table), (Row * n_rows)(*rows), len(table), n_rows, len(self.sequences), n_score_keys,
                scores.ctypes.data if score_cache else None,
            )

            layers, outputs = [], []
            for il in range(2):
                layer = Layer(s.head_dim, s.n_head, s.n_head_kv, s.n_block, s.type_k, s.type_v, s.head_dim**-0.5)
                for rm in (TEXT, VISUAL):
                    layer.v_offset[rm] = self.v_offset[il, rm]
                    layer.append_k_offset[rm] = self.k_offset.get((il, rm), -1)
                    for km in (TEXT, VISUAL):
                        own = il == 0 or ref_numpy.pair_source(self.mode, rm, km) == "own"
                        layer.q_source[rm][km] = 0 if own else 1
                        layer.k_offset[rm][km] = self.k_offset[il if own else 0, km]
                lazy = il == 1 and self.mode != "off"
                layer.score_op = NONE if not score_cache else READ if lazy else WRITE if il == 0 else NONE
                kept = [r for r, m in enumerate(self.modality) if self.keeps_k(il, m)]
                needs_own = [r for r in order if not lazy or (self.mode == "visual" and self.modality[r] == TEXT)]
                if needs_own:
                    layer.q_own, layer.n_own = pointer(by_row[il][needs_own]), len(needs_own)
                if lazy:
                    layer.q_leader = pointer(by_row[0])
                    if self.vis_bias is not None and self.mode == "visual":
                        layer.vis_bias = pointer(self.vis_bias)
                if kept:
                    layer.k, layer.n_k = pointer(np.array([self.k[il][self.rows[r][0]][self.rows[r][1]] for r in kept])), len(kept)
                layer.v = pointer(np.array([self.v[il][i][pos] for i, pos in self.rows]))
                outputs.append(np.zeros((n_rows, s.n_head, s.head_dim), np.float32))
                layer.out = outputs[-1].ctypes.data
                layers.append(layer)
            if edit:
                edit(layers, step)

            status = lib.harness_run(handle, ctypes.byref(step), (Layer * 2)(*layers), 2, kernel.encode(), n_threads, n_runs)
            if status != 0:
                raise HarnessError(lib.harness_error().decode())
            if check_blocks:
                for i, (block, image) in enumerate(zip(memory, self.images(with_new=True))):
                    assert np.array_equal(block, image), f"block {i} differs at bytes {np.flatnonzero(block != image)[:8]}"
        finally:
            lib.harness_free(handle)
        return outputs[0], outputs[1], self.by_head(scores) if score_cache else None

    def by_head(self, scores: np.ndarray) -> np.ndarray:
        """The score cache as ``[n_rows, n_head, keys]``; it lies block after block, ``[n_head, keys of the block]`` each."""
        n_head = self.shape.n_head
        out = np.full((len(scores), n_head, scores.shape[1] // n_head), np.nan, np.float32)
        for row, (i, _) in enumerate(self.rows):
            for _, first, n, _ in self.blocks[i]:
                if first + n <= out.shape[2]:
                    out[row, :, first : first + n] = scores[row, first * n_head : (first + n) * n_head].reshape(n_head, n)
        return out
