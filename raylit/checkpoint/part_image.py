"""PartImage: a file with tensors one after the other, laid out in memory without a copy of them. Both sides."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raylit.checkpoint.crc import Crc32
from raylit.checkpoint.disk import BLOCK_BYTES, MIN_DIRECT_BYTES, write_through
from raylit.checkpoint.image import PIECE_BYTES, Image


class PartImage:
    """Each tensor in torch's format, as torch.distributed.checkpoint has it.

    The tensors must live, and stay as they are, as long as it is read.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._parts: list[memoryview] = []
        self._starts: list[int] = []
        self.places: list[tuple[int, int]] = []
        """Where in the file each tensor begins, and how many bytes it has there."""
        self.num_bytes = 0
        for tensor in tensors:
            # As the image of one that is so large counts on: the disk takes it from where it lies.
            if filling := -self.num_bytes % BLOCK_BYTES if tensor.nbytes >= MIN_DIRECT_BYTES else 0:
                self._add(memoryview(bytes(filling)))
            image = Image(tensor)
            self.places.append((self.num_bytes, image.num_bytes))
            for part in image.parts():
                self._add(part)

    @cached_property
    def crc(self) -> int:
        """CRC-32 of the file."""
        checksum, crc = Crc32(), 0
        for part in self._parts:
            crc = checksum.of(np.frombuffer(part, dtype=np.uint8), crc)
        return crc

    def write_to(self, path: str | os.PathLike[str]) -> None:
        """To an existing, empty file, and down to the disk."""
        write_through(self._parts, path)

    @property
    def num_pieces(self) -> int:
        return -(-self.num_bytes // PIECE_BYTES)

    def piece(self, index: int) -> NDArray[np.uint8]:
        """A copy of the bytes from PIECE_BYTES * index on; the last is shorter."""
        start = PIECE_BYTES * index
        piece = np.empty(min(PIECE_BYTES, self.num_bytes - start), np.uint8)
        number, num_filled = bisect_right(self._starts, start) - 1, 0
        while num_filled < len(piece):
            first = start + num_filled - self._starts[number]
            part = self._parts[number][first : first + len(piece) - num_filled]
            piece[num_filled : num_filled + len(part)] = part
            num_filled += len(part)
            number += 1
        return piece

    def _add(self, part: memoryview) -> None:
        self._parts.append(part)
        self._starts.append(self.num_bytes)
        self.num_bytes += len(part)
