"""Transfer of a checkpoint from the actors that hold it to its files. Driver; any thread."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import RayError, RayTaskError

from raylit.checkpoint import files, remote
from raylit.checkpoint.layout import METADATA, name_of_part
from raylit.driver.loop.checkpoint_queue import CheckpointWriterLost
from raylit.driver.ray.actor import PendingKind
from raylit.driver.ray.heartbeat import Heartbeat
from raylit.errors import CheckpointError
from raylit.protocol.messages import Part, pack
from raylit.storage import file_system, is_object_store, is_url, join

_WAKE_S = 0.5
_RELEASE_S = 5.0


class CheckpointTransfer:
    """Transfer of one actor's pending file.

    The actor writes the file itself if it can open the driver's file, or if the store can be reached from any host.
    Otherwise the driver pulls the bytes in pieces and writes them.
    """

    def __init__(self, actor: Any, *, kind: PendingKind = "checkpoint", rank: int = 0, ping_timeout_s: float) -> None:
        self._actor = actor
        self._kind = kind
        self._rank = rank
        self._ping_timeout_s = ping_timeout_s

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """Complete the pending checkpoint on the actor. See `PendingCheckpoint.complete`.

        Raises:
            CheckpointError: It failed, or the actor has died. The other methods raise it as well.
        """
        with self._convert_errors("the checkpoint"):
            self._wait_for(self._actor.complete_checkpoint.remote(pack(others), pack(callbacks)))

    def add_parts(self, parts: Sequence[Part], *, subdirectory: str) -> bytes:
        """Add the entries of all parts; return the bytes of the directory's metadata."""
        with self._convert_errors("the checkpoint"):
            metadata: bytes = self._wait_for(self._actor.add_parts.remote(list(parts), subdirectory))
            return metadata

    def describe_part(self) -> Part:
        """Return the description of the actor's part."""
        with self._convert_errors("the checkpoint"):
            part: Part = self._wait_for(self._actor.describe_part.remote())
            return part

    def write(self, path: str) -> None:
        """Write the file to a path or URL, completely or not at all."""
        if is_url(path):
            self.end_write(path, self.begin_write(path))
            return
        with files.draft_file(path) as draft:
            self.end_write(str(draft), self.begin_write(str(draft)))

    def begin_write(self, path: str) -> Any:
        """Ask the actor to write to a URL, or into an empty file of the driver's; pass the result to `end_write`."""
        if not is_url(path):
            return self._actor.fill_draft.remote(self._kind, path)
        return self._actor.write_pending.remote(self._kind, path) if _is_shared_store(path) else None

    def end_write(self, path: str, pending_call: Any) -> None:
        """Wait until the actor has written the file, or pull its bytes and write it here."""
        with self._convert_errors(f"the checkpoint {path}"):
            is_written = False
            with contextlib.suppress(*([RayTaskError] if is_url(path) else [])):
                # The worker's host may lack a package or write permission there.
                is_written = pending_call is not None and self._wait_for(pending_call)
            if not is_written:
                self._pull_pieces(path)

    def release(self) -> None:
        _wait_briefly([self.begin_release()])

    def begin_release(self) -> Any:
        return self._actor.release_pending.remote(self._kind)

    def _pull_pieces(self, path: str) -> None:
        with remote.draft_upload(path) if is_url(path) else contextlib.nullcontext(Path(path)) as draft:
            self._wait_for(self._actor.begin_pieces.remote(self._kind))
            files.fill(self._write_pieces, draft)

    def _write_pieces(self, file: IO[bytes]) -> None:
        # One piece is in flight while the previous one is written.
        next_piece = self._actor.next_piece.remote(self._kind)
        while len(piece := self._wait_for(next_piece)) > 0:
            next_piece = self._actor.next_piece.remote(self._kind)
            file.write(piece)

    @contextlib.contextmanager
    def _convert_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except RayTaskError as error:
            raise CheckpointError(f"cannot write {what}: {error.cause}") from error
        except RayError as error:
            raise CheckpointWriterLost(f"{what} was lost with the worker of rank {self._rank}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"cannot write {what}: {error}") from error

    def _wait_for(self, call: Any) -> Any:
        """Wait for a call's result. CheckpointWriterLost: the actor no longer answers its heartbeat."""
        heartbeat = Heartbeat([self._actor], limit_s=self._ping_timeout_s)
        while not ray.wait([call], timeout=_WAKE_S)[0]:
            if heartbeat.find_silent_rank() is not None:
                raise CheckpointWriterLost(
                    f"the worker of rank {self._rank} has fallen silent while it wrote a checkpoint"
                )
        return ray.get(call)


class PartTransfer:
    """Transfer of a checkpoint in parts, which becomes a directory.

    All actors write their parts at the same time, then rank 0 writes the rest.
    """

    def __init__(self, actors: Sequence[Any], *, ping_timeout_s: float) -> None:
        self._rest = CheckpointTransfer(actors[0], ping_timeout_s=ping_timeout_s)
        self._parts = [
            CheckpointTransfer(actor, kind="part", rank=rank, ping_timeout_s=ping_timeout_s)
            for rank, actor in enumerate(actors)
        ]

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        self._rest.complete(others, callbacks)

    def write(self, path: str) -> None:
        """Write the directory, completely or not at all."""
        draft = files.directory_draft(path)
        try:
            parts = self._write_parts(draft.place)
            metadata = self._rest.add_parts(parts, subdirectory=draft.subdirectory)
            files.write_bytes(metadata, join(draft.place, METADATA))
            self._rest.write(draft.index)
            draft.publish()
        except CheckpointError as error:
            files.name_target(error, draft=draft.place, target=path)
            raise
        finally:
            draft.discard()

    def release(self) -> None:
        _wait_briefly([transfer.begin_release() for transfer in (self._rest, *self._parts)])

    def _write_parts(self, directory: str) -> list[Part]:
        paths = [join(directory, name_of_part(rank)) for rank in range(len(self._parts))]
        if not is_url(directory):
            for path in paths:
                Path(path).touch()  # an actor that can open it is on the same file system
        calls = [transfer.begin_write(path) for transfer, path in zip(self._parts, paths, strict=True)]
        for transfer, path, call in zip(self._parts, paths, calls, strict=True):
            transfer.end_write(path, call)
        return [transfer.describe_part() for transfer in self._parts]


def _wait_briefly(calls: list[Any]) -> None:
    """Wait for release calls: a late call could overtake others and release the next pending checkpoint."""
    with contextlib.suppress(RayError):
        ray.wait(calls, num_returns=len(calls), timeout=_RELEASE_S)


def _is_shared_store(url: str) -> bool:
    """Return True if the URL leads to the same store from every host."""
    filesystem, _ = file_system(url)
    return is_object_store(filesystem) and "memory" not in filesystem.protocol
