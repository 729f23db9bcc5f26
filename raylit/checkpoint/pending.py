"""Checkpoints between the moment they are taken and their place on disk: files, parts and their publication."""

import os
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylit.checkpoint import files, format
from raylit.checkpoint.index import Entry, read_index, write_index
from raylit.checkpoint.sharded import METADATA, name_of_part
from raylit.errors import CheckpointError
from raylit.protocol.messages import Chunk, Part
from raylit.protocol.state import Progress
from raylit.storage import is_inside, relative

PIECE_BYTES = 16 * 2**20
"""How much of a file travels at once."""


class PendingFile(ABC):
    """Called in other threads than the training's; each way out may be tried again, or after another."""

    def __init__(self, *, on_release: Callable[[], None]) -> None:
        """`on_release`: its memory is free again."""
        self._pieces: _Pieces | None = None
        self._on_release = on_release

    def write(self, path: str) -> None:
        """Write to a path or a URL, whole or not at all. CheckpointError: that did not work."""
        files.write_with(self._save, path)

    def fill(self, draft: str) -> bool:
        """Write into a file that the driver has made. False: it is not to be found, or not to be written to, here."""
        if not os.access(draft, os.W_OK):
            return False
        files.fill(self._save, draft)
        return True

    def begin_pieces(self) -> None:
        """Start to hand out the file in pieces, from its first byte."""
        self._end_pieces()
        self._pieces = _Pieces(self._save)

    def next_piece(self) -> NDArray[np.uint8]:
        """Return the next PIECE_BYTES of the file; the last piece is shorter, and an empty one follows it."""
        assert self._pieces is not None
        return self._pieces.next()

    def release(self) -> None:
        self._end_pieces()
        self._on_release()

    def _end_pieces(self) -> None:
        if self._pieces is not None:
            self._pieces.close()
            self._pieces = None

    @abstractmethod
    def _save(self, file: IO[bytes]) -> None:
        """Write the file's content."""


class PendingCheckpoint(PendingFile):
    def __init__(self, checkpoint: dict[str, Any], *, on_release: Callable[[], None]) -> None:
        """`checkpoint`: merged, with what rank 0 has alone."""
        super().__init__(on_release=on_release)
        self._checkpoint = checkpoint

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """Before the ways out, and again for another file of the same state: `others` is what each rank but the first
        has alone, `callbacks` the states of the driver's."""
        format.complete(self._checkpoint, others, callbacks)

    def add_parts(self, parts: Sequence[Part], *, subdirectory: str) -> bytes:
        """Before the ways out, where each rank has written a part into that subdirectory, or anew into another one.
        Returns what is to stand there beside them as METADATA."""
        # A second of imports that only sharded checkpoints need.
        from raylit.checkpoint import dcp_files

        metadata = dcp_files.metadata_of(parts)
        checksums = {METADATA: [len(metadata), zlib.crc32(metadata)]}
        checksums.update({name_of_part(part.rank): [part.num_bytes, part.crc] for part in parts})
        prefix = f"{subdirectory}/" if subdirectory else ""
        self._checkpoint["raylit"]["parts"] = {prefix + name: checksum for name, checksum in checksums.items()}
        return metadata

    def release(self) -> None:
        self._checkpoint = {}
        super().release()

    def _save(self, file: IO[bytes]) -> None:
        files.save(self._checkpoint, file)


class _Pieces:
    """What a thread of its own writes to as to a file, handed out in pieces, so that the file is not in memory as a
    whole.

    Not a pipe: what a DataLoader forks meanwhile would have both its ends open, too, and nobody see an end.
    """

    def __init__(self, save: Callable[[IO[bytes]], None]) -> None:
        self._pieces: SimpleQueue[NDArray[np.uint8] | BaseException] = SimpleQueue()
        self._room = threading.Semaphore(1)
        self._rest = bytearray()
        self._is_closed = False
        threading.Thread(target=self._run, args=(save,), daemon=True).start()

    def next(self) -> NDArray[np.uint8]:
        """Raises what has gone wrong in `save` instead of returning the empty piece at the end."""
        piece = self._pieces.get()
        self._room.release()
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def close(self) -> None:
        """End the thread."""
        self._is_closed = True
        self._room.release()

    def write(self, data: bytes | memoryview) -> int:
        start = 0
        while start < len(data):
            end = start + PIECE_BYTES - len(self._rest)
            self._rest += data[start:end]
            start = end
            if len(self._rest) == PIECE_BYTES:
                self._hand_out()
        return len(data)

    def flush(self) -> None:
        """Nothing: the piece goes when it is full."""

    def _run(self, save: Callable[[Any], None]) -> None:
        try:
            save(self)
            if self._rest:
                self._hand_out()
            self._pieces.put(np.empty(0, np.uint8))
        except BaseException as error:  # raised where the pieces are asked for
            self._pieces.put(error)

    def _hand_out(self) -> None:
        if not self._is_closed:
            self._room.acquire()
        if self._is_closed:
            raise BrokenPipeError("nobody asks for the pieces any more")
        self._pieces.put(np.frombuffer(self._rest, dtype=np.uint8))
        self._rest = bytearray()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """Of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class PendingPart(PendingFile):
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """The file's second name, its entry in the index, and the end of those that have lost their place.

    In this order, so that a crash in between leaves a file too many, never one too few.
    """

    path: str
    directory: str
    """Of the index."""
    progress: Progress
    score: float | None = None
    """Where the file is kept for it."""
    is_weights_only: bool = False
    last: str = ""
    """The file's other path, which is always that of the newest; empty: it has none."""
    is_last_linked: bool = False
    """`last` is a symbolic link where that can be, else a file of its own."""
    best: str = ""
    """Path of the best file from now on."""
    outdated: Sequence[str] = ()
    """Paths that are to be removed."""

    def carry_out(self) -> None:
        """May be done again. CheckpointError: not all of it was possible."""
        added = [self._entry(self.path, score=self.score)]
        if self.last not in ("", self.path):
            is_link = self.is_last_linked and files.link(self.path, self.last)
            if not is_link:
                files.duplicate(self.path, self.last)
                added.insert(0, self._entry(self.last))
        try:
            before = read_index(self.directory)
            names = [relative(path, self.directory) for path in self.outdated]
            last, best = relative(self.last or self.path, self.directory), relative(self.best, self.directory)
            write_index(before.changed(added=added, removed=names, last=last, best=best), self.directory)
        except Exception as error:  # of whatever kind a store's own library raises
            raise CheckpointError(f"cannot write the index of {self.directory}: {error}") from error
        for path in self.outdated:
            if is_inside(path, self.directory):  # a link may have been put there since
                files.remove(path)

    def _entry(self, path: str, *, score: float | None = None) -> Entry:
        return Entry(
            name=relative(path, self.directory),
            epoch=self.progress.epoch,
            step=self.progress.global_step,
            score=score,
            is_weights_only=self.is_weights_only,
        )
