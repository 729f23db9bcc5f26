"""Data that all workers of a host map from one copy in Ray's object store, each with its own changes."""

import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class SharedMemory:
    """Arrays of one object in Ray's store, mapped a second time by this process: copy-on-write.

    Ray's own mapping must not be passed to users: torch cannot mark a tensor as read-only, and a write would change the
    data of every process of the host. In a private mapping a write goes to a copy of the page that only its writer has,
    as if each worker, and each process that it forks, had its own copy; reading costs nothing. NumPy arrays are also
    marked as read-only, and refuse a write at once.

    The mapping must be of the store's own file, which is unlinked; the raylet, this process's parent, has it open.
    Where that cannot be reached (no /proc, another user's raylet), the data is copied: correct, but not shared.
    """

    def __init__(self, stored: Sequence[NDArray[np.uint8]]) -> None:
        self._bounds = [(0, 0)] * len(stored)
        self._mapping: _Mapping | None = None
        try:
            self._map(stored)
        except (OSError, ValueError):
            self.views = [memoryview(array.tobytes()) for array in stored]

    def _map(self, stored: Sequence[NDArray[np.uint8]]) -> None:
        starts = [_address(array) for array in stored]
        if not starts:
            raise ValueError("nothing to map")
        first = min(starts) // mmap.PAGESIZE * mmap.PAGESIZE
        end = max(start + array.nbytes for start, array in zip(starts, stored, strict=True))
        path, offset = _find_store_file(first, end)
        # Read-only, so that this process cannot write to the shared pages even by mistake.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapping = _Mapping(
                descriptor, end - first, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset
            )
        finally:
            os.close(descriptor)
        mapping.stored = stored
        self._first = _address(np.frombuffer(mapping, dtype=np.uint8))
        self._bounds = [
            (start - first, start - first + array.nbytes) for start, array in zip(starts, stored, strict=True)
        ]
        self.views = [memoryview(mapping)[start:stop].toreadonly() for start, stop in self._bounds]
        self._mapping = mapping

    def is_unmodified(self, value: Any) -> bool:
        """Return whether a value lies in this memory and this process has not written to it.

        The value is a tensor or array, or a list, tuple or dict of them.
        """
        indices = set(self._find_indices(value))
        return bool(indices) and all(self._is_array_unmodified(index) for index in indices)

    def release(self) -> tuple[str, ...]:
        """Release the memory; return what keeps it from being freed if something still refers to it."""
        if self._mapping is None:
            return ()
        mapping = weakref.ref(self._mapping)
        self._mapping, self.views = None, []
        return () if mapping() is None else ("data of the run, which something still refers to",)

    def _find_indices(self, value: Any) -> Iterator[int]:
        """Yield the index of the stored array in which each tensor or array lies."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                yield from self._find_indices(item)
            return
        if isinstance(value, Tensor):
            address = value.data_ptr() if type(value) is Tensor and value.device.type == "cpu" else 0
        elif isinstance(value, np.ndarray):
            address = _address(value)
        else:
            return
        if self._mapping is not None:
            offset = address - self._first
            yield from (index for index, (start, stop) in enumerate(self._bounds) if start <= offset < stop)

    def _is_array_unmodified(self, index: int) -> bool:
        assert self._mapping is not None
        return np.array_equal(np.frombuffer(self.views[index], dtype=np.uint8), self._mapping.stored[index])


class _Mapping(mmap.mmap):
    """Mapping that keeps a reference to Ray's object, whose memory Ray must not reuse while it is mapped here."""

    stored: Sequence[NDArray[np.uint8]]


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _find_store_file(first: int, end: int) -> tuple[str, int]:
    """Return the path and offset of the store's file, open in the raylet, that is mapped at these addresses."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            addresses, _, offset, _, inode = line.split()[:5]
            low, high = (int(address, 16) for address in addresses.split("-"))
            if low <= first and end <= high and "plasma" in line:
                break
        else:
            raise OSError("not in one mapping of Ray's store")
    directory = f"/proc/{os.getppid()}/fd"
    for name in os.listdir(directory):
        status = os.stat(path := f"{directory}/{name}")
        if status.st_ino == int(inode) and "plasma" in os.readlink(path):
            return path, int(offset, 16) + first - low
    raise OSError("the raylet does not have the store's file open")
