"""HostCopy: a snapshot of a state in host memory that the next snapshot reuses. Worker."""

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

from raylit.accelerators import Accelerator
from raylit.compat.torch_tensor import build_negative_view

_ALIGNMENT = 64
"""Alignment of each storage in the memory, in bytes."""
_BLOCK_BYTES = 4 * 2**20
"""Size of the blocks that the copying threads take in turn."""
_MIN_BYTES_PER_THREAD = 32 * 2**20
_MAX_THREADS = 8
"""More threads do not make memory faster."""

_StorageKey = tuple[torch.device, int, int]
"""Device, address and size in bytes of a storage."""


class HostCopy:
    """Host memory for one snapshot; between two snapshots the system may reclaim it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._memory: NDArray[np.uint8] | None = None
        self._mapping: mmap.mmap | None = None
        """The memory map below `_memory`; None if that is pinned."""

    def copy_state(self, checkpoint: Any) -> Any:
        """Return the checkpoint with its tensors copied into this memory, whatever device they are on.

        Views of one storage stay views of one storage, so that the file is the same. Overwrites the previous copy.
        Waits for the device.

        `checkpoint` consists of plain values (`format.to_plain_values`). Copying 400 MB into fresh memory takes 63 ms
        of one core, into memory that has been used before 29 ms.
        """
        storages: dict[_StorageKey, torch.UntypedStorage] = {}
        _map_tensors(checkpoint, lambda tensor: _note_storage(tensor, storages))
        starts, num_bytes = {}, 0
        for key, storage in storages.items():
            starts[key] = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            num_bytes = starts[key] + storage.nbytes()
        is_on_device = any(storage.device.type != "cpu" for storage in storages.values())
        is_pinned = is_on_device and self._accelerator.has_copy_streams
        memory = self._prepare_memory(num_bytes, is_pinned=is_pinned)
        copies, host_pairs = {}, []
        for key, storage in storages.items():
            place = memory[starts[key] : starts[key] + storage.nbytes()]
            copy = torch.from_numpy(place)
            if storage.device.type == "cpu":
                host_pairs.append((place, _view_as_bytes(storage).numpy()))
            else:
                copy.copy_(_view_as_bytes(storage), non_blocking=is_pinned)
            copies[key] = copy.untyped_storage()
        _copy_blocks(host_pairs)
        if is_on_device:
            self._accelerator.synchronize()
        return _map_tensors(checkpoint, lambda tensor: _copy_tensor(tensor, copies))

    def lend(self) -> None:
        """Let the system reclaim the memory; the copy is not needed any more.

        Using the memory again costs nothing unless the system has reclaimed it.
        """
        if self._mapping is not None and hasattr(mmap, "MADV_FREE"):
            self._mapping.madvise(mmap.MADV_FREE)

    def _prepare_memory(self, num_bytes: int, *, is_pinned: bool) -> NDArray[np.uint8]:
        if self._memory is None or len(self._memory) < num_bytes or is_pinned == (self._mapping is not None):
            self._memory = self._mapping = None  # freed before allocating, so that there are never two at once
            if is_pinned:
                self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            else:
                # Not from malloc: mapped memory is returned to the system when freed, and can be lent to it.
                private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
                self._mapping = mmap.mmap(-1, max(num_bytes, 1), **private)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    # Halves the time of copying to it, lending it and writing from it.
                    self._mapping.madvise(mmap.MADV_HUGEPAGE)
                self._memory = np.frombuffer(self._mapping, dtype=np.uint8)
        return self._memory


def _copy_blocks(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    """Copy each second array into the first.

    As many threads as torch may use copy, because one thread alone does not reach the memory's bandwidth.
    """
    stretches = [
        (place[start : start + _BLOCK_BYTES], source[start : start + _BLOCK_BYTES])
        for place, source in pairs
        for start in range(0, len(place), _BLOCK_BYTES)
    ]
    num_bytes = sum(len(place) for place, _ in pairs)
    num_threads = min(torch.get_num_threads(), 1 + num_bytes // _MIN_BYTES_PER_THREAD, _MAX_THREADS)

    def copy(first: int) -> None:
        for place, source in stretches[first::num_threads]:
            np.copyto(place, source)

    others = [threading.Thread(target=copy, args=(number,), daemon=True) for number in range(1, num_threads)]
    for thread in others:
        thread.start()
    copy(0)
    for thread in others:
        thread.join()


def _note_storage(tensor: Tensor, storages: dict[_StorageKey, torch.UntypedStorage]) -> Tensor:
    if _is_dense(tensor):
        storage = tensor.untyped_storage()
        storages[_key_of(storage)] = storage
    return tensor


def _copy_tensor(tensor: Tensor, copies: dict[_StorageKey, torch.UntypedStorage]) -> Tensor:
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
    """Return whether all the tensor's values are in its storage."""
    is_there = not tensor.is_meta
    return (
        is_there
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() > 0
    )


def _key_of(storage: torch.UntypedStorage) -> _StorageKey:
    return storage.device, storage.data_ptr(), storage.nbytes()


def _view_as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply the function to each tensor in the containers that `format.to_plain_values` produces."""
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
