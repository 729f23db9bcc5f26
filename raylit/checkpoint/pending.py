"""Checkpoints that have been captured but not yet written: files, parts and their publication. Driver and workers."""

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
from raylit.checkpoint.layout import METADATA, name_of_part
from raylit.errors import CheckpointError
from raylit.protocol.messages import Chunk, Part
from raylit.protocol.state import Progress
from raylit.storage import is_inside, relative

PIECE_BYTES = 16 * 2**20
"""Size of the pieces in which a file is sent to another host, in bytes."""


class PendingFile(ABC):
    """A captured file that can be written, filled into a draft, or handed out in pieces.

    Its methods run in other threads than the training. Each way of writing may be retried, or used after another.
    """

    def __init__(self, *, on_release: Callable[[], None]) -> None:
        """Call `on_release` when the file's memory may be used again."""
        self._pieces: _PieceQueue | None = None
        self._on_release = on_release

    def write(self, path: str) -> None:
        """Write the file to a path or a URL, as a whole or not at all.

        Raises:
            CheckpointError: if that failed.
        """
        files.write_with(self._save, path)

    def fill(self, draft: str) -> bool:
        """Write into a file that the driver has created; return False if it is missing or not writable on this host."""
        if not os.access(draft, os.W_OK):
            return False
        files.fill(self._save, draft)
        return True

    def begin_pieces(self) -> None:
        """Start to hand out the file in pieces, from its first byte."""
        self._end_pieces()
        self._pieces = _PieceQueue(self._save)

    def next_piece(self) -> NDArray[np.uint8]:
        """Return the next PIECE_BYTES of the file; the last piece is shorter, and an empty one follows it."""
        assert self._pieces is not None
        return self._pieces.next()

    def release(self) -> None:
        """Stop handing out pieces and give the memory back."""
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
    """A captured checkpoint that is one file, or the index of a sharded one."""

    def __init__(self, checkpoint: dict[str, Any], *, on_release: Callable[[], None]) -> None:
        """Hold a merged checkpoint, which contains rank 0's own state."""
        super().__init__(on_release=on_release)
        self._checkpoint = checkpoint

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """Add the other ranks' own states and the states of the driver's callbacks.

        Call it before writing, and again for another file of the same state. `others` contains the own state of each
        rank but the first.
        """
        format.complete(self._checkpoint, others, callbacks)

    def add_parts(self, parts: Sequence[Part], *, subdirectory: str) -> bytes:
        """Record the parts that the ranks have written to `subdirectory` and return the content of their METADATA file.

        Call it before writing; again if the parts were written to another subdirectory.
        """
        # Imported here because torch.distributed.checkpoint takes about 1 s, which only sharded checkpoints need.
        from raylit.checkpoint import dcp_files

        metadata = dcp_files.build_metadata(parts)
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


class PendingPart(PendingFile):
    """This rank's shards, to be written as one file that torch.distributed.checkpoint can read.

    The file contains each shard in torch's format, one after the other.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        rank: int,
        copy_tensors: Callable[[Any], Any] | None = None,
        on_release: Callable[[], None] = lambda: None,
    ) -> None:
        """Hold this rank's shards of `tensors`, which are sharded tensors by their names in the checkpoint.

        `copy_tensors` makes a copy of the shards, which is held in their place.
        """
        super().__init__(on_release=on_release)
        self._rank = rank
        self._shards, own = _find_local_shards(tensors, is_first=rank == 0)
        self._own: list[Tensor] = own if copy_tensors is None else copy_tensors(own)
        self._part: Part | None = None

    def describe(self) -> Part:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """Steps after a checkpoint file has been written: its second name, its index entry, removal of outdated files.

    They are done in this order, so that a crash between them leaves a file too many, never one too few.
    """

    path: str
    directory: str
    """Directory of the index."""
    progress: Progress
    score: float | None = None
    """Score for which the file is kept, if it is."""
    is_weights_only: bool = False
    last: str = ""
    """Path of a second name that always points to the newest file; empty if there is none."""
    is_last_linked: bool = False
    """`last` is a symbolic link where links are possible, else a file of its own."""
    best: str = ""
    """Path of the best file from now on."""
    outdated: Sequence[str] = ()
    """Paths to be removed."""

    def carry_out(self) -> None:
        """Carry out the steps; may be repeated.

        Raises:
            CheckpointError: if not all of them were possible.
        """
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
            write_index(before.replace_entries(added=added, removed=names, last=last, best=best), self.directory)
        except Exception as error:  # of whatever kind a store's own library raises
            raise CheckpointError(f"cannot write the index of {self.directory}: {error}") from error
        for path in self.outdated:
            if is_inside(path, self.directory):  # a link may have been put there in the meantime
                files.remove(path)

    def _entry(self, path: str, *, score: float | None = None) -> Entry:
        return Entry(
            name=relative(path, self.directory),
            epoch=self.progress.epoch,
            step=self.progress.global_step,
            score=score,
            is_weights_only=self.is_weights_only,
        )


class _PieceQueue:
    """File-like object to which a separate thread writes, and whose content is read in pieces.

    The file is never in memory as a whole. This is not a pipe, because processes that a DataLoader forks in the
    meantime would inherit both ends, and no reader would see the end of the file.
    """

    def __init__(self, save: Callable[[IO[bytes]], None]) -> None:
        self._pieces: SimpleQueue[NDArray[np.uint8] | BaseException] = SimpleQueue()
        self._room = threading.Semaphore(1)
        self._rest = bytearray()
        self._is_closed = False
        threading.Thread(target=self._run, args=(save,), daemon=True).start()

    def next(self) -> NDArray[np.uint8]:
        """Return the next piece, the last of which is empty; raise the exception that `save` has raised."""
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
        """Do nothing; a piece is handed out when it is full."""

    def _run(self, save: Callable[[Any], None]) -> None:
        try:
            save(self)
            if self._rest:
                self._hand_out()
            self._pieces.put(np.empty(0, np.uint8))
        except BaseException as error:  # `next` raises it in the reader's thread
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
    """Position of a rank's shard in one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Checksummed:
    """File that passes on what is written to it and computes size and CRC-32."""

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


def _find_local_shards(tensors: Mapping[str, Tensor], *, is_first: bool) -> tuple[list[_Shard], list[Tensor]]:
    """Return the positions of this rank's shards in the whole tensors, and the shards.

    Empty shards are left out, except on the first rank, which has the first elements of each tensor: the tensor itself
    may be empty.
    """
    shards, own = [], []
    for name, tensor in tensors.items():
        sharded: Any = tensor
        local: Tensor = sharded.to_local()
        if local.numel() == 0 and not is_first:
            continue
        # The method by which torch.distributed.checkpoint finds a tensor's shards.
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
        own.append(local if is_alone else local.clone())  # torch.save writes the whole storage of a view
    return shards, own
