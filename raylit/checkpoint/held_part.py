"""HeldPart: a rank's part of a checkpoint that waits in its process to be written, and its ways out. Worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylit.checkpoint.held import Held
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


class HeldPart(Held[PartImage]):
    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        rank: int,
        copied: Callable[[Any], Any] | None = None,
        on_release: Callable[[], None] = lambda: None,
    ) -> None:
        """`tensors`: sharded ones, by their names in the checkpoint. `copied` makes a copy of this rank's shards, which
        is held in their place."""
        super().__init__(on_release=on_release)
        self._rank = rank
        self._shards, own = _shards_of(tensors, is_first=rank == 0)
        self._own: list[Tensor] = own if copied is None else copied(own)
        self._part: Part | None = None

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
        self._part, self._own = None, []
        super().release()

    def _lay_out(self) -> PartImage:
        return PartImage(self._own)


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
