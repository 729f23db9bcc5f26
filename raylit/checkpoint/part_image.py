"""PartImage: a file with tensors one after the other, laid out in memory without a copy of them. Both sides."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from raylit.checkpoint.crc import Crc32
from raylit.checkpoint.disk import BLOCK_BYTES, MIN_DIRECT_BYTES
from raylit.checkpoint.image import Image
from raylit.checkpoint.layout import Layout


class PartImage(Layout):
    """Each tensor in torch's format, as torch.distributed.checkpoint has it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        parts: list[memoryview] = []
        self.places: list[tuple[int, int]] = []
        """Where in the file each tensor begins, and how many bytes it has there."""
        num_bytes = 0
        for tensor in tensors:
            # As the image of one that is so large counts on: the disk takes it from where it lies.
            if filling := -num_bytes % BLOCK_BYTES if tensor.nbytes >= MIN_DIRECT_BYTES else 0:
                parts.append(memoryview(bytes(filling)))
            image = Image(tensor)
            self.places.append((num_bytes + filling, image.num_bytes))
            parts += image.parts()
            num_bytes += filling + image.num_bytes
        super().__init__(parts)

    @cached_property
    def crc(self) -> int:
        """CRC-32 of the file."""
        checksum, crc = Crc32(), 0
        for part in self._parts:
            crc = checksum.of(np.frombuffer(part, dtype=np.uint8), crc)
        return crc
