"""A checkpoint that is a directory: the parts that workers have written at the same time, and a file with all else.

That file, INDEX, is a checkpoint like any other, but for placeholders in the place of sharded tensors (see
`strategies.parts`), and it knows each other file's size and checksum. Both sides.
"""

import ctypes
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from raylit.errors import CheckpointError, DamagedCheckpoint
from raylit.strategies import parts

INDEX = "index.ckpt"
STATES = ("state_dict", "optimizer_states")
"""The entries of a checkpoint that may have placeholders."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def is_checkpoint(path: Path) -> bool:
    return (path / INDEX).is_file()


def checksums_of(checkpoint: Mapping[str, Any]) -> parts.Checksums:
    """Of the parts; empty where the checkpoint is one file."""
    return {name: (size, crc) for name, (size, crc) in checkpoint.get("raylit", {}).get("parts", {}).items()}


def with_place(checkpoint: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The checkpoint of an index file, knowing where its parts are."""
    return {**checkpoint, "raylit": {**checkpoint["raylit"], "directory": str(directory.absolute())}}


def place_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Where the parts are that the checkpoint has placeholders for; None: it has none."""
    place: str | None = checkpoint.get("raylit", {}).get("directory")
    return place


def check(checkpoint: Mapping[str, Any], directory: Path | str, *, share: tuple[int, int] = (0, 1)) -> None:
    """DamagedCheckpoint: a part is not as it was written. `share`: every n-th of them, from the i-th."""
    if wrong := parts.first_damaged(str(directory), checksums_of(checkpoint), share=share):
        raise DamagedCheckpoint(f"{directory} is damaged: {wrong}. Use the checkpoint before it")


def check_presence(checkpoint: Mapping[str, Any], directory: Path | str) -> None:
    """CheckpointError: parts that workers have written cannot be seen from here."""
    missing = [name for name in checksums_of(checkpoint) if not (Path(directory) / name).is_file()]
    if missing or not checksums_of(checkpoint):
        raise CheckpointError(
            f"the workers have written {', '.join(missing) or 'their parts'} to a directory of this name on their own "
            "hosts: a sharded checkpoint needs a file system that all hosts share (default_root_dir, dirpath), or "
            "FSDPStrategy(state_dict_type='full')"
        )


def whole(checkpoint: dict[str, Any], directory: Path | str) -> dict[str, Any]:
    """The checkpoint of an index file with all its tensors, as if it had been written as one file."""
    check(checkpoint, directory)
    targets = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for state in STATES
        for name, tensor in parts.placeholders(checkpoint.get(state), state)
    }
    # A second of imports that only sharded checkpoints need.
    from raylit.strategies import part_files

    part_files.read(targets, str(directory))
    filled = {state: parts.filled(checkpoint[state], state, targets) for state in STATES if state in checkpoint}
    about = {name: value for name, value in checkpoint["raylit"].items() if name not in ("parts", "directory")}
    return {**checkpoint, **filled, "raylit": about}


def put(draft: Path, target: Path) -> None:
    """In the place of the target; what stood there is in the draft's place afterwards, or gone. OSError: not done."""
    _sync(draft)
    if not os.path.lexists(target) or not _are_exchanged(draft, target):
        # Where the file system cannot exchange two names there is a moment without the target.
        discard(target)
        os.rename(draft, target)
    _sync(target.parent)


def discard(path: Path) -> None:
    """Whatever it is; a missing one is fine."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove(path: Path, *, temporary_name: str) -> None:
    """Out of sight first: half a directory must never look like a checkpoint."""
    hidden = path.parent / temporary_name
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _are_exchanged(first: Path, second: Path) -> bool:
    """By Linux's renameat2, in one step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    paths = os.fsencode(os.path.abspath(first)), os.fsencode(os.path.abspath(second))
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _sync(directory: Path) -> None:
    """Make the names in it outlive a power failure, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
