"""The files of a checkpoint that is a directory: what they are called, and whether they are sound. Both sides."""

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from raylit.places import file_system, is_url, joined

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
        if wrong := damage_of(joined(directory, name), checksums[name]):
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
