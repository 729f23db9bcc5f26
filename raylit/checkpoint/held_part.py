"""HeldPart: a rank's part of a checkpoint that waits in its process to be written, and its ways out. Worker."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from raylit.checkpoint import files
from raylit.checkpoint.held import Held
from raylit.messages import Chunk, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """Of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class HeldPart(Held):
    """A file with each tensor in torch's format, one after the other, as torch.distributed.checkpoint has it."""

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
        """Describe the file that was written last."""
        assert self._part is not None
        return self._part

    def release(self) -> None:
        self._part, self._own = None, []
        super().release()

    def _save(self, file: IO[bytes]) -> None:
        output: Any = _Checksummed(file)
        chunks = []
        for shard, tensor in zip(self._shards, self._own, strict=True):
            start = output.num_bytes
            files.save(tensor, output)
            chunks.append(
                Chunk(
                    name=shard.name,
                    shape=shard.shape,
                    dtype=shard.dtype,
                    offsets=shard.offsets,
                    sizes=shard.sizes,
                    start=start,
                    num_bytes=output.num_bytes - start,
                )
            )
        self._part = Part(rank=self._rank, num_bytes=output.num_bytes, crc=output.crc, chunks=tuple(chunks))


class _Checksummed:
    """Passes on what is written to a file, and keeps its size and CRC-32."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0
        self.crc = 0

    def write(self, data: bytes | memoryview) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.num_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


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
