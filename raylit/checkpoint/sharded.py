"""A sharded checkpoint: a directory of parts with their checksums."""

import ctypes
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from raylit.errors import DamagedCheckpoint
from raylit.storage import file_system, is_url, join, leads_down
from raylit.strategies import sharded_state as parts

METADATA = ".metadata"
"""Where everything is in the parts."""

Checksums = dict[str, tuple[int, int]]
"""Size in bytes and CRC-32 of each file, by its name."""

_CHUNK_BYTES = 4 * 2**20


def name_of_part(rank: int) -> str:
    return f"__{rank}_0.distcp"


def first_damaged(directory: str, checksums: Mapping[str, tuple[int, int]], *, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the first of the files that is not as it was written; empty: they are all sound.

    `share`: of the files only every n-th, from the i-th.
    """
    first, step = share
    for name in sorted(checksums)[first::step]:
        if wrong := damage_of(join(directory, name), checksums[name]):
            return f"{name.rpartition('/')[2]} {wrong}"
    return ""


def damage_of(path: str, checksum: tuple[int, int]) -> str:
    """What is wrong with a file, at a path or a URL; empty: it is sound."""
    if not is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        return "is no file"  # to open a pipe would be to wait for its other end
    try:
        with _opened(path) as (file, num_bytes):
            if num_bytes != checksum[0]:
                return f"has {num_bytes} bytes instead of {checksum[0]}"
            crc = 0
            while chunk := file.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
    except FileNotFoundError:
        return "is missing"
    return "" if crc == checksum[1] else "does not match its checksum"


@contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """The file and its size."""
    files: Any = None
    if is_url(path):
        files, path = file_system(path)
    with open(path, "rb") if files is None else files.open(path, "rb", block_size=_CHUNK_BYTES) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        yield file, num_bytes


INDEX = "index.ckpt"
PARTS = "parts-"
"""What the names of subdirectories begin with."""
STATES = ("state_dict", "optimizer_states")
"""The entries of a checkpoint that may have placeholders."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def is_checkpoint(path: Path) -> bool:
    return (path / INDEX).is_file()


def checksums_of(checkpoint: Mapping[str, Any]) -> Checksums:
    """Of the parts, by their paths in the directory; empty where the checkpoint is one file."""
    return {name: (size, crc) for name, (size, crc) in checkpoint.get("raylit", {}).get("parts", {}).items()}


def with_place(checkpoint: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """The checkpoint of an index file, knowing where its parts are. DamagedCheckpoint: it names others than its own."""
    place = str(directory) if is_url(directory) else os.path.abspath(directory)
    parts = checkpoint.get("raylit", {}).get("parts", {})
    if outside := [name for name in parts if not leads_down(name)]:
        raise DamagedCheckpoint(
            f"{place} names a part {outside[0]!r}, which is outside of it: it is damaged, or somebody has changed it. "
            "Use another checkpoint"
        )
    return {**checkpoint, "raylit": {**checkpoint.get("raylit", {}), "directory": place}}


def without_place(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """As it comes from a file, whose word where the parts are does not count."""
    about = checkpoint.get("raylit")
    if not isinstance(about, dict) or "directory" not in about:
        return checkpoint
    return {**checkpoint, "raylit": {name: value for name, value in about.items() if name != "directory"}}


def check_replaceable(target: Path) -> None:
    """FileExistsError: a directory of somebody else's is there, which must not go with what a checkpoint replaces."""
    if target.is_dir() and not target.is_symlink() and not is_replaceable(os.listdir(target)):
        raise FileExistsError(f"{target} is a directory and is no checkpoint: give a path where nothing else is")


def is_replaceable(names: Iterable[str]) -> bool:
    """A directory with these files is a checkpoint, or what is left of one whose writing was cut off, or empty."""
    found = list(names)
    return INDEX in found or all(is_own(name) for name in found)


def is_own(name: str) -> bool:
    """A file or subdirectory of a checkpoint, by its name."""
    return name in (INDEX, METADATA) or name.endswith((".distcp", ".tmp")) or name.startswith(PARTS)


def place_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Where the parts are that the checkpoint has placeholders for; None: it has none."""
    place: str | None = checkpoint.get("raylit", {}).get("directory")
    return place


def check(checkpoint: Mapping[str, Any], place: str, *, share: tuple[int, int] = (0, 1)) -> None:
    """DamagedCheckpoint: a part is not as it was written. `share`: every n-th of them, from the i-th."""
    if wrong := first_damaged(place, checksums_of(checkpoint), share=share):
        raise DamagedCheckpoint(f"{place} is damaged: {wrong}. Use the checkpoint before it")


def open_reader(checkpoint: Mapping[str, Any]) -> parts.Reader | None:
    """Of the parts that the checkpoint has placeholders for; None: it has none. On this machine they are taken to be
    sound; from a URL they are checked."""
    if (place := place_of(checkpoint)) is None:
        return None
    # A second of imports that only sharded checkpoints need.
    from raylit.checkpoint import dcp_files

    return dcp_files.PartReader(place, checksums_of(checkpoint))


def read_whole(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """With all its tensors, as if it had been written as one file; as it is where it was. DamagedCheckpoint."""
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
    filled = {
        state: parts.fill_placeholders(checkpoint[state], state, targets) for state in STATES if state in checkpoint
    }
    about = {name: value for name, value in checkpoint["raylit"].items() if name not in ("parts", "directory")}
    return {**checkpoint, **filled, "raylit": about}


def ensure_readable(checkpoint: dict[str, Any], *, sees: Callable[[str], bool]) -> dict[str, Any]:
    """With all its tensors, to be sent to the workers, where these do not see its parts."""
    place = place_of(checkpoint)
    return checkpoint if place is None or sees(join(place, INDEX)) else read_whole(checkpoint)


def move_into_place(draft: Path, target: Path) -> None:
    """In the place of the target; what stood there is in the draft's place afterwards, or gone. OSError: not done."""
    check_replaceable(target)
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
