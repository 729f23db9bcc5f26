"""Reset of a worker's process between runs: undoes what a run may have changed."""

import gc
import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from raylit.accelerators import Accelerator
from raylit.compat.torch_core import has_global_hooks
from raylit.compat.torch_dynamo import reset_compiler
from raylit.protocol.process_settings import ProcessSettings, TorchSettings, files_of_user_modules, take_over_variables


class ProcessState:
    """State of a worker's process before its first run."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._process_settings = ProcessSettings.current()
        self._threads = set(threading.enumerate())
        self._modules = set(sys.modules)
        self._import_path = list(sys.path)
        self._settings = TorchSettings.current()
        self._num_threads = torch.get_num_threads()
        self._user_files: dict[str, tuple[str, float]] = {}
        """Path and modification time of the user's modules, by name."""
        _freeze_imported_objects()

    def restore(self, module: "weakref.ref[Any]", accelerator: Accelerator) -> tuple[str, ...]:
        """Undo what can be undone; return what is left of the run: its module, threads, processes, device memory."""
        take_over_variables({**dict.fromkeys(os.environ), **self._environment})
        self._process_settings.apply()
        self._settings.apply()
        torch.set_num_threads(self._num_threads)
        torch.set_grad_enabled(True)
        torch.autograd.set_detect_anomaly(False)
        # Compiled code of this run would count against the limit of the next one, which may use the same functions.
        reset_compiler()
        self._record_user_modules()
        sys.path[:] = self._import_path
        # An exception's traceback may refer to the run's last frames.
        sys.last_value = sys.last_traceback = None
        gc.collect()
        if module() is not None:
            gc.collect()  # frees what autograd nodes, which are C++ objects, held until the first collection
        gc.freeze()
        return tuple(self._list_leftovers(module, accelerator))

    def changed_modules(self, files_in_driver: Mapping[str, str]) -> tuple[str, ...]:
        """Return the user's modules whose files have changed since their import, or differ from the driver's.

        Only a new process can import them as they are now: importing them again here could register the same names with
        torch twice.
        """
        return (
            *(
                f"the module {name}, whose file has changed"
                for name, (path, recorded_time) in self._user_files.items()
                if _read_modification_time(path) != recorded_time
            ),
            *(
                f"the module {name}, which is that of another directory in the driver"
                for name, (path, _) in self._user_files.items()
                if os.path.realpath(files_in_driver.get(name, path)) != os.path.realpath(path)
            ),
        )

    def _record_user_modules(self) -> None:
        new = set(sys.modules) - self._modules - set(self._user_files)
        for name, path in files_of_user_modules({name: sys.modules[name] for name in new}).items():
            self._user_files[name] = (path, _read_modification_time(path))

    def _list_leftovers(self, module: "weakref.ref[Any]", accelerator: Accelerator) -> list[str]:
        leftovers = []
        if module() is not None:
            leftovers.append(f"the module {type(module()).__name__}, which something still refers to")
        leftovers += [
            f"the thread {thread.name}"
            for thread in threading.enumerate()
            if thread not in self._threads and not _is_process_thread(thread)
        ]
        leftovers += [f"the process {child.name}" for child in multiprocessing.active_children()]
        if has_global_hooks():
            leftovers.append("global hooks of torch.nn")
        accelerator.empty_cache()
        if (num_bytes := accelerator.allocated_bytes()) > 0:
            leftovers.append(f"{num_bytes} bytes of device memory")
        return leftovers


def _freeze_imported_objects() -> None:
    """Exclude imported objects, which live as long as the process, from garbage collections.

    With torch's modules a full collection takes 0.1 s, at the end of each run and now and then in a step.
    """
    gc.collect()
    gc.freeze()


def _is_process_thread(thread: threading.Thread) -> bool:
    """Return whether a thread belongs to the process rather than to a run.

    Autograd's threads appear when they call Python, asyncio's belong to the actor, and the process's first executor
    runs the actor's stream of reports for Ray. tqdm, which torch's compiler uses too, has one that monitors all bars.
    """
    return thread.name.startswith(("Dummy-", "asyncio_", "ThreadPoolExecutor-0_", "tqdm_monitor"))


def _read_modification_time(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
