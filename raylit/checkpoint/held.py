"""HeldCheckpoint: a checkpoint that waits in rank 0's process to be written; Held: the ways out of there. Worker."""

import os
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from raylit.checkpoint import files, format
from raylit.checkpoint.checksums import METADATA, name_of_part
from raylit.messages import Part

PIECE_BYTES = 16 * 2**20
"""How much of a file travels at once."""


class Held(ABC):
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


class HeldCheckpoint(Held):
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
        from raylit.checkpoint import part_files

        metadata = part_files.metadata_of(parts)
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
