"""Classes and functions of the user's script in processes whose `__main__` is another module.

A script's classes belong to the module `__main__`. cloudpickle sends them to a Ray worker by value, but in the worker
`__main__` is Ray's module, and `pickle`, by which a DataLoader and its processes exchange data sets and batches, looks
classes up there by name. raylit therefore adds them to the worker's `__main__` for the duration of a run, and sends
them by value again to DataLoader processes that are spawned. The driver collects them; workers and the processes of
their DataLoaders use them.
"""

import io
import multiprocessing
import pickle
import sys
from collections import ChainMap
from collections.abc import Mapping
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any, ClassVar

import cloudpickle
from torch.utils.data import DataLoader

ScriptObjects = dict[str, Any]
"""Classes and functions of the user's script, by their names there."""

_MISSING = object()


def add_script_object(objects: ScriptObjects, obj: Any) -> None:
    """Add a class or function defined at the top level of the user's script; for a nested class the outer one."""
    if not isinstance(obj, (type, FunctionType)) or obj.__module__ != "__main__" or "<locals>" in obj.__qualname__:
        return
    name, _, inner = obj.__qualname__.partition(".")
    if not inner:
        objects[name] = obj
    elif isinstance(obj, type):
        objects.setdefault(name, getattr(sys.modules["__main__"], name, obj))


class ScriptModule:
    """Adds the user's classes and functions to this process's `__main__` until `restore`."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        namespace = vars(sys.modules["__main__"])
        self._previous = {name: namespace.get(name, _MISSING) for name in objects}
        namespace.update(objects)

    def restore(self) -> None:
        """Restore `__main__` to what it was before."""
        namespace = vars(sys.modules["__main__"])
        for name, previous in self._previous.items():
            if previous is _MISSING:
                namespace.pop(name, None)
            else:
                namespace[name] = previous
        self._previous = {}


def send_script_objects(loader: Any) -> None:
    """Send the script's classes by value to the processes that a DataLoader will spawn."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return
    context = loader.multiprocessing_context or multiprocessing.get_context()
    kind = _CONTEXTS.get(context.get_start_method())
    if kind is not None:
        loader.multiprocessing_context = kind()


class _Pickler(cloudpickle.Pickler):
    """Pickler that sends the script's objects by value, and tensors, queues and locks as `multiprocessing` does."""

    # A class attribute, because the pickler reads it before `__init__` could set one.
    dispatch_table: ClassVar[Any] = ChainMap(
        ForkingPickler(io.BytesIO()).dispatch_table, cloudpickle.Pickler.dispatch_table
    )

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.objects: ScriptObjects = {}

    def reducer_override(self, obj: Any) -> Any:
        add_script_object(self.objects, obj)
        return super().reducer_override(obj)


def _reduce_process(process: Any) -> tuple[Any, tuple[Any, ...]]:
    """Pickle a process that is about to be started."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(dict(vars(process)))
    pickler.dump(pickler.objects)
    return _rebuild_process, (type(process), file.getvalue())


def _rebuild_process(kind: type, data: bytes) -> Any:
    """Unpickle the process inside the started process, after its script objects."""
    file = io.BytesIO(data)
    unpickler = pickle.Unpickler(file)
    attributes, objects = unpickler.load(), unpickler.load()
    ScriptModule(objects)
    process: Any = object.__new__(kind)
    vars(process).update(attributes)
    return process


class _ScriptSpawnProcess(SpawnProcess):
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _reduce_process(self)


class _ScriptForkServerProcess(ForkServerProcess):
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _reduce_process(self)


class _ScriptSpawnContext(SpawnContext):
    Process = _ScriptSpawnProcess


class _ScriptForkServerContext(ForkServerContext):
    Process = _ScriptForkServerProcess


_CONTEXTS: dict[str, type[BaseContext]] = {"spawn": _ScriptSpawnContext, "forkserver": _ScriptForkServerContext}
