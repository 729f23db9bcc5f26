"""Sharded checkpoints: a directory of parts with an index and checksums. Driver and workers."""

import ctypes
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from raylit.checkpoint.layout import INDEX, Checksums, find_first_damage, is_replaceable
from raylit.errors import DamagedCheckpoint
from raylit.storage import is_url, join, leads_down
from raylit.strategies import sharded_state as parts

STATES = ("state_dict", "optimizer_states")
"""The entries of a checkpoint that may contain placeholders."""

_AT_FDCWD = -100
"""Linux constant: resolve a relative path from the working directory."""
_RENAME_EXCHANGE = 2
"""Linux constant: flag of renameat2 that swaps two names atomically."""


def is_checkpoint(path: Path) -> bool:
    """Return whether a local directory is a complete sharded checkpoint."""
    return (path / INDEX).is_file()


def read_checksums(checkpoint: Mapping[str, Any]) -> Checksums:
    """Return the checksums of the parts by their paths in the directory; empty if the checkpoint is one file."""
    return {name: (size, crc) for name, (size, crc) in checkpoint.get("raylit", {}).get("parts", {}).items()}


def attach_directory(checkpoint: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """Return an index file's checkpoint with the directory of its parts recorded in it.

    Raises:
        DamagedCheckpoint: if it names parts outside the directory.
    """
    place = str(directory) if is_url(directory) else os.path.abspath(directory)
    parts = checkpoint.get("raylit", {}).get("parts", {})
    if outside := [name for name in parts if not leads_down(name)]:
        raise DamagedCheckpoint(
            f"{place} names a part {outside[0]!r}, which is outside of it: it is damaged, or somebody has changed it. "
            "Use another checkpoint"
        )
    return {**checkpoint, "raylit": {**checkpoint.get("raylit", {}), "directory": place}}


def drop_directory(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint without the directory that a file claims for its parts, which is not trusted."""
    about = checkpoint.get("raylit")
    if not isinstance(about, dict) or "directory" not in about:
        return checkpoint
    return {**checkpoint, "raylit": {name: value for name, value in about.items() if name != "directory"}}


def check_replaceable(target: Path) -> None:
    """Check that `target` is not a directory with other content, which replacing it would delete.

    Raises:
        FileExistsError: if it is.
    """
    if target.is_dir() and not target.is_symlink() and not is_replaceable(os.listdir(target)):
        raise FileExistsError(f"{target} is a directory and is no checkpoint: give a path where nothing else is")


def place_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the directory of the parts that the placeholders stand for; None if there are no placeholders."""
    place: str | None = checkpoint.get("raylit", {}).get("directory")
    return place


def check(checkpoint: Mapping[str, Any], place: str, *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the parts with their checksums; `share=(i, n)` checks every n-th part, starting at the i-th.

    Raises:
        DamagedCheckpoint: if a part differs from what was written.
    """
    if wrong := find_first_damage(place, read_checksums(checkpoint), share=share):
        raise DamagedCheckpoint(f"{place} is damaged: {wrong}. Use the checkpoint before it")


def open_reader(checkpoint: Mapping[str, Any]) -> parts.Reader | None:
    """Return a reader of the parts that the placeholders stand for; None if there are no placeholders.

    Local parts are assumed to be intact; parts at a URL are checked when they are downloaded.
    """
    if (place := place_of(checkpoint)) is None:
        return None
    # Imported here because torch.distributed.checkpoint takes about 1 s, which only sharded checkpoints need.
    from raylit.checkpoint import dcp_files

    return dcp_files.PartReader(place, read_checksums(checkpoint))


def read_whole(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with all its tensors, as if it had been written as one file.

    A checkpoint without placeholders is returned unchanged.

    Raises:
        DamagedCheckpoint: if a part differs from what was written.
    """
    if (read := open_reader(checkpoint)) is None:
        return checkpoint
    place = place_of(checkpoint)
    assert place is not None
    if not is_url(place):
        check(checkpoint, place)
    targets = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for state in STATES
        for name, tensor in parts.iterate_placeholders(checkpoint.get(state), state)
    }
    read(targets)
    states = {
        state: parts.fill_placeholders(checkpoint[state], state, targets) for state in STATES if state in checkpoint
    }
    about = {name: value for name, value in checkpoint["raylit"].items() if name not in ("parts", "directory")}
    return {**checkpoint, **states, "raylit": about}


def ensure_readable(checkpoint: dict[str, Any], *, sees: Callable[[str], bool]) -> dict[str, Any]:
    """Return the checkpoint for sending to workers: with all its tensors if `sees` says they cannot read its parts."""
    place = place_of(checkpoint)
    return checkpoint if place is None or sees(join(place, INDEX)) else read_whole(checkpoint)


def move_into_place(draft: Path, target: Path) -> None:
    """Move a draft directory to `target`; the previous content is moved to the draft's place, or removed.

    Raises:
        OSError: if the move failed.
    """
    check_replaceable(target)
    _sync(draft)
    if not os.path.lexists(target) or not _exchange_names(draft, target):
        # If the file system cannot swap two names, the target is missing for a moment.
        discard(target)
        os.rename(draft, target)
    _sync(target.parent)


def discard(path: Path) -> None:
    """Remove a file, link or directory; a missing one is not an error."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove(path: Path, *, temporary_name: str) -> None:
    """Remove a sharded checkpoint.

    It is renamed first, so that a partly removed directory never looks like a checkpoint.
    """
    hidden = path.parent / temporary_name
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _exchange_names(first: Path, second: Path) -> bool:
    """Swap two names atomically with Linux's renameat2; return False if that is not possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    paths = os.fsencode(os.path.abspath(first)), os.fsencode(os.path.abspath(second))
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _sync(directory: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power failure; a no-op if unsupported."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
