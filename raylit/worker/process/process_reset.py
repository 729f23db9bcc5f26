"""ProcessState: what a run may change in its process, put back before the next run. Worker."""

import gc
import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from raylit.compat.torch_dynamo import reset_compiler
from raylit.compat.torch_module import has_global_hooks
from raylit.protocol.process_settings import ProcessSettings, TorchSettings, files_of_user_modules, take_over_variables


class ProcessState:
    """A worker's process as it was before its first run."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._process_settings = ProcessSettings.current()
        self._threads = set(threading.enumerate())
        self._modules = set(sys.modules)
        self._import_path = list(sys.path)
        self._settings = TorchSettings.current()
        self._num_threads = torch.get_num_threads()
        self._user_files: dict[str, tuple[str, float]] = {}
        """Path and time of the last change, by module."""
        _set_apart()

    def restore(self, module: "weakref.ref[Any]") -> tuple[str, ...]:
        """Undo what can be undone; names what is left of the run: of its module, threads, processes, device memory."""
        take_over_variables({**dict.fromkeys(os.environ), **self._environment})
        self._process_settings.apply()
        self._settings.apply()
        torch.set_num_threads(self._num_threads)
        torch.set_grad_enabled(True)
        torch.autograd.set_detect_anomaly(False)
        # Compiled code of a run would count against the next one's, whose functions may be the same.
        reset_compiler()
        self._note_user_modules()
        sys.path[:] = self._import_path
        # An exception's traceback may hold the run's last frames.
        sys.last_value = sys.last_traceback = None
        gc.collect()
        if module() is not None:
            gc.collect()  # what a graph's nodes, which are C++ objects, have held until the first
        gc.freeze()
        return tuple(self._leftovers(module))

    def changed_modules(self, files_in_driver: Mapping[str, str]) -> tuple[str, ...]:
        """The user's modules whose files have changed since a run imported them, or that are others in the driver now:
        a new process would see them as they are now. They are not imported anew here, as what they have registered
        with torch would clash with itself."""
        return (
            *(
                f"the module {name}, whose file has changed"
                for name, (path, modified) in self._user_files.items()
                if _modified(path) != modified
            ),
            *(
                f"the module {name}, which is that of another directory in the driver"
                for name, (path, _) in self._user_files.items()
                if os.path.realpath(files_in_driver.get(name, path)) != os.path.realpath(path)
            ),
        )

    def _note_user_modules(self) -> None:
        new = set(sys.modules) - self._modules - set(self._user_files)
        for name, path in files_of_user_modules({name: sys.modules[name] for name in new}).items():
            self._user_files[name] = (path, _modified(path))

    def _leftovers(self, module: "weakref.ref[Any]") -> list[str]:
        left = []
        if module() is not None:
            left.append(f"the module {type(module()).__name__}, which something still refers to")
        left += [
            f"the thread {thread.name}"
            for thread in threading.enumerate()
            if thread not in self._threads and not _is_of_the_process(thread)
        ]
        left += [f"the process {child.name}" for child in multiprocessing.active_children()]
        if has_global_hooks():
            left.append("global hooks of torch.nn")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            if torch.cuda.memory_allocated() > 0:
                left.append(f"{torch.cuda.memory_allocated()} bytes of device memory")
        return left


def _set_apart() -> None:
    """What a process has imported stays as long as it does: no collection of later garbage need look at it, which takes
    0.1 s with torch's modules, at the end of each run and now and then in a step."""
    gc.collect()
    gc.freeze()


def _is_of_the_process(thread: threading.Thread) -> bool:
    """Autograd's threads show up when they call Python, asyncio's belong to the actor, and the process's first executor
    is the one in which Ray runs the actor's stream of reports. tqdm, which torch's compiler uses too, has one that
    looks after all bars."""
    return thread.name.startswith(("Dummy-", "asyncio_", "ThreadPoolExecutor-0_", "tqdm_monitor"))


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
