"""HeldCheckpoint: a checkpoint that waits in rank 0's process to be written; Held: the ways out of there. Worker."""

import os
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from raylit.checkpoint import files, format
from raylit.checkpoint.checksums import METADATA, name_of_part
from raylit.checkpoint.image import Image, Known
from raylit.checkpoint.layout import Layout
from raylit.messages import Part

_Layout = TypeVar("_Layout", bound=Layout)


class Held(ABC, Generic[_Layout]):
    """Called in other threads than the training's; each way out may be tried again, or after another."""

    def __init__(self, *, on_release: Callable[[], None]) -> None:
        """`on_release`: its memory is free again."""
        self._image: _Layout | None = None
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

    def release(self) -> None:
        self._image = None
        self._on_release()

    @abstractmethod
    def _lay_out(self) -> _Layout: ...

    def _laid_out(self) -> _Layout:
        with self._lock:
            if self._image is None:
                self._image = self._lay_out()
            return self._image


class HeldCheckpoint(Held[Image]):
    def __init__(self, checkpoint: dict[str, Any], *, on_release: Callable[[], None]) -> None:
        """`checkpoint`: merged, with what rank 0 has alone."""
        super().__init__(on_release=on_release)
        self._checkpoint = checkpoint
        self._known: Known = {}

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """Before the ways out, and again for another file of the same state: `others` is what each rank but the first
        has alone, `callbacks` the states of the driver's."""
        with self._lock:
            format.complete(self._checkpoint, others, callbacks)
            self._image = None

    def add_parts(self, parts: Sequence[Part], *, subdirectory: str) -> bytes:
        """Before the ways out, where each rank has written a part into that subdirectory, or anew into another one.
        Returns what is to stand there beside them as METADATA."""
        # A second of imports that only sharded checkpoints need.
        from raylit.checkpoint import part_files

        metadata = part_files.metadata_of(parts)
        checksums = {METADATA: [len(metadata), zlib.crc32(metadata)]}
        checksums.update({name_of_part(part.rank): [part.num_bytes, part.crc] for part in parts})
        prefix = f"{subdirectory}/" if subdirectory else ""
        with self._lock:
            self._checkpoint["raylit"]["parts"] = {prefix + name: checksum for name, checksum in checksums.items()}
            self._image = None
        return metadata

    def release(self) -> None:
        self._checkpoint = {}
        super().release()

    def _lay_out(self) -> Image:
        return Image(self._checkpoint, known=self._known)
