"""Index of a directory of checkpoints, and the search for the newest usable one. Driver.

The index is a small file that is replaced as a whole. It records what was written when, and which file is the last and
which the best. A checkpoint counts if its file exists: one that a crash has kept out of the index is found as well.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from raylit.checkpoint import files, remote
from raylit.errors import CheckpointError, DamagedCheckpoint
from raylit.protocol.state import Progress
from raylit.storage import is_inside, is_url, join, leads_down, list_names, modified_at, read_text, relative, write_text

FILE_NAME = ".index.json"
SUFFIX = ".ckpt"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One checkpoint file in the index."""

    name: str
    """Path relative to the directory."""
    epoch: int = 0
    step: int = 0
    score: float | None = None
    """Score for which the file is kept, if it is."""
    is_weights_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Content of a directory's index file."""

    entries: tuple[Entry, ...] = ()
    """In the order in which they were written."""
    last: str = ""
    best: str = ""

    def replace_entries(self, *, added: Sequence[Entry], removed: Sequence[str], last: str, best: str) -> "Index":
        """Return the index with the added entries and without the removed names."""
        gone = {*removed, *(entry.name for entry in added)}
        remaining = [entry for entry in self.entries if entry.name not in gone]
        return replace(self, entries=(*remaining, *added), last=last, best=best)


def read_index(directory: str | os.PathLike[str]) -> Index:
    """Read the index; return an empty one if there is none or it cannot be read."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # not JSON, or of another shape
        content = json.loads(read_text(join(directory, FILE_NAME)) or "{}")
        field_names = {field.name for field in fields(Entry)}
        items = [
            Entry(**{key: value for key, value in entry.items() if key in field_names})
            for entry in content.get("entries", [])
            if leads_down(entry["name"])
        ]
        return Index(entries=tuple(items), last=str(content.get("last", "")), best=str(content.get("best", "")))
    return Index()


def write_index(index: Index, directory: str | os.PathLike[str]) -> None:
    """Write the index as a whole or not at all.

    Raises:
        OSError: if that failed; at a URL, whatever exception the store raises.
    """
    write_text(json.dumps({"format": _FORMAT, **asdict(index)}, indent=1), join(directory, FILE_NAME))


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


def recorded_paths(directory: str) -> set[str]:
    """Return the paths of the files that the index of the directory names."""
    index = read_index(directory)
    names = {*(entry.name for entry in index.entries), index.last}
    return {join(directory, name) for name in names if leads_down(name)}


def list_newest_first(directory: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the paths of the checkpoints, from the last written to the first; a file with several names only once."""
    positions = {entry.name: number for number, entry in enumerate(read_index(directory).entries)}
    names = {*positions, *(name for name in list_names(os.fspath(directory)) if name.endswith(SUFFIX))}
    times = {name: written_at(join(directory, name)) for name in names}
    newest_listed = max((times[name] for name in positions), default=0.0)

    def age(name: str) -> tuple[int, float]:
        if name in positions:
            return 1, -positions[name]
        # Not in the index: either a crash came between file and index, or another run wrote it.
        return (0 if times[name] >= newest_listed else 2), -times[name]

    seen: set[Any] = set()
    for name in sorted((name for name in names if times[name] > 0), key=age):
        path = join(directory, name)
        identity = path if is_url(path) else _read_inode(path)
        if identity is not None and identity not in seen:
            seen.add(identity)
            yield path


def find_newest_usable(
    directory: str | os.PathLike[str], *, allow_pickle: bool = False, is_whole: bool = True
) -> tuple[str, dict[str, Any]] | None:
    """Return path and content of the newest checkpoint from which a run can be continued; None if there is none.

    Damaged files and files that are not checkpoints are skipped with a warning. The arguments are those of
    `files.read`.

    Raises:
        CheckpointError: if a checkpoint cannot be read for another reason, e.g. because a newer raylit wrote it.
    """
    for path in list_newest_first(directory):
        try:
            checkpoint = files.read(path, allow_pickle=allow_pickle, is_whole=is_whole)
            files.check_parts(checkpoint)
        except (DamagedCheckpoint, files.NotACheckpoint) as error:
            warnings.warn(f"{error}; it is passed over for the one before it", stacklevel=2)
            continue
        if "optimizer_states" in checkpoint:
            return path, checkpoint
    return None


def written_at(path: str) -> float:
    """Return when the checkpoint was written, in seconds since 1970; 0.0 if there is none."""
    return remote.written_at(path) if is_url(path) else modified_at(path)


def _read_inode(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file; None for a dangling link, or a file that has been removed since."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
