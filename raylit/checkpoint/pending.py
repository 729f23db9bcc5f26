"""Checkpoints between the snapshot and the file: copies in host memory, files and parts to write.

The worker takes the snapshot. A thread of the driver, or of the worker, writes it while training goes on.
"""

import mmap
import os
import sys
import threading
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylit.accelerators import Accelerator
from raylit.checkpoint import files, format
from raylit.checkpoint.layout import METADATA, name_of_part
from raylit.compat.torch_core import build_negative_view
from raylit.protocol.messages import Chunk, Part

_ALIGNMENT = 64
"""Alignment of each storage in the memory, in bytes."""
_BLOCK_BYTES = 4 * 2**20
"""Size of the blocks that the copying threads take in turn."""
_MIN_BYTES_PER_THREAD = 32 * 2**20
_MAX_THREADS = 8
"""More threads do not make memory faster."""

_StorageKey = tuple[torch.device, int, int]
"""Device, address and size in bytes of a storage."""


class HostCopy:
    """Host memory for one snapshot; between two snapshots the system may reclaim it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._memory: NDArray[np.uint8] | None = None
        self._mapping: mmap.mmap | None = None
        """The memory map below `_memory`; None if that is pinned."""

    def copy_state(self, checkpoint: Any) -> Any:
        """Return the checkpoint with its tensors copied into this memory, whatever device they are on.

        Views of one storage stay views of one storage, so that the file is the same. Overwrites the previous copy.
        Waits for the device.

        `checkpoint` consists of plain values (`format.to_plain_values`). Copying 400 MB into fresh memory takes 63 ms
        of one core, into memory that has been used before 29 ms.
        """
        if not self._accelerator.has_storages:
            checkpoint = _map_tensors(checkpoint, Tensor.cpu)
        storages: dict[_StorageKey, torch.UntypedStorage] = {}
        _map_tensors(checkpoint, lambda tensor: _note_storage(tensor, storages))
        starts, num_bytes = {}, 0
        for key, storage in storages.items():
            starts[key] = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            num_bytes = starts[key] + storage.nbytes()
        is_on_device = any(storage.device.type != "cpu" for storage in storages.values())
        is_pinned = is_on_device and self._accelerator.has_copy_streams
        memory = self._prepare_memory(num_bytes, is_pinned=is_pinned)
        copies, host_pairs = {}, []
        for key, storage in storages.items():
            place = memory[starts[key] : starts[key] + storage.nbytes()]
            copy = torch.from_numpy(place)
            if storage.device.type == "cpu":
                host_pairs.append((place, _view_as_bytes(storage).numpy()))
            else:
                copy.copy_(_view_as_bytes(storage), non_blocking=is_pinned)
            copies[key] = copy.untyped_storage()
        _copy_blocks(host_pairs)
        if is_on_device:
            self._accelerator.synchronize()
        return _map_tensors(checkpoint, lambda tensor: _copy_tensor(tensor, copies))

    def lend(self) -> None:
        """Let the system reclaim the memory; the copy is not needed any more.

        Using the memory again costs nothing unless the system has reclaimed it.
        """
        if self._mapping is not None and hasattr(mmap, "MADV_FREE"):
            self._mapping.madvise(mmap.MADV_FREE)

    def _prepare_memory(self, num_bytes: int, *, is_pinned: bool) -> NDArray[np.uint8]:
        if self._memory is None or len(self._memory) < num_bytes or is_pinned == (self._mapping is not None):
            self._memory = self._mapping = None  # freed before allocating, so that there are never two at once
            if is_pinned:
                self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            else:
                # Not from malloc: mapped memory is returned to the system when freed, and can be lent to it.
                if sys.platform == "win32":
                    self._mapping = mmap.mmap(-1, max(num_bytes, 1))
                else:
                    self._mapping = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    # Halves the time of copying to it, lending it and writing from it.
                    self._mapping.madvise(mmap.MADV_HUGEPAGE)
                self._memory = np.frombuffer(self._mapping, dtype=np.uint8)
        return self._memory


def _copy_blocks(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    """Copy each second array into the first.

    As many threads as torch may use copy, because one thread alone does not reach the memory's bandwidth.
    """
    stretches = [
        (place[start : start + _BLOCK_BYTES], source[start : start + _BLOCK_BYTES])
        for place, source in pairs
        for start in range(0, len(place), _BLOCK_BYTES)
    ]
    num_bytes = sum(len(place) for place, _ in pairs)
    num_threads = min(torch.get_num_threads(), 1 + num_bytes // _MIN_BYTES_PER_THREAD, _MAX_THREADS)

    def copy(first: int) -> None:
        for place, source in stretches[first::num_threads]:
            np.copyto(place, source)

    others = [threading.Thread(target=copy, args=(number,), daemon=True) for number in range(1, num_threads)]
    for thread in others:
        thread.start()
    copy(0)
    for thread in others:
        thread.join()


def _note_storage(tensor: Tensor, storages: dict[_StorageKey, torch.UntypedStorage]) -> Tensor:
    if _is_dense(tensor):
        storage = tensor.untyped_storage()
        storages[_key_of(storage)] = storage
    return tensor


def _copy_tensor(tensor: Tensor, copies: dict[_StorageKey, torch.UntypedStorage]) -> Tensor:
    if tensor.is_meta:  # a placeholder
        return tensor
    if not _is_dense(tensor):
        return tensor.detach().cpu().clone()
    storage = copies[_key_of(tensor.untyped_storage())]
    copy = torch.empty(0, dtype=tensor.dtype)
    copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    # Views that conjugate or negate on reading are stored as such.
    copy = copy.conj() if tensor.is_conj() else copy
    return build_negative_view(copy) if tensor.is_neg() else copy


def _is_dense(tensor: Tensor) -> bool:
    """Return whether all the tensor's values are in its storage."""
    is_there = not tensor.is_meta
    return (
        is_there
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() > 0
    )


def _key_of(storage: torch.UntypedStorage) -> _StorageKey:
    return storage.device, storage.data_ptr(), storage.nbytes()


def _view_as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply the function to each tensor in the containers that `format.to_plain_values` produces."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {key: _map_tensors(item, function) for key, item in value.items()}
        if type(value) is dict:
            return items
        same = type(value)(items)
        if isinstance(same, OrderedDict):
            vars(same).update(vars(value))
        return same
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return bytearray(value) if isinstance(value, bytearray) else value


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
