"""HeldCheckpoint: a checkpoint that waits in rank 0's process to be written, and the ways out of there. Worker."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylit.checkpoint import files, format
from raylit.checkpoint.image import Image
from raylit.errors import CheckpointError


class FailedCheckpoint:
    """What stands for a checkpoint that could not be taken: each way out of here says why."""

    def __init__(self, error: CheckpointError) -> None:
        self._error = error

    def write(self, path: str, others: list[dict[str, Any]]) -> None:
        raise self._error

    def fill(self, draft: str, others: list[dict[str, Any]]) -> bool:
        raise self._error

    def num_pieces(self, others: list[dict[str, Any]]) -> int:
        raise self._error

    def piece(self, index: int) -> NDArray[np.uint8]:
        raise self._error

    def release(self) -> None: ...


class HeldCheckpoint:
    """Called in other threads than the training's; each way may be tried again, or after another."""

    def __init__(self, checkpoint: dict[str, Any], *, on_release: Callable[[], None]) -> None:
        """`checkpoint`: merged, with what rank 0 has alone. `on_release`: its memory is free again."""
        self._checkpoint = checkpoint
        self._image: Image | None = None
        self._on_release = on_release
        self._lock = threading.Lock()

    def write(self, path: str, others: list[dict[str, Any]]) -> None:
        """To a path or a URL, whole or not at all; `others`: what each rank but the first has alone.

        CheckpointError: that did not work.
        """
        files.write_image(self._laid_out(others), path)

    def fill(self, draft: str, others: list[dict[str, Any]]) -> bool:
        """Write into a file that the driver has made. False: it is not to be found, or not to be written to, here."""
        if not os.access(draft, os.W_OK):
            return False
        self._laid_out(others).write_to(draft)
        return True

    def num_pieces(self, others: list[dict[str, Any]]) -> int:
        return self._laid_out(others).num_pieces

    def piece(self, index: int) -> NDArray[np.uint8]:
        """After `num_pieces`."""
        assert self._image is not None
        return self._image.piece(index)

    def release(self) -> None:
        self._image, self._checkpoint = None, {}
        self._on_release()

    def _laid_out(self, others: list[dict[str, Any]]) -> Image:
        with self._lock:
            if self._image is None:
                format.add_ranks(self._checkpoint, others)
                self._image = Image(self._checkpoint)
            return self._image
