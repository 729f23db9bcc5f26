"""HeldPart: a rank's part of a checkpoint that waits in its process to be written, and its ways out. Worker."""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylit.checkpoint import files
from raylit.checkpoint.part_image import PartImage
from raylit.messages import Chunk, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """Of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class HeldPart:
    """Called in other threads than the training's; each way may be tried again, or after another."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        rank: int,
        copied: Callable[[Any], Any] | None = None,
        on_release: Callable[[], None] = lambda: None,
    ) -> None:
        """`tensors`: sharded ones, by their names in the checkpoint. `copied` makes a copy of this rank's shards, which
        is held in their place; `on_release`: its memory is free again."""
        self._rank = rank
        self._shards, own = _shards_of(tensors, is_first=rank == 0)
        self._own: list[Tensor] = own if copied is None else copied(own)
        self._image: PartImage | None = None
        self._part: Part | None = None
        self._on_release = on_release
        self._lock = threading.Lock()

    def write(self, path: str) -> None:
        """To a path or a URL, whole or not at all. CheckpointError: that did not work."""
        files.write_image(self._laid_out(), path)

    def fill(self, draft: str) -> bool:
        """Write into a file that the driver has made. False: it is not to be found, or not to be written to, here."""
        if not os.access(draft, os.W_OK):
            return False
        self._laid_out().write_to(draft)
        return True

    def num_pieces(self) -> int:
        return self._laid_out().num_pieces

    def piece(self, index: int) -> NDArray[np.uint8]:
        return self._laid_out().piece(index)

    def described(self) -> Part:
        """What the file is to be; found out once."""
        image = self._laid_out()
        with self._lock:
            if self._part is None:
                chunks = [
                    Chunk(
                        name=shard.name,
                        shape=shard.shape,
                        dtype=shard.dtype,
                        offsets=shard.offsets,
                        sizes=shard.sizes,
                        start=start,
                        num_bytes=num_bytes,
                    )
                    for shard, (start, num_bytes) in zip(self._shards, image.places, strict=True)
                ]
                self._part = Part(rank=self._rank, num_bytes=image.num_bytes, crc=image.crc, chunks=tuple(chunks))
            return self._part

    def release(self) -> None:
        self._image, self._part, self._own = None, None, []
        self._on_release()

    def _laid_out(self) -> PartImage:
        with self._lock:
            if self._image is None:
                self._image = PartImage(self._own)
            return self._image


def _shards_of(tensors: Mapping[str, Tensor], *, is_first: bool) -> tuple[list[_Shard], list[Tensor]]:
    """Where this rank's parts stand in the whole tensors, and they themselves. Empty ones only of the first rank, which
    has the first of each tensor's numbers: the tensor may be empty itself."""
    shards, own = [], []
    for name, tensor in tensors.items():
        sharded: Any = tensor
        local: Tensor = sharded.to_local()
        if local.numel() == 0 and not is_first:
            continue
        # How torch.distributed.checkpoint asks tensors.
        [chunk] = sharded.__create_chunk_list__()
        shards.append(
            _Shard(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                offsets=tuple(chunk.offsets),
                sizes=tuple(chunk.sizes),
            )
        )
        is_alone = local.untyped_storage().nbytes() == local.nbytes and local.is_contiguous()
        own.append(local if is_alone else local.clone())  # of a view torch writes all that it is a view of
    return shards, own
