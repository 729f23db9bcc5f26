"""Serialization of the user's objects: pickled by value, large tensors through Ray's object store. Both sides."""

import dataclasses
import importlib
import io
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from raylit.config import Plan
from raylit.core.datamodule import DataModule
from raylit.errors import ConfigError, ModuleError
from raylit.worker.data.script_objects import ScriptObjects, add_script_object
from raylit.worker.data.shared_memory import SharedMemory
from raylit.worker.job import Job

_MIN_SHARED_BYTES = 64 * 1024
"""Minimum size of one array, or of a collection of smaller ones in the data, that is shared."""
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SerializedJob:
    """A pickled Job; the buffers are views of the user's memory until Ray's object store has copied them."""

    pickled: NDArray[np.uint8]
    buffers: list[NDArray[np.uint8]]
    slices: NDArray[np.int64]
    """For each pickled array its buffer and the start and end in it: small arrays share a buffer."""

    @property
    def num_bytes(self) -> int:
        return self.pickled.nbytes + sum(buffer.nbytes for buffer in self.buffers)


def pickle_job(job: Job) -> SerializedJob:
    """Pickle the user's objects as one, so that shared objects stay shared. ModuleError: they cannot be pickled."""
    writable = {_storage_key(tensor) for tensor in _find_writable_tensors(job.module, is_top=True)}
    try:
        while True:
            file = io.BytesIO()
            pickler = _Pickler(file, writable, top=job.module)
            pickler.dump((job.module, job.datamodule, job.loaders))
            pickler.is_sharing = False
            # Refers to the objects above; only callbacks are new.
            pickler.dump(job)
            pickler.dump(pickler.script_objects)
            if not pickler.shared & writable:
                break
            # A module came after data that are its own weights: pickle again, now that they are known.
    except Exception as error:
        raise ModuleError(
            f"the module, data or callbacks cannot travel to the workers: {error}. Make what cannot be pickled (open "
            "files, locks, connections) in setup(), which runs in every worker, or use num_workers=0"
        ) from error
    pickled = np.frombuffer(file.getbuffer(), dtype=np.uint8)
    return _build_serialized_job(pickled, pickler)


def unpickle_job(serialized_job: SerializedJob) -> tuple[Job, SharedMemory]:
    """Unpickle the Job, with its data in shared memory."""
    memory = SharedMemory(serialized_job.buffers)
    views = (memory.views[index][start:stop] for index, start, stop in serialized_job.slices.tolist())
    unpickler = pickle.Unpickler(io.BytesIO(serialized_job.pickled.tobytes()), buffers=views)
    unpickler.load()
    job: Job = unpickler.load()
    job.script_objects = unpickler.load()
    job.shared_memory = memory
    return job, memory


def pickle_plan(plan: Plan) -> bytes:
    """Pickle a plan with cloudpickle, like the Job, so that both refer to the same user classes.

    Raises:
        ConfigError: The strategy cannot be pickled.
    """
    try:
        return cloudpickle.dumps(plan)
    except Exception as error:
        raise ConfigError(
            f"{plan.strategy!r} cannot travel to the workers: {error}. Give it functions and classes that can be "
            "pickled, or use num_workers=0"
        ) from error


def unpickle_plan(pickled: bytes) -> Plan:
    plan: Plan = cloudpickle.loads(pickled)
    return plan


class _Pickler(cloudpickle.Pickler):
    """Pickler for two dumps with one memo: the first shares data, the second copies what it meets first."""

    def __init__(self, file: io.BytesIO, writable: set[int], *, top: nn.Module) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._keep_in_band)
        self.is_sharing = True
        self.script_objects: ScriptObjects = {}
        self.buffers: list[NDArray[np.uint8]] = []
        self.shared: set[int] = set()
        """Storages that are sent as shared memory."""
        self._top = top
        self._writable = writable
        """Storages that must be copied; more are added while modules are pickled."""
        self._storages: dict[int, _Storage] = {}
        self._collection_addresses: set[int] = set()
        """Addresses of small arrays and tensors in large collections of data."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        add_script_object(self.script_objects, obj)
        if isinstance(obj, ModuleType) and kind is not ModuleType and sys.modules.get(obj.__name__) is obj:
            # torch.classes, for example: cloudpickle adds it if a function says `self.classes`, and then fails.
            return importlib.import_module, (obj.__name__,)
        if kind is Tensor and self.is_sharing and _is_fully_described(obj) and self._is_large_enough(obj):
            return _rebuild_tensor, (self._storage(obj), obj.dtype, obj.storage_offset(), obj.size(), obj.stride())
        if issubclass(kind, (nn.Module, nn.Parameter, torch.optim.Optimizer)) and not isinstance(obj, type):
            self._writable.update(
                _storage_key(tensor) for tensor in _find_writable_tensors(obj, is_top=obj is self._top)
            )
        elif kind is _Storage:
            return (_copy_storage if obj.key in self._writable else _view_storage), (pickle.PickleBuffer(obj.data),)
        elif isinstance(obj, (Dataset, DataLoader, DataModule)):
            for value in vars(obj).values():
                self._collection_addresses.update(_find_addresses(value))
        return super().reducer_override(obj)

    def _storage(self, tensor: Tensor) -> "_Storage":
        """Return the one _Storage for all tensors that share it."""
        key = _storage_key(tensor)
        if key not in self._storages:
            data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
            self._storages[key] = _Storage(key, data)
            if key not in self._writable:
                self.shared.add(key)
        return self._storages[key]

    def _is_large_enough(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() >= _MIN_SHARED_BYTES or tensor.data_ptr() in self._collection_addresses

    def _keep_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        data = np.frombuffer(buffer.raw(), dtype=np.uint8)
        storage = self._storages.get(address := data.__array_interface__["data"][0])
        is_weights = storage is None and address in self._writable
        is_small = data.nbytes < _MIN_SHARED_BYTES and address not in self._collection_addresses
        if not self.is_sharing or is_small or is_weights:
            return True
        self.buffers.append(data)
        return False


def _build_serialized_job(pickled: NDArray[np.uint8], pickler: _Pickler) -> SerializedJob:
    buffers: list[NDArray[np.uint8]] = []
    slices: list[tuple[int, int, int]] = []
    small: list[NDArray[np.uint8]] = []
    size = 0
    for data in pickler.buffers:
        if data.nbytes >= _MIN_SHARED_BYTES:
            slices.append((len(buffers), 0, data.nbytes))
            buffers.append(data)
        else:
            slices.append((-1, size, size + data.nbytes))  # the last buffer
            small += [data, np.zeros(-data.nbytes % _ALIGNMENT, dtype=np.uint8)]
            size += data.nbytes + small[-1].nbytes
    if small:
        buffers.append(np.concatenate(small))
    return SerializedJob(pickled=pickled, buffers=buffers, slices=np.array(slices, dtype=np.int64).reshape(-1, 3))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Storage of a tensor, pickled once."""

    key: int
    data: NDArray[np.uint8]


def _is_fully_described(tensor: Tensor) -> bool:
    """Return True for a dense tensor that its bytes fully describe.

    Tensors in torch's shared memory are excluded, as other processes are meant to write to them.
    """
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or vars(tensor))
        and tensor.untyped_storage().nbytes() > 0
        and not tensor.is_shared()
    )


def _find_addresses(collection: Any) -> list[int]:
    """Return the addresses of the arrays and tensors in a collection, if they are large together.

    The collection is a list, tuple or dict of them, or of tuples of them.
    """
    if type(collection) not in (list, tuple, dict) or not collection:
        return []
    items = collection.values() if isinstance(collection, dict) else collection
    if not isinstance(next(iter(items)), (Tensor, np.ndarray, list, tuple, dict)):
        return []
    arrays = list(_iterate_arrays(items, depth=2))
    if sum(array.nbytes for array in arrays) < _MIN_SHARED_BYTES:
        return []
    return [array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data for array in arrays]


def _iterate_arrays(items: Iterable[Any], *, depth: int) -> Iterator[Tensor | NDArray[Any]]:
    for item in items:
        if type(item) in (Tensor, np.ndarray):
            yield item
        elif depth > 0 and type(item) in (list, tuple, dict):
            yield from _iterate_arrays(item.values() if isinstance(item, dict) else item, depth=depth - 1)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _find_writable_tensors(owner: Any, *, is_top: bool) -> Iterator[Tensor]:
    """Yield strided CPU tensors that training may write to; the user's own module (`is_top`) also has data."""
    if isinstance(owner, nn.Module):
        candidates: list[Any] = [*owner.parameters(), *owner.buffers()]
        # Metrics keep their state in plain attributes.
        candidates += [list(vars(child).values()) for child in owner.modules() if not (is_top and child is owner)]
    elif isinstance(owner, torch.optim.Optimizer):
        candidates = [value for state in owner.state.values() for value in state.values()]
    else:
        candidates = [owner]
    for tensor in _iterate_tensors(candidates, depth=4):
        is_lazy = nn.parameter.is_lazy(tensor)  # without memory before the first batch
        if not is_lazy and tensor.layout is torch.strided and tensor.device.type == "cpu":
            yield tensor


def _iterate_tensors(value: Any, *, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iterate_tensors(item, depth=depth - 1)


def _rebuild_tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: torch.Size, stride: tuple[int, ...]
) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def _view_storage(data: Any) -> torch.UntypedStorage:
    with warnings.catch_warnings():
        # torch cannot mark it as read-only; a write changes this process's copy only (see SharedMemory).
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _copy_storage(data: Any) -> torch.UntypedStorage:
    return _view_storage(data).clone()
