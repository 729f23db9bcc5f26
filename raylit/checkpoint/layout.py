"""Layout: a file as it will be, whose bytes lie in memory in several places. Both sides."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from raylit.checkpoint.disk import write_through

PIECE_BYTES = 16 * 2**20
"""How much of a file travels at once."""


class Layout:
    """What the parts refer to must live, and stay as it is, as long as the layout is read."""

    def __init__(self, parts: list[memoryview]) -> None:
        self._parts = parts
        self._starts = list(accumulate((len(part) for part in parts), initial=0))
        self.num_bytes = self._starts.pop()

    def parts(self) -> Iterable[memoryview]:
        """All the bytes, from the first to the last."""
        return self._parts

    def write_to(self, path: str | os.PathLike[str]) -> None:
        """To an existing, empty file, and down to the disk."""
        write_through(self.parts(), path)

    @property
    def num_pieces(self) -> int:
        return -(-self.num_bytes // PIECE_BYTES)

    def piece(self, index: int) -> NDArray[np.uint8]:
        """A copy of the bytes from PIECE_BYTES * index on; the last is shorter."""
        start = PIECE_BYTES * index
        piece = np.empty(min(PIECE_BYTES, self.num_bytes - start), np.uint8)
        num_filled = 0
        for part in self._slices(start, len(piece)):
            piece[num_filled : num_filled + len(part)] = part
            num_filled += len(part)
        return piece

    def _slices(self, start: int, size: int) -> Iterator[memoryview]:
        """These bytes, where they lie."""
        number = bisect_right(self._starts, start) - 1
        while size > 0:
            first = start - self._starts[number]
            part = self._parts[number][first : first + size]
            yield part
            start, size, number = start + len(part), size - len(part), number + 1
