"""SharedMemory: data that all workers of a host map from one place, each with its own changes. Worker."""

import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class SharedMemory:
    """The arrays of one object in Ray's store, mapped a second time by this process: copy-on-write.

    Ray's own mapping must not be handed out: torch cannot mark a tensor as read-only, and a write would change the data
    of every process of the host. In a private mapping a write goes to a copy of the page that only its writer has, as
    if each worker, and each process that it forks, had a copy of its own; reading costs nothing. NumPy's arrays are
    marked as read-only besides, and refuse a write at once.

    The mapping must be of the store's own file, which was unlinked; the raylet, this process's parent, has it open.
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
        path, offset = _opened_file(first, end)
        # Read-only: not even by mistake can this process write to what the others see.
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

    def has_as_given(self, value: Any) -> bool:
        """Whether a tensor or array, or one in a list, tuple or dict, lies in this memory, and nothing of what lies
        there has been written to by this process."""
        indices = set(self._indices_of(value))
        return bool(indices) and all(self._is_as_given(index) for index in indices)

    def release(self) -> tuple[str, ...]:
        """Let go of the memory; names it if something still refers to a part of it, which keeps it from being freed."""
        if self._mapping is None:
            return ()
        mapping = weakref.ref(self._mapping)
        self._mapping, self.views = None, []
        return () if mapping() is None else ("data of the run, which something still refers to",)

    def _indices_of(self, value: Any) -> Iterator[int]:
        """Yield the index of the stored array in which each tensor or array lies."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                yield from self._indices_of(item)
            return
        if isinstance(value, Tensor):
            address = value.data_ptr() if type(value) is Tensor and value.device.type == "cpu" else 0
        elif isinstance(value, np.ndarray):
            address = _address(value)
        else:
            return
        if self._mapping is not None:
            place = address - self._first
            yield from (index for index, (start, stop) in enumerate(self._bounds) if start <= place < stop)

    def _is_as_given(self, index: int) -> bool:
        assert self._mapping is not None
        return np.array_equal(np.frombuffer(self.views[index], dtype=np.uint8), self._mapping.stored[index])


class _Mapping(mmap.mmap):
    """Ray must not reuse the object's memory while it is mapped here."""

    stored: Sequence[NDArray[np.uint8]]


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _opened_file(first: int, end: int) -> tuple[str, int]:
    """Where the raylet has open what this process has mapped at these addresses, and from where in it."""
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
