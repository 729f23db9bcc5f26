"""Classes and functions of the user's script in processes whose `__main__` is another. Driver packs them, worker, and
the processes of its DataLoaders.

A script's classes belong to the module `__main__`. cloudpickle sends them to a Ray worker by value, but there the
module `__main__` is Ray's, and `pickle`, with which a DataLoader and its processes exchange data sets and batches,
looks them up in it by name. So they are put there for the time of a run; and a process that is spawned gets its
arguments by value again.
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
"""Classes and functions of the user's script, by their names in it."""

_MISSING = object()


def add_script_object(objects: ScriptObjects, obj: Any) -> None:
    """Add what is a class or function at the top of the user's script; of a class in a class the outer one."""
    if not isinstance(obj, (type, FunctionType)) or obj.__module__ != "__main__" or "<locals>" in obj.__qualname__:
        return
    name, _, inner = obj.__qualname__.partition(".")
    if not inner:
        objects[name] = obj
    elif isinstance(obj, type):
        objects.setdefault(name, getattr(sys.modules["__main__"], name, obj))


class ScriptModule:
    """The user's classes and functions in this process's `__main__`, until `restore`."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        namespace = vars(sys.modules["__main__"])
        self._before = {name: namespace.get(name, _MISSING) for name in objects}
        namespace.update(objects)

    def restore(self) -> None:
        namespace = vars(sys.modules["__main__"])
        for name, before in self._before.items():
            if before is _MISSING:
                namespace.pop(name, None)
            else:
                namespace[name] = before
        self._before = {}


def send_script_objects(loader: Any) -> None:
    """Have the processes that a DataLoader is going to spawn get the script's classes by value."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return
    context = loader.multiprocessing_context or multiprocessing.get_context()
    kind = _CONTEXTS.get(context.get_start_method())
    if kind is not None:
        loader.multiprocessing_context = kind()


class _Pickler(cloudpickle.Pickler):
    """By value what is of the script; tensors, queues and locks as `multiprocessing` sends them."""

    # Of the class: the pickler has read it before `__init__` could set another.
    dispatch_table: ClassVar[Any] = ChainMap(
        ForkingPickler(io.BytesIO()).dispatch_table, cloudpickle.Pickler.dispatch_table
    )

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.objects: ScriptObjects = {}

    def reducer_override(self, obj: Any) -> Any:
        add_script_object(self.objects, obj)
        return super().reducer_override(obj)


def _start_state(process: Any) -> tuple[Any, tuple[Any, ...]]:
    """How a process that is about to be started is pickled."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(dict(vars(process)))
    pickler.dump(pickler.objects)
    return _process, (type(process), file.getvalue())


def _process(kind: type, data: bytes) -> Any:
    """In the process that has been started."""
    file = io.BytesIO(data)
    unpickler = pickle.Unpickler(file)
    attributes, objects = unpickler.load(), unpickler.load()
    ScriptModule(objects)
    process: Any = object.__new__(kind)
    vars(process).update(attributes)
    return process


class _ScriptSpawnProcess(SpawnProcess):
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _start_state(self)


class _ScriptForkServerProcess(ForkServerProcess):
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _start_state(self)


class _ScriptSpawnContext(SpawnContext):
    Process = _ScriptSpawnProcess


class _ScriptForkServerContext(ForkServerContext):
    Process = _ScriptForkServerProcess


_CONTEXTS: dict[str, type[BaseContext]] = {"spawn": _ScriptSpawnContext, "forkserver": _ScriptForkServerContext}
