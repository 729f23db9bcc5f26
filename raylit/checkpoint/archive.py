"""The records of a zip archive that lies in memory: where their bytes are, and where their checksums belong. Both
sides."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

_END_BYTES, _LOCATOR_BYTES, _LARGE_END_BYTES, _LOCAL_BYTES, _ENTRY_BYTES = 22, 20, 56, 30, 46
"""Sizes of what has one, in the words of the zip format (APPNOTE.TXT, 4.3): end of central directory record, zip64
locator and end, local header, central directory header."""
_IS_LARGE = 0xFFFFFFFF
"""Stands for a number that is in a field of 64 bits elsewhere."""
_HAS_DESCRIPTOR = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Places in the archive."""

    start: int
    end: int
    checksums: tuple[int, int]
    """Where its CRC-32 stands: after it, and in the archive's directory."""


def records(read: Callable[[int, int], bytes], size_bytes: int) -> list[Record]:
    """Those that are not empty, in the order of the archive's directory, which is that in which they were written.

    `read(start, size)`: bytes of the archive, which has no comment, and whose records are not compressed and followed
    by a descriptor: it has been written in one go.
    """
    end = read(size_bytes - _END_BYTES, _END_BYTES)
    num_entries, directory_bytes, directory_start = struct.unpack("<10xHLL2x", end)
    locator_start = size_bytes - _END_BYTES - _LOCATOR_BYTES
    if _IS_LARGE in (directory_bytes, directory_start) or num_entries == 0xFFFF:
        (large_end,) = struct.unpack("<8xQ4x", read(locator_start, _LOCATOR_BYTES))
        num_entries, directory_bytes, directory_start = struct.unpack("<32x3Q", read(large_end, _LARGE_END_BYTES))
    directory = read(directory_start, directory_bytes)
    found, place = [], 0
    for _ in range(num_entries):
        flags, size, name, extra, comment, header = struct.unpack_from("<8xH14xL3H8xL", directory, place)
        after_name = place + _ENTRY_BYTES + name
        if _IS_LARGE in (size, header):
            size, header = _large_numbers(directory[after_name : after_name + extra], size=size, header=header)
        start = header + _LOCAL_BYTES + sum(struct.unpack("<26xHH", read(header, _LOCAL_BYTES)))
        if size > 0:
            assert flags & _HAS_DESCRIPTOR
            checksums = (start + size + 4, directory_start + place + 16)
            found.append(Record(start=start, end=start + size, checksums=checksums))
        place = after_name + extra + comment
    return found


def _large_numbers(extra: bytes, *, size: int, header: int) -> tuple[int, int]:
    """From the zip64 field, which has those of size, compressed size and header's place that need it, in this order."""
    place = 0
    while place < len(extra):
        kind, num_bytes = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            numbers = list(struct.unpack_from(f"<{num_bytes // 8}Q", extra, place + 4))
            if size == _IS_LARGE:
                size, _ = numbers.pop(0), numbers.pop(0)
            return size, numbers.pop(0) if header == _IS_LARGE else header
        place += 4 + num_bytes
    raise AssertionError("no zip64 field")
