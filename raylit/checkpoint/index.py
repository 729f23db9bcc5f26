"""The index of a directory of checkpoints, a small file that is replaced whole, and the newest usable of them. Driver.

The index says what was written when, and which file is the last and which the best. A file counts by being there: one
that a crash has left out of the index is found all the same.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from raylit.checkpoint import files, remote
from raylit.errors import DamagedCheckpoint
from raylit.storage import entries, is_url, join, leads_down, modified_at, read_text, write_text

FILE_NAME = ".index.json"
SUFFIX = ".ckpt"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A checkpoint file."""

    name: str
    """Its path from the directory on."""
    epoch: int = 0
    step: int = 0
    score: float | None = None
    """Where the file is kept for it."""
    is_weights_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    entries: tuple[Entry, ...] = ()
    """In the order in which they were written."""
    last: str = ""
    best: str = ""

    def changed(self, *, added: Sequence[Entry], removed: Sequence[str], last: str, best: str) -> "Index":
        """With files that have come and without those that are to go, by name."""
        gone = {*removed, *(entry.name for entry in added)}
        kept = [entry for entry in self.entries if entry.name not in gone]
        return replace(self, entries=(*kept, *added), last=last, best=best)


def read_index(directory: str | os.PathLike[str]) -> Index:
    """Empty where there is none, or none that can be read."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # no JSON of ours
        content = json.loads(read_text(join(directory, FILE_NAME)) or "{}")
        known = {field.name for field in fields(Entry)}
        listed = [
            Entry(**{key: value for key, value in entry.items() if key in known})
            for entry in content.get("entries", [])
            if leads_down(entry["name"])
        ]
        return Index(entries=tuple(listed), last=str(content.get("last", "")), best=str(content.get("best", "")))
    return Index()


def write_index(index: Index, directory: str | os.PathLike[str]) -> None:
    """Whole or not at all. OSError, or what the store of a URL raises."""
    write_text(json.dumps({"format": _FORMAT, **asdict(index)}, indent=1), join(directory, FILE_NAME))


def recorded_paths(directory: str) -> set[str]:
    """The paths of the files that runs have written there."""
    index = read_index(directory)
    names = {*(entry.name for entry in index.entries), index.last}
    return {join(directory, name) for name in names if leads_down(name)}


def newest_first(directory: str | os.PathLike[str]) -> Iterator[str]:
    """The paths of the checkpoints, from the one written last to the first; a file with several names under one."""
    listed = {entry.name: number for number, entry in enumerate(read_index(directory).entries)}
    names = {*listed, *(name for name in entries(os.fspath(directory)) if name.endswith(SUFFIX))}
    times = {name: written_at(join(directory, name)) for name in names}
    newest_listed = max((times[name] for name in listed), default=0.0)

    def age(name: str) -> tuple[int, float]:
        if name in listed:
            return 1, -listed[name]
        # A crash fell between the file and the index; or it is none of this run's.
        return (0 if times[name] >= newest_listed else 2), -times[name]

    seen: set[Any] = set()
    for name in sorted((name for name in names if times[name] > 0), key=age):
        path = join(directory, name)
        identity = path if is_url(path) else _inode(path)
        if identity is not None and identity not in seen:
            seen.add(identity)
            yield path


def newest_usable(
    directory: str | os.PathLike[str], *, allow_pickle: bool = False, is_whole: bool = True
) -> tuple[str, dict[str, Any]] | None:
    """Path and content of the newest checkpoint that a run can be continued from; None: there is none.

    Damaged ones, and what is none, are named in a warning and passed over. Arguments: as `files.read` has them.
    CheckpointError: one that cannot be read for another reason, such as that a newer raylit has written it.
    """
    for path in newest_first(directory):
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
    """0.0: there is no checkpoint."""
    return remote.written_at(path) if is_url(path) else modified_at(path)


def _inode(path: str) -> tuple[int, int] | None:
    """None: a link that leads nowhere, or a file that is gone by now."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
