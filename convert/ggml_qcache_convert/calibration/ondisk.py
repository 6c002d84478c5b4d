"""Lists whose items lie on disk, for what is read seldom and would fill memory: a 7B model's samples take 15 MB each."""

import os
import pickle
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T")


class _Items(Sequence[T]):
    """Items that are fetched when they are asked for; a slice fetches none."""

    def item(self, number: int) -> T:
        """Fetches an item."""
        raise NotImplementedError

    @overload
    def __getitem__(self, which: int) -> T: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[T]: ...
    def __getitem__(self, which: Any) -> Any:
        return Some(self, range(len(self))[which]) if isinstance(which, slice) else self.item(which)


class OnDisk(_Items[T]):
    """A list in an unnamed file, which goes when the list does. Each item is read when it is asked for."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._starts: list[int] = []
        for item in items:
            self.append(item)

    def __del__(self) -> None:
        self._file.close()

    def append(self, item: T) -> None:
        """Writes an item after the others.

        Raises:
            OSError: The disk is full.
        """
        start = self._file.seek(0, os.SEEK_END)
        pickle.dump(item, self._file, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.flush()
        self._starts.append(start)

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, number: int) -> T:
        self._file.seek(self._starts[number])
        item: T = pickle.load(self._file)
        return item


class Some(_Items[T]):
    """Some items of a list, in the order of their numbers; they stay where they are."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int]) -> None:
        self._items, self._numbers = items, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, number: int) -> T:
        return self._items[self._numbers[number]]
