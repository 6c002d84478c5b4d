"""How fast memory can be read here: the roof that decoding is measured against."""

from __future__ import annotations

import ctypes
import threading
import time


def measure_read_bandwidth(n_threads: int, megabytes: int = 256, repeats: int = 6) -> float:
    """Reads memory on all threads at once, several times, and takes the best.

    The C library's ``memchr`` is a vectorised loop that only reads, on every platform, and ctypes lets threads run it side
    by side.

    Args:
        n_threads: Threads, each with memory of its own.
        megabytes: Size of each thread's memory, far beyond its share of the caches.
        repeats: Number of passes.

    Returns:
        Bytes per second.
    """
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    size = megabytes << 20
    memory = [bytearray(b"\1") * size for _ in range(n_threads)]
    address = [ctypes.addressof((ctypes.c_char * size).from_buffer(part)) for part in memory]
    ready, done = threading.Barrier(n_threads + 1), threading.Barrier(n_threads + 1)

    spans = [(0.0, 0.0)] * n_threads

    def read(index: int) -> None:
        for _ in range(repeats):
            ready.wait()
            start = time.perf_counter()
            memchr(address[index], 0, size)
            spans[index] = start, time.perf_counter()
            done.wait()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(n_threads)]
    for thread in threads:
        thread.start()
    best = 0.0
    for _ in range(repeats):
        ready.wait()
        done.wait()
        starts, ends = zip(*spans)
        best = max(best, n_threads * size / (max(ends) - min(starts)))
    for thread in threads:
        thread.join()
    return best
