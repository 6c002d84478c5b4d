"""Fills a context with many long sequences from one short prefill.

A batch is honest only where every sequence reads memory of its own: sequences made with ``seq_cp`` share blocks, and the
second one would find the first one's in the cache. Prefilling each takes hours on two cores. So one sequence is prefilled,
its saved state is taken apart, and its blocks are repeated for every sequence and to any length. What keys and values hold
doesn't change the time of a step, so repeated ones (at the wrong positions) are as good as others.

This knows the layout of a state (qcache-cache.cpp, version 2), until the C API can copy the state of one sequence.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from typing import Any

import cffi
import numpy as np
import numpy.typing as npt

_MAGIC, _VERSION = 0x53514751, 2
_HEADER = 3  # magic, version, number of fingerprint values
_CHECKSUM_BYTES = 8
_CHECKSUM = """
#include <stddef.h>
#include <stdint.h>
static uint64_t checksum(const uint32_t * data, size_t n) {
    uint64_t sum = 0xcbf29ce484222325;
    for (size_t i = 0; i < n; i++) {
        sum = (sum ^ data[i]) * 0x100000001b3;
    }
    return sum;
}
"""


def repeated_state(state: bytes, block_bytes: tuple[int, int], n_tokens: int, n_seq: int) -> npt.NDArray[np.uint8]:
    """A state of several sequences, none sharing a block, made of one that holds a single sequence.

    Args:
        state: What ``Context.state_get`` gave; sequence 0 holds tokens, no other does.
        block_bytes: Bytes of a block of text and of a visual one.
        n_tokens: Tokens of each new sequence; its blocks are those of the old one, over and over.
        n_seq: Number of sequences.

    Returns:
        What ``Context.state_set`` takes.

    Raises:
        ValueError: The state has another layout.
    """
    words = np.frombuffer(state, np.int32, (len(state) - _CHECKSUM_BYTES) // 4)
    if words[0] != _MAGIC or words[1] != _VERSION:
        raise ValueError(f"a state of magic {words[0]:#x} and version {words[1]}, expected {_MAGIC:#x} and {_VERSION}")
    at = _HEADER + int(words[2])
    prefix, n_old_seq, n_blocks = words[:at], int(words[at]), int(words[at + 1])
    modality = words[at + 2 : at + 2 + n_blocks]
    at += 2 + n_blocks
    table = words[at + 1 : at + 1 + 2 * n_blocks].reshape(n_blocks, 2)
    if words[at] != n_blocks or words[at + 1 + 2 * n_blocks : at + 2 * n_blocks + n_old_seq].any():
        raise ValueError(f"the state has {n_blocks} blocks, {words[at]} of them in sequence 0: expected one sequence")
    at += n_old_seq + 2 * n_blocks
    starts = at + np.concatenate([[0], np.cumsum(np.array(block_bytes)[modality] // 4)])
    if starts[-1] != len(words):
        raise ValueError(f"the blocks end at byte {4 * starts[-1]}, the state's at {4 * len(words)}")

    # which old block each new one is, and how many of its tokens count
    source, count, missing = [], [], n_tokens
    while missing > 0:
        for old, n in table:
            if missing > 0:
                source.append(int(old))
                count.append(min(int(n), missing))
                missing -= count[-1]
    n_new = len(source)
    tables = [np.stack([np.arange(n_new) + i * n_new, count], axis=1).astype(np.int32).ravel() for i in range(n_seq)]
    head = np.concatenate(
        [prefix, [n_seq, n_seq * n_new], np.tile(modality[source], n_seq), *(part for t in tables for part in ([n_new], t))]
    ).astype(np.int32)
    data = np.concatenate([words[starts[old] : starts[old + 1]] for old in source])
    result = np.empty(len(head) + n_seq * len(data) + _CHECKSUM_BYTES // 4, np.int32)
    result[: len(head)] = head
    result[len(head) : -2].reshape(n_seq, len(data))[:] = data
    result[-2:] = np.array([_checksum(result[:-2])], np.uint64).view(np.int32)
    return result.view(np.uint8)


@functools.cache
def _checksum_library() -> Any:
    """The checksum compiled: a chain of a billion multiplications is no work for numpy."""
    builder = cffi.FFI()
    builder.cdef("uint64_t checksum(const uint32_t *, size_t);")
    builder.set_source("_bench_checksum", _CHECKSUM, extra_compile_args=["-O2"])
    with tempfile.TemporaryDirectory() as folder:
        path = builder.compile(folder)
        spec = importlib.util.spec_from_file_location("_bench_checksum", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _checksum(words: npt.NDArray[np.int32]) -> int:
    module = _checksum_library()
    return int(module.lib.checksum(module.ffi.from_buffer("uint32_t[]", words), len(words)))
