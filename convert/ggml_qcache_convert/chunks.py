"""Work on the rows of a big matrix, a chunk at a time, on all cores."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

CHUNK = 1 << 20  # elements read, checked and converted at a time: 4 MB as float32, which stay in the cache


def in_chunks(n_row: int, n_col: int, work: Callable[[int, int], object], together: int = 1) -> Iterator[int]:
    """Calls ``work(start, stop)`` for all rows, on as many threads as there are cores: NumPy and ggml release the interpreter.

    Args:
        n_row: Rows.
        n_col: Elements of a row; a chunk has ``CHUNK`` elements or one row.
        work: Must be right in any order.
        together: Chunks have a multiple of that many rows.

    Yields:
        The number of rows of each chunk once it and those before it are done. An error of the first chunk that has one
        comes out here.
    """
    step = max(1, CHUNK // max(1, n_col) // together) * together
    starts = range(0, n_row, step)
    if len(starts) < 2:
        work(0, n_row)
        yield n_row
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [pool.submit(work, start, min(n_row, start + step)) for start in starts]
        try:
            for start, done in zip(starts, pending, strict=True):
                done.result()
                yield min(n_row, start + step) - start
        finally:
            pool.shutdown(cancel_futures=True)
