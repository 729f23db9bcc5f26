"""The job as it is sent to the workers: pickled by value, large tensors through Ray's object store."""

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

from raylit.config.plan import Plan
from raylit.core.datamodule import DataModule
from raylit.errors import ConfigError, ModuleError
from raylit.worker.data.script_objects import ScriptObjects, add_script_object
from raylit.worker.data.shared_memory import SharedMemory
from raylit.worker.job import Job


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """A dense CPU tensor's bytes."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(message: Any) -> Any:
    """The message with the plain CPU tensors of its dicts, lists and tuples packed."""
    return _mapped(message, _pack)


def unpack(message: Any, *, is_copying: bool = False) -> Any:
    """The message with its tensors again. Without `is_copying` they are views of memory that other processes share:
    copy from them, never write to them."""
    return _mapped(message, _unpack_copy if is_copying else _unpack)


def _pack(leaf: Any) -> Any:
    is_dense = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided
    if not is_dense or type(leaf) is not Tensor or leaf.requires_grad:
        return leaf
    contiguous = leaf.contiguous()
    return _Packed(contiguous.reshape(-1).view(torch.uint8).numpy(), leaf.dtype, tuple(leaf.shape))


def _unpack(leaf: Any) -> Any:
    if not isinstance(leaf, _Packed):
        return leaf
    if leaf.data.flags.writeable:
        return torch.from_numpy(leaf.data).view(leaf.dtype).reshape(leaf.shape)
    with warnings.catch_warnings():
        # torch warns once of memory that it cannot mark as read-only; nothing of ours writes to it.
        warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
        return torch.from_numpy(leaf.data).view(leaf.dtype).reshape(leaf.shape)


def _unpack_copy(leaf: Any) -> Any:
    return _unpack(leaf).clone() if isinstance(leaf, _Packed) else leaf


def _mapped(value: Any, function: Any) -> Any:
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        for_copy = value.copy()
        for key, item in value.items():
            for_copy[key] = _mapped(item, function)
        return for_copy
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)
    if dataclasses.is_dataclass(value) and type(value).__module__ == "raylit.protocol.messages":
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: _mapped(getattr(value, name), function) for name in names}
        return dataclasses.replace(value, **changed)  # type: ignore[type-var]
    return function(value)


_MIN_SHARED_BYTES = 64 * 1024
"""Of one array, or of a collection of smaller ones in the data."""
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SerializedJob:
    """A pickled Job. The buffers are views of the user's memory until Ray's store has copied them."""

    pickled: NDArray[np.uint8]
    buffers: list[NDArray[np.uint8]]
    places: NDArray[np.int64]
    """For each pickled array its buffer, and where in it the array starts and ends: small ones share a buffer."""

    @property
    def num_bytes(self) -> int:
        return self.pickled.nbytes + sum(buffer.nbytes for buffer in self.buffers)


def pickle_job(job: Job) -> SerializedJob:
    """The user's objects as one: what they share stays shared. ModuleError: they cannot travel."""
    writable = {_key(tensor) for tensor in _written_by_training(job.module, is_top=True)}
    try:
        while True:
            file = io.BytesIO()
            pickler = _Pickler(file, writable, top=job.module)
            pickler.dump((job.module, job.datamodule, job.loaders))
            pickler.is_sharing = False
            # Refers to the above; only callbacks are new.
            pickler.dump(job)
            pickler.dump(pickler.script_objects)
            if not pickler.shared & writable:
                break
            # A module came after data that is its own weights: once more, now that they are known.
    except Exception as error:
        raise ModuleError(
            f"the module, data or callbacks cannot travel to the workers: {error}. Make what cannot be pickled (open "
            "files, locks, connections) in setup(), which runs in every worker, or use num_workers=0"
        ) from error
    pickled = np.frombuffer(file.getbuffer(), dtype=np.uint8)
    return _parcel(pickled, pickler)


def unpickle_job(parcel: SerializedJob) -> tuple[Job, SharedMemory]:
    """The Job, with its data in the shared memory."""
    memory = SharedMemory(parcel.buffers)
    views = (memory.views[index][start:stop] for index, start, stop in parcel.places.tolist())
    unpickler = pickle.Unpickler(io.BytesIO(parcel.pickled.tobytes()), buffers=views)
    unpickler.load()
    job: Job = unpickler.load()
    job.script_objects = unpickler.load()
    job.shared_memory = memory
    return job, memory


def pickle_plan(plan: Plan) -> bytes:
    """By cloudpickle, as the Job: a class of the user's script is one class in both. ConfigError: it cannot travel."""
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
    """Two dumps with one memo: the first shares data, the second copies what it is the first to meet."""

    def __init__(self, file: io.BytesIO, writable: set[int], *, top: nn.Module) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._is_in_band)
        self.is_sharing = True
        self.script_objects: ScriptObjects = {}
        self.buffers: list[NDArray[np.uint8]] = []
        self.shared: set[int] = set()
        """Storages that travel as shared ones."""
        self._top = top
        self._writable = writable
        """Storages that may not. It grows while modules are met."""
        self._storages: dict[int, _Storage] = {}
        self._collected: set[int] = set()
        """Addresses of small arrays and tensors that stand in large collections of data."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        add_script_object(self.script_objects, obj)
        if isinstance(obj, ModuleType) and kind is not ModuleType and sys.modules.get(obj.__name__) is obj:
            # Such as torch.classes: cloudpickle takes it along where a function says `self.classes`, and then fails.
            return importlib.import_module, (obj.__name__,)
        if kind is Tensor and self.is_sharing and _is_plain(obj) and self._is_worth_it(obj):
            return _tensor, (self._storage(obj), obj.dtype, obj.storage_offset(), obj.size(), obj.stride())
        if issubclass(kind, (nn.Module, nn.Parameter, torch.optim.Optimizer)) and not isinstance(obj, type):
            self._writable.update(_key(tensor) for tensor in _written_by_training(obj, is_top=obj is self._top))
        elif kind is _Storage:
            return (_copied if obj.key in self._writable else _shared), (pickle.PickleBuffer(obj.data),)
        elif isinstance(obj, (Dataset, DataLoader, DataModule)):
            for value in vars(obj).values():
                self._collected.update(_addresses_in(value))
        return super().reducer_override(obj)

    def _storage(self, tensor: Tensor) -> "_Storage":
        """One for all tensors that share it."""
        key = _key(tensor)
        if key not in self._storages:
            data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
            self._storages[key] = _Storage(key, data)
            if key not in self._writable:
                self.shared.add(key)
        return self._storages[key]

    def _is_worth_it(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() >= _MIN_SHARED_BYTES or tensor.data_ptr() in self._collected

    def _is_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        data = np.frombuffer(buffer.raw(), dtype=np.uint8)
        storage = self._storages.get(address := data.__array_interface__["data"][0])
        is_weights = storage is None and address in self._writable
        is_small = data.nbytes < _MIN_SHARED_BYTES and address not in self._collected
        if not self.is_sharing or is_small or is_weights:
            return True
        self.buffers.append(data)
        return False


def _parcel(pickled: NDArray[np.uint8], pickler: _Pickler) -> SerializedJob:
    buffers: list[NDArray[np.uint8]] = []
    places: list[tuple[int, int, int]] = []
    small: list[NDArray[np.uint8]] = []
    size = 0
    for data in pickler.buffers:
        if data.nbytes >= _MIN_SHARED_BYTES:
            places.append((len(buffers), 0, data.nbytes))
            buffers.append(data)
        else:
            places.append((-1, size, size + data.nbytes))  # the last buffer
            small += [data, np.zeros(-data.nbytes % _ALIGNMENT, dtype=np.uint8)]
            size += data.nbytes + small[-1].nbytes
    if small:
        buffers.append(np.concatenate(small))
    return SerializedJob(pickled=pickled, buffers=buffers, places=np.array(places, dtype=np.int64).reshape(-1, 3))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """A tensor's storage, to be pickled once."""

    key: int
    data: NDArray[np.uint8]


def _is_plain(tensor: Tensor) -> bool:
    """A dense tensor whose bytes are all there is to it; not in torch's shared memory, which somebody means to write
    to."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or vars(tensor))
        and tensor.untyped_storage().nbytes() > 0
        and not tensor.is_shared()
    )


def _addresses_in(collection: Any) -> list[int]:
    """Of the arrays and tensors in a list, tuple or dict of them, or of tuples of them, if they are large together."""
    if type(collection) not in (list, tuple, dict) or not collection:
        return []
    items = collection.values() if isinstance(collection, dict) else collection
    if not isinstance(next(iter(items)), (Tensor, np.ndarray, list, tuple, dict)):
        return []
    arrays = list(_arrays_in(items, depth=2))
    if sum(array.nbytes for array in arrays) < _MIN_SHARED_BYTES:
        return []
    return [array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data for array in arrays]


def _arrays_in(items: Iterable[Any], *, depth: int) -> Iterator[Tensor | NDArray[Any]]:
    for item in items:
        if type(item) in (Tensor, np.ndarray):
            yield item
        elif depth > 0 and type(item) in (list, tuple, dict):
            yield from _arrays_in(item.values() if isinstance(item, dict) else item, depth=depth - 1)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written_by_training(owner: Any, *, is_top: bool) -> Iterator[Tensor]:
    """Strided CPU tensors that training may write to. The user's own module also has data: `is_top`."""
    if isinstance(owner, nn.Module):
        candidates: list[Any] = [*owner.parameters(), *owner.buffers()]
        # Metrics keep their state in plain attributes.
        candidates += [list(vars(child).values()) for child in owner.modules() if not (is_top and child is owner)]
    elif isinstance(owner, torch.optim.Optimizer):
        candidates = [value for state in owner.state.values() for value in state.values()]
    else:
        candidates = [owner]
    for tensor in _tensors_of(candidates, depth=4):
        is_lazy = nn.parameter.is_lazy(tensor)  # without memory before the first batch
        if not is_lazy and tensor.layout is torch.strided and tensor.device.type == "cpu":
            yield tensor


def _tensors_of(value: Any, *, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_of(item, depth=depth - 1)


def _tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: torch.Size, stride: tuple[int, ...]
) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def _shared(data: Any) -> torch.UntypedStorage:
    with warnings.catch_warnings():
        # torch cannot mark it as read-only; a write changes this process's copy alone (see SharedMemory).
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _copied(data: Any) -> torch.UntypedStorage:
    return _shared(data).clone()
