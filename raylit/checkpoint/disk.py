"""Bytes to a file on a disk, past the page cache where that can be. Both sides."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

BLOCK_BYTES = 4096
"""To what memory and place in the file must be aligned for the disk to take a part from memory itself."""
MIN_DIRECT_BYTES = 2**20
_CHUNK_BYTES = 16 * 2**20


def write_through(parts: Iterable[memoryview], path: str | os.PathLike[str]) -> None:
    """Write the parts one after the other to an existing file, and down to the disk.

    Large aligned ones are not copied to the page cache on their way: with 400 MB that takes 0.1 to 0.7 s of a
    processor, the longer the less free memory there is, and drives out what else is in the cache.
    """
    offset = 0
    with _opened(path, os.O_WRONLY) as file, _opened(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0)) as direct:
        assert file is not None
        for part in parts:
            num_direct = len(part) // BLOCK_BYTES * BLOCK_BYTES if _is_aligned(part, offset) else 0
            if direct is None or not _is_written(direct, part[:num_direct], offset):
                direct, num_direct = None, 0
            _write(file, part[num_direct:], offset + num_direct)
            offset += len(part)
        os.fsync(file)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], flags: int) -> Iterator[int | None]:
    """None: the file system does not know that flag. A link that somebody has put in the file's place is an error."""
    try:
        descriptor = os.open(Path(path), flags | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        if flags == os.O_WRONLY:
            raise
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_aligned(part: memoryview, offset: int) -> bool:
    if len(part) < MIN_DIRECT_BYTES or offset % BLOCK_BYTES != 0:
        return False
    address: int = np.frombuffer(part, dtype=np.uint8).ctypes.data
    return address % BLOCK_BYTES == 0


def _is_written(direct: int, part: memoryview, offset: int) -> bool:
    """False: the disk has larger blocks; another way has to be taken from here on."""
    try:
        _write(direct, part, offset)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _write(file: int, part: memoryview, offset: int) -> None:
    while len(part) > 0:
        num_written = os.pwrite(file, part[:_CHUNK_BYTES], offset)
        part, offset = part[num_written:], offset + num_written
