"""A checkpoint's way from the actors that hold it to its files. Driver; any thread."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import RayError, RayTaskError

from raylit.checkpoint import files, remote
from raylit.checkpoint.layout import METADATA, name_of_part
from raylit.driver.loop.checkpoint_queue import CheckpointWriterLost
from raylit.driver.ray.actor import Held
from raylit.driver.ray.heartbeat import Heartbeat
from raylit.driver.ray.serialization import pack
from raylit.errors import CheckpointError
from raylit.protocol.messages import Part
from raylit.storage import file_system, is_object_store, is_url, join

_WAKE_S = 0.5
_RELEASE_S = 5.0


class CheckpointTransfer:
    """Of what one actor holds. It writes the file itself where it sees the driver's, or where the store can be reached
    from anywhere; else its bytes come in pieces, and the driver writes them."""

    def __init__(self, actor: Any, *, what: Held = "checkpoint", rank: int = 0, ping_timeout_s: float) -> None:
        self._actor = actor
        self._what = what
        self._rank = rank
        self._ping_timeout_s = ping_timeout_s

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """See HeldCheckpoint. CheckpointError: it did not work, or the actor has died; so the next ones."""
        with self._errors_of("the checkpoint"):
            self._answer(self._actor.complete_held.remote(pack(others), pack(callbacks)))

    def add_parts(self, parts: Sequence[Part], *, subdirectory: str) -> bytes:
        """See HeldCheckpoint."""
        with self._errors_of("the checkpoint"):
            metadata: bytes = self._answer(self._actor.add_parts.remote(list(parts), subdirectory))
            return metadata

    def described(self) -> Part:
        """See HeldPart."""
        with self._errors_of("the checkpoint"):
            part: Part = self._answer(self._actor.describe_part.remote())
            return part

    def write(self, path: str) -> None:
        """Whole or not at all."""
        if is_url(path):
            self.end(path, self.begin(path))
            return
        with files.draft_file(path) as draft:
            self.end(str(draft), self.begin(str(draft)))

    def begin(self, path: str) -> Any:
        """Ask the actor to write an object at a URL, or into an empty file of the driver's; for `end`."""
        if not is_url(path):
            return self._actor.fill_draft.remote(self._what, path)
        return self._actor.write_held.remote(self._what, path) if _is_for_all(path) else None

    def end(self, path: str, begun: Any) -> None:
        """Wait until it is written, or have it come and write it here."""
        with self._errors_of(f"the checkpoint {path}"):
            is_written = False
            with contextlib.suppress(*([RayTaskError] if is_url(path) else [])):
                # The worker's host may lack a package, or the right to write there.
                is_written = begun is not None and self._answer(begun)
            if not is_written:
                self._pull(path)

    def release(self) -> None:
        _wait_briefly([self.begin_release()])

    def begin_release(self) -> Any:
        return self._actor.release_held.remote(self._what)

    def _pull(self, path: str) -> None:
        with remote.draft_upload(path) if is_url(path) else contextlib.nullcontext(Path(path)) as draft:
            self._answer(self._actor.begin_pieces.remote(self._what))
            files.fill(self._write_pieces, draft)

    def _write_pieces(self, file: IO[bytes]) -> None:
        # One piece is on its way while the one before it is written.
        under_way = self._actor.next_piece.remote(self._what)
        while len(piece := self._answer(under_way)) > 0:
            under_way = self._actor.next_piece.remote(self._what)
            file.write(piece)

    @contextlib.contextmanager
    def _errors_of(self, what: str) -> Iterator[None]:
        try:
            yield
        except RayTaskError as error:
            raise CheckpointError(f"cannot write {what}: {error.cause}") from error
        except RayError as error:
            raise CheckpointWriterLost(f"{what} was lost with the worker of rank {self._rank}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"cannot write {what}: {error}") from error

    def _answer(self, call: Any) -> Any:
        """CheckpointWriterLost: the actor has fallen silent."""
        watch = Heartbeat([self._actor], limit_s=self._ping_timeout_s)
        while not ray.wait([call], timeout=_WAKE_S)[0]:
            if watch.silent_rank() is not None:
                raise CheckpointWriterLost(
                    f"the worker of rank {self._rank} has fallen silent while it wrote a checkpoint"
                )
        return ray.get(call)


class PartTransfer:
    """Of a checkpoint in parts, which becomes a directory: all actors write at the same time, then rank 0 all else."""

    def __init__(self, actors: Sequence[Any], *, ping_timeout_s: float) -> None:
        self._whole = CheckpointTransfer(actors[0], ping_timeout_s=ping_timeout_s)
        self._parts = [
            CheckpointTransfer(actor, what="part", rank=rank, ping_timeout_s=ping_timeout_s)
            for rank, actor in enumerate(actors)
        ]

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        self._whole.complete(others, callbacks)

    def write(self, path: str) -> None:
        """Whole or not at all."""
        draft = files.directory_draft(path)
        try:
            parts = self._written(draft.place)
            metadata = self._whole.add_parts(parts, subdirectory=draft.subdirectory)
            files.write_bytes(metadata, join(draft.place, METADATA))
            self._whole.write(draft.index)
            draft.publish()
        except CheckpointError as error:
            files.name_target(error, draft=draft.place, target=path)
            raise
        finally:
            draft.discard()

    def release(self) -> None:
        _wait_briefly([handover.begin_release() for handover in (self._whole, *self._parts)])

    def _written(self, place: str) -> list[Part]:
        paths = [join(place, name_of_part(rank)) for rank in range(len(self._parts))]
        if not is_url(place):
            for path in paths:
                Path(path).touch()  # an actor that sees it is at the same file system
        begun = [handover.begin(path) for handover, path in zip(self._parts, paths, strict=True)]
        for handover, path, call in zip(self._parts, paths, begun, strict=True):
            handover.end(path, call)
        return [handover.described() for handover in self._parts]


def _wait_briefly(calls: list[Any]) -> None:
    """Calls may overtake each other: one that comes late must not release what is held next."""
    with contextlib.suppress(RayError):
        ray.wait(calls, num_returns=len(calls), timeout=_RELEASE_S)


def _is_for_all(url: str) -> bool:
    """It leads every host to the same place."""
    files_of_url, _ = file_system(url)
    return is_object_store(files_of_url) and "memory" not in files_of_url.protocol
