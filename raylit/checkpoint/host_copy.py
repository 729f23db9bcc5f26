"""HostCopy: a state as it is now, copied into memory that the next copy uses again. Worker."""

import mmap
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylit.compat.torch_tensor import build_negative_view

_ALIGNMENT = 64
_STRETCH_BYTES = 4 * 2**20
"""Threads take turns in what is to be copied."""
_MIN_BYTES_OF_THREAD = 32 * 2**20
_MAX_THREADS = 8
"""Memory is not faster with more."""

_Key = tuple[torch.device, int, int]
"""Of a storage: where its memory is, and how large it is."""


class HostCopy:
    """Memory for one copy; between two of them the system may have it if it needs it."""

    def __init__(self) -> None:
        self._memory: NDArray[np.uint8] | None = None
        self._mapping: mmap.mmap | None = None
        """Under `_memory`, unless that is pinned."""

    def taken(self, checkpoint: Any) -> Any:
        """The checkpoint with its tensors in this memory, whatever device they were on; views of one storage stay views
        of one, so that the file is the same. Overwrites the copy taken before. Waits for the device.

        `checkpoint` is as `format.plain` leaves it. Copying into fresh memory takes twice as long as into memory that
        has been in use: 63 instead of 29 ms of a core for 400 MB.
        """
        storages: dict[_Key, torch.UntypedStorage] = {}
        _map_tensors(checkpoint, lambda tensor: _note(tensor, storages))
        starts, num_bytes = {}, 0
        for key, storage in storages.items():
            starts[key] = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            num_bytes = starts[key] + storage.nbytes()
        is_on_device = any(storage.device.type != "cpu" for storage in storages.values())
        memory = self._prepared(num_bytes, is_pinned=is_on_device)
        copies, here = {}, []
        for key, storage in storages.items():
            place = memory[starts[key] : starts[key] + storage.nbytes()]
            copy = torch.from_numpy(place)
            if storage.device.type == "cpu":
                here.append((place, _bytes_of(storage).numpy()))
            else:
                copy.copy_(_bytes_of(storage), non_blocking=True)
            copies[key] = copy.untyped_storage()
        _copy(here)
        if is_on_device:
            torch.cuda.synchronize()
        return _map_tensors(checkpoint, lambda tensor: _copied(tensor, copies))

    def lend(self) -> None:
        """The copy is not needed any more. Its memory costs nothing to use again unless the system has taken it."""
        if self._mapping is not None and hasattr(mmap, "MADV_FREE"):
            self._mapping.madvise(mmap.MADV_FREE)

    def _prepared(self, num_bytes: int, *, is_pinned: bool) -> NDArray[np.uint8]:
        if self._memory is None or len(self._memory) < num_bytes or is_pinned == (self._mapping is not None):
            self._memory = self._mapping = None  # before there is more: one copy at a time
            if is_pinned:
                self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            else:
                # Not from malloc: what is freed is the system's again, and can be lent to it.
                private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
                self._mapping = mmap.mmap(-1, max(num_bytes, 1), **private)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    # Copying to it, lending it and writing from it then take half as long.
                    self._mapping.madvise(mmap.MADV_HUGEPAGE)
                self._memory = np.frombuffer(self._mapping, dtype=np.uint8)
        return self._memory


def _copy(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    """Each second into the first, in as many threads as torch may use: one alone does not use all of the memory's
    speed."""
    stretches = [
        (place[start : start + _STRETCH_BYTES], source[start : start + _STRETCH_BYTES])
        for place, source in pairs
        for start in range(0, len(place), _STRETCH_BYTES)
    ]
    num_bytes = sum(len(place) for place, _ in pairs)
    num_threads = min(torch.get_num_threads(), 1 + num_bytes // _MIN_BYTES_OF_THREAD, _MAX_THREADS)

    def copy(first: int) -> None:
        for place, source in stretches[first::num_threads]:
            np.copyto(place, source)

    others = [threading.Thread(target=copy, args=(number,), daemon=True) for number in range(1, num_threads)]
    for thread in others:
        thread.start()
    copy(0)
    for thread in others:
        thread.join()


def _note(tensor: Tensor, storages: dict[_Key, torch.UntypedStorage]) -> Tensor:
    if _is_dense(tensor):
        storage = tensor.untyped_storage()
        storages[_key_of(storage)] = storage
    return tensor


def _copied(tensor: Tensor, copies: dict[_Key, torch.UntypedStorage]) -> Tensor:
    if tensor.is_meta:  # a placeholder
        return tensor
    if not _is_dense(tensor):
        return tensor.detach().cpu().clone()
    storage = copies[_key_of(tensor.untyped_storage())]
    copy = torch.empty(0, dtype=tensor.dtype)
    copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    # Views that conjugate or negate on reading are stored as such.
    copy = copy.conj() if tensor.is_conj() else copy
    return build_negative_view(copy) if tensor.is_neg() else copy


def _is_dense(tensor: Tensor) -> bool:
    """It is all in its storage."""
    is_there = not tensor.is_meta
    return (
        is_there
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() > 0
    )


def _key_of(storage: torch.UntypedStorage) -> _Key:
    return storage.device, storage.data_ptr(), storage.nbytes()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """In the containers that `format.plain` leaves."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {key: _map_tensors(item, function) for key, item in value.items()}
        if type(value) is dict:
            return items
        same = type(value)(items)
        if isinstance(same, OrderedDict):
            vars(same).update(vars(value))
        return same
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return bytearray(value) if isinstance(value, bytearray) else value
