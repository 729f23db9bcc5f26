"""A checkpoint's way from the actor that holds it to its file. Driver; any thread."""

import collections
import contextlib
import os
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raylit.checkpoint import files, remote
from raylit.driver.packing import packed
from raylit.driver.saves import HolderLost
from raylit.driver.watch import Watch
from raylit.errors import CheckpointError
from raylit.places import file_system, is_object_store, is_url

_AHEAD = 2
"""Pieces on their way while one is written: what the driver needs of memory and of the object store."""
_WAKE_S = 0.5


class Handover:
    """The actor writes the file itself where it sees the driver's, or where the store can be reached from anywhere;
    else its bytes come in pieces, and the driver writes them."""

    def __init__(self, actor: Any, *, ping_timeout_s: float) -> None:
        self._actor = actor
        self._ping_timeout_s = ping_timeout_s

    def write(self, path: str, others: list[dict[str, Any]]) -> None:
        """Whole or not at all. CheckpointError: it did not work, or the actor has died."""
        others = packed(others)
        try:
            if is_url(path):
                self._write_url(path, others)
                return
            with files.drafted(path) as draft:
                if not self._answer(self._actor.fill_draft.remote(str(draft), others)):
                    self._pull(draft, others)
        except RayTaskError as error:
            raise CheckpointError(f"cannot write the checkpoint {path}: {error.cause}") from error
        except RayError as error:
            raise HolderLost(f"the checkpoint {path} was lost with the worker of rank 0: {error}") from error

    def release(self) -> None:
        with contextlib.suppress(RayError):
            self._actor.release_held.remote()

    def _write_url(self, url: str, others: list[dict[str, Any]]) -> None:
        files_of_url, _ = file_system(url)
        if is_object_store(files_of_url) and "memory" not in files_of_url.protocol:
            try:
                self._answer(self._actor.write_held.remote(url, others))
                return
            except RayTaskError:
                pass  # the worker's host may lack a package, or the right to write there
        with remote.collected(url) as copy:
            self._pull(copy, others)

    def _pull(self, draft: Path, others: list[dict[str, Any]]) -> None:
        num_pieces = self._answer(self._actor.lay_out_held.remote(others))
        under_way: collections.deque[Any] = collections.deque()
        with open(draft, "r+b") as file:
            for index in range(num_pieces + _AHEAD):
                if index < num_pieces:
                    under_way.append(self._actor.piece_of_held.remote(index))
                if index >= _AHEAD:
                    file.write(self._answer(under_way.popleft()))
            file.flush()
            os.fsync(file.fileno())

    def _answer(self, call: Any) -> Any:
        """HolderLost: the actor has fallen silent."""
        watch = Watch([self._actor], limit_s=self._ping_timeout_s)
        while not ray.wait([call], timeout=_WAKE_S)[0]:
            if watch.silent_rank() is not None:
                raise HolderLost("the worker of rank 0 has fallen silent while it wrote a checkpoint")
        return ray.get(call)
