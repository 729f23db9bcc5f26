"""ProcessState: what a run may change in its process, put back before the next run. Worker."""

import gc
import multiprocessing
import os
import sys
import sysconfig
import threading
import weakref
from typing import Any

import torch


class ProcessState:
    """A worker's process as it was before its first run."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._threads = set(threading.enumerate())
        self._modules = set(sys.modules)
        self._import_path = list(sys.path)
        self._dtype = torch.get_default_dtype()
        self._num_threads = torch.get_num_threads()
        self._directory = os.getcwd()
        self._library = tuple(
            {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sys.prefix, sys.base_prefix}
        )

    def restore(self, module: "weakref.ref[Any]") -> tuple[str, ...]:
        """Undo what can be undone; names what is left of the run: of its module, threads, processes, device memory."""
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._directory)
        torch.set_default_dtype(self._dtype)
        torch.set_num_threads(self._num_threads)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.autograd.set_detect_anomaly(False)
        self._forget_user_modules()
        sys.path[:] = self._import_path
        # An exception's traceback may hold the run's last frames.
        sys.last_value = sys.last_traceback = None
        gc.collect()
        return tuple(self._leftovers(module))

    def _forget_user_modules(self) -> None:
        """The user's files may have changed before the next run, which is to see them as a new process would."""
        for name in set(sys.modules) - self._modules:
            path = getattr(sys.modules[name], "__file__", None)
            if path is not None and not path.startswith(self._library):
                del sys.modules[name]

    def _leftovers(self, module: "weakref.ref[Any]") -> list[str]:
        left = []
        if module() is not None:
            left.append(f"the module {type(module()).__name__}, which something still refers to")
        left += [
            f"the thread {thread.name}"
            for thread in threading.enumerate()
            if thread not in self._threads and not _is_torchs_own(thread)
        ]
        left += [f"the process {child.name}" for child in multiprocessing.active_children()]
        hooks = torch.nn.modules.module
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks:
            left.append("global hooks of torch.nn")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            if torch.cuda.memory_allocated() > 0:
                left.append(f"{torch.cuda.memory_allocated()} bytes of device memory")
        return left


def _is_torchs_own(thread: threading.Thread) -> bool:
    return thread.name.startswith(("Thread-", "QueueFeederThread", "Dummy", "asyncio_", "ThreadPoolExecutor"))
