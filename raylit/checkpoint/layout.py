"""File names and checksums of a checkpoint that is a directory. Driver and workers.

This is the lowest module of the sharded format: `remote`, `dcp_files` and `sharded` import it.
"""

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from raylit.storage import file_system, is_url, join

INDEX = "index.ckpt"
"""Name of the index file: the checkpoint itself, with placeholders for the tensors in the parts."""
PARTS = "parts-"
"""Prefix of the names of subdirectories with parts."""
METADATA = ".metadata"
"""Name of the file that maps each tensor to its byte ranges in the parts."""

Checksums = dict[str, tuple[int, int]]
"""Size in bytes and CRC-32 of each file, by the file's name."""

_CHUNK_BYTES = 4 * 2**20


def is_replaceable(names: Iterable[str]) -> bool:
    """Return whether a directory with these names may be replaced: a checkpoint, an unfinished one, or empty."""
    existing = list(names)
    return INDEX in existing or all(is_own(name) for name in existing)


def is_own(name: str) -> bool:
    """Return whether this is the name of a file or subdirectory of a checkpoint."""
    return name in (INDEX, METADATA) or name.endswith((".distcp", ".tmp")) or name.startswith(PARTS)


def name_of_part(rank: int) -> str:
    """Return the file name of a rank's part, as torch.distributed.checkpoint names it."""
    return f"__{rank}_0.distcp"


def find_first_damage(
    directory: str, checksums: Mapping[str, tuple[int, int]], *, share: tuple[int, int] = (0, 1)
) -> str:
    """Describe the first file that differs from what was written; return "" if all are intact.

    `share=(i, n)` checks only every n-th file, starting at the i-th.
    """
    first, step = share
    for name in sorted(checksums)[first::step]:
        if wrong := find_damage(join(directory, name), checksums[name]):
            return f"{name.rpartition('/')[2]} {wrong}"
    return ""


def find_damage(path: str, checksum: tuple[int, int]) -> str:
    """Describe the damage of a file at a path or a URL; return "" if it is intact."""
    if not is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        return "is no file"  # opening a pipe would block until its other end is opened
    try:
        with _open_file(path) as (file, num_bytes):
            if num_bytes != checksum[0]:
                return f"has {num_bytes} bytes instead of {checksum[0]}"
            crc = 0
            while chunk := file.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
    except FileNotFoundError:
        return "is missing"
    return "" if crc == checksum[1] else "does not match its checksum"


@contextmanager
def _open_file(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file at a path or a URL and yield it with its size in bytes."""
    files: Any = None
    if is_url(path):
        files, path = file_system(path)
    with open(path, "rb") if files is None else files.open(path, "rb", block_size=_CHUNK_BYTES) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        yield file, num_bytes
