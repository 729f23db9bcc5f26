"""SharedMemory: data that all workers of a host map from one place, and who has written to it. Worker."""

import mmap
import multiprocessing
import multiprocessing.util
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raylit.errors import ModuleError

_CHECKING_SHARE = 0.01
"""Of a worker's time goes to looking for writes between the ends of its commands; a look took 2 to 3 ms at 200 MB."""


class SharedMemory:
    """The arrays of one object in Ray's store, mapped a second time by this process: copy-on-write.

    A tensor cannot be made read-only: torch ignores the flag, and a page that the kernel protects would end the
    process without a word. A Tensor subclass that refuses in-place operations costs microseconds at every sample, a
    storage that throws on mutable access refuses `.numpy()` and most extensions, and neither sees
    `torch.from_numpy(array)`. In a private mapping a write goes to a copy of the page that only its writer has,
    whatever made it. The kernel keeps account of such pages, so reading costs nothing, `check` finds every write, and
    the tensors and arrays are plain ones. (NumPy's are marked read-only besides, and refuse at once.)

    The mapping must be of the store's own file, which was unlinked; the raylet, this process's parent, has it open.
    Where that cannot be reached (no /proc, another user's raylet), the data is copied: correct, but not shared.
    """

    def __init__(self, stored: Sequence[NDArray[np.uint8]], *, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._bounds = [(0, 0)] * len(stored)
        self._next_check_s = 0.0
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
        if not os.access("/proc/self/pagemap", os.R_OK):
            raise OSError("no account of written pages")
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
        # What a DataLoader's worker process writes is its own, too; it says so here when it ends.
        self._written_by_children = mmap.mmap(-1, len(stored))
        multiprocessing.util.register_after_fork(self, _check_at_exit)

    def contains(self, value: Any) -> bool:
        """Whether a tensor or array, or one in a list, tuple or dict, lies in this memory."""
        if isinstance(value, dict):
            return any(self.contains(item) for item in value.values())
        if isinstance(value, (list, tuple)):
            return any(self.contains(item) for item in value)
        if isinstance(value, Tensor):
            address = value.data_ptr() if type(value) is Tensor and value.device.type == "cpu" else 0
        elif isinstance(value, np.ndarray):
            address = _address(value)
        else:
            return False
        return self._mapping is not None and self._first <= address < self._first + len(self._mapping)

    def check(self, *, is_due: bool = True) -> None:
        """ModuleError: this process, or one that it has forked, has written to the memory.

        Without `is_due` it looks only now and then.
        """
        started_s = time.monotonic()
        if self._mapping is None or not (is_due or started_s >= self._next_check_s):
            return
        written = set(np.flatnonzero(np.frombuffer(self._written_by_children, dtype=np.uint8)).tolist())
        for process in ("self", *(child.pid for child in multiprocessing.active_children())):
            written.update(self._written_by(process))
        now_s = time.monotonic()
        self._next_check_s = now_s + (now_s - started_s) / _CHECKING_SHARE
        if written:
            raise ModuleError(
                f"something has written in place to {', '.join(self._labels[index] for index in sorted(written))}, "
                "which is data that was given to the run and that the workers of a host share: change a copy "
                "(x = x.clone(), or x.copy() of an array), make it a buffer of the module (register_buffer), or make "
                "it in setup(), which gives each worker its own. No other process has seen the change"
            )

    def release(self) -> tuple[str, ...]:
        """Let go of the memory; names it if something still refers to a part of it, which keeps it from being freed."""
        if self._mapping is None:
            return ()
        mapping = weakref.ref(self._mapping)
        self._mapping, self.views = None, []
        return () if mapping() is None else ("data of the run, which something still refers to",)

    def _written_by(self, process: str | int | None) -> Iterator[int]:
        """Indices of what a process has pages of its own of."""
        assert self._mapping is not None
        num_pages = -(-len(self._mapping) // mmap.PAGESIZE)
        try:
            with open(f"/proc/{process}/pagemap", "rb", buffering=0) as pagemap:
                # Eight bytes a page (Documentation/admin-guide/mm/pagemap.rst): bit 63 present, 62 swapped, 61 of a
                # file. Present or swapped and not of the file: copied, by a write.
                pagemap.seek(self._first // mmap.PAGESIZE * 8)
                pages = np.frombuffer(pagemap.read(num_pages * 8), dtype=np.uint64)
        except OSError:  # a child that has just ended, and has told by itself
            return
        copied = np.flatnonzero((pages >> np.uint64(62) != 0) & (pages >> np.uint64(61) & np.uint64(1) == 0))
        for page in copied:
            start = int(page) * mmap.PAGESIZE
            for index, (low, high) in enumerate(self._bounds):
                if low < start + mmap.PAGESIZE and start < high:
                    yield index

    def _tell_of_writes(self) -> None:
        if self._mapping is not None:
            for index in self._written_by("self"):
                self._written_by_children[index] = 1


class _Mapping(mmap.mmap):
    """Ray must not reuse the object's memory while it is mapped here."""

    stored: Sequence[NDArray[np.uint8]]


def _check_at_exit(memory: SharedMemory) -> None:
    """In a forked child: its registry of finalizers is cleared at its start, after this, so that comes first."""
    multiprocessing.util.Finalize(None, memory._tell_of_writes, exitpriority=0)


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
