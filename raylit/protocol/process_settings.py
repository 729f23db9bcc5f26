"""Settings of the driver's process that the workers take over: torch's switches, warnings, logging, environment."""

import contextlib
import gc
import locale
import logging
import multiprocessing
import os
import pickle
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import cloudpickle
import numpy as np
import torch
from typing_extensions import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchSettings:
    """A process's switches at one moment."""

    dtype: torch.dtype
    """Of new floating-point tensors."""
    matmul_precision: str
    """Of float32 products: torch.set_float32_matmul_precision."""
    float32_precisions: tuple[str, ...]
    """Of each operation in `_operations`: torch's newer switch for the same thing and more."""
    deterministic: bool | Literal["warn"]
    is_cudnn_deterministic: bool
    benchmark: bool
    """cuDNN tries its kernels and takes the fastest."""
    reduced_precision: tuple[bool, ...]
    """Whether products of half precision may be summed up in it, by type in `_REDUCED`."""
    attention: tuple[bool, ...]
    """Which of `_ATTENTION` scaled dot product attention may choose from."""
    libraries: tuple[bool, ...]
    """Which of cuDNN and oneDNN torch may use."""
    sharing_strategy: str
    """How tensors go from a DataLoader's processes to this one: torch.multiprocessing.set_sharing_strategy."""

    @classmethod
    def current(cls) -> Self:
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
        return cls(
            dtype=torch.get_default_dtype(),
            matmul_precision=torch.get_float32_matmul_precision(),
            float32_precisions=tuple(operation.fp32_precision for operation in _operations()),
            deterministic="warn" if is_deterministic and is_warning else is_deterministic,
            is_cudnn_deterministic=torch.backends.cudnn.deterministic,
            benchmark=torch.backends.cudnn.benchmark,
            reduced_precision=tuple(getattr(torch.backends.cuda.matmul, name) for name in _REDUCED),
            attention=tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION),
            libraries=tuple(library.enabled for library in _libraries()),
            sharing_strategy=torch.multiprocessing.get_sharing_strategy(),
        )

    def apply(self) -> None:
        """Set what is otherwise here, and nothing else: some switches warn when they are touched, and that of
        determinism imports torch's compiler, which takes seconds."""
        present = self.current()
        torch.set_default_dtype(self.dtype)
        set_matmul_precision(self.matmul_precision)
        for operation, precision in zip(_operations(), self.float32_precisions, strict=True):
            if operation.fp32_precision != precision:
                operation.fp32_precision = precision
        if present.deterministic != self.deterministic:
            torch.use_deterministic_algorithms(bool(self.deterministic), warn_only=self.deterministic == "warn")
        torch.backends.cudnn.deterministic = self.is_cudnn_deterministic
        torch.backends.cudnn.benchmark = self.benchmark
        if present.reduced_precision != self.reduced_precision:
            for name, is_allowed in zip(_REDUCED, self.reduced_precision, strict=True):
                setattr(torch.backends.cuda.matmul, name, is_allowed)
        if present.attention != self.attention:
            for name, is_enabled in zip(_ATTENTION, self.attention, strict=True):
                getattr(torch.backends.cuda, f"enable_{name}_sdp")(is_enabled)
        if present.libraries != self.libraries:
            for library, is_enabled in zip(_libraries(), self.libraries, strict=True):
                library.enabled = is_enabled
        if present.sharing_strategy != self.sharing_strategy:
            torch.multiprocessing.set_sharing_strategy(self.sharing_strategy)


_REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


def set_matmul_precision(precision: str) -> None:
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)


def _libraries() -> tuple[Any, ...]:
    return torch.backends.cudnn, torch.backends.mkldnn


def _operations() -> tuple[Any, ...]:
    """From the general to the special, which is to have the last word."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return (backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)


_INITIAL = dict(os.environ)
"""As of this module's import, where the kernel does not tell what the process began with."""
_READ_AT_START = re.compile(
    r"(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS|NUMEXPR|VECLIB|DNNL|ONEDNN|CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|HIP|ROCR|HSA|PYTORCH|"
    r"TORCH|TRITON|LD|MALLOC|GLIBC|HF|TRANSFORMERS)_\w+|PYTHONHASHSEED"
)
"""Variables that the dynamic linker, Python or a library reads once, when it starts: a live process can't follow."""
_READ_LATER = frozenset(
    {
        # Libraries set these themselves, in the driver too, when they are imported or first used.
        "CUBLAS_WORKSPACE_CONFIG",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "TRITON_CACHE_DIR",
    }
)
_OF_THE_PROCESS = re.compile(
    r"RAY_\w+|RAYLIT_EMBEDDED_NODE|(LOCAL_|NODE_|GROUP_|)RANK|(LOCAL_|)WORLD_SIZE|MASTER_(ADDR|PORT)|"
    r"\w+_VISIBLE_(DEVICES|CHIPS|CORES)|ONEAPI_DEVICE_SELECTOR"
)
"""Variables that are each process's own: of Ray, of the place in the group, of the devices that Ray has assigned."""
_OF_RAY = ("ray",)
"""Loggers that Ray sets in its processes as it needs them."""

Filter = tuple[str, Any, str, bytes, Any, int]
"""One of warnings.filters, with the top package of its category and the category itself pickled."""
LoggerState = tuple[int, bool, bool]
"""Level, propagate, disabled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessSettings:
    """A process's settings at one moment."""

    directory: str | None
    """The current one; None: it has been removed, or is not to be changed."""
    umask: int | None
    """None: this system does not tell."""
    locale: str
    loggers: dict[str, LoggerState]
    """Of those that differ from a new one; the root's name is empty."""
    logging_disabled: int
    """The level up to which logging.disable has switched it off."""
    warning_filters: tuple[Filter, ...]
    recursion_limit: int
    float_errors: dict[str, Any]
    """What NumPy does about divisions by zero and the like."""
    start_method: str | None
    """Of multiprocessing; None: nobody has chosen one."""
    gc_threshold: tuple[int, int, int]
    is_gc_enabled: bool

    @classmethod
    def current(cls) -> Self:
        return cls(
            directory=current_directory(),
            umask=_umask(),
            locale=locale.setlocale(locale.LC_ALL),
            loggers=_loggers(),
            logging_disabled=logging.root.manager.disable,
            warning_filters=_warning_filters(),
            recursion_limit=sys.getrecursionlimit(),
            float_errors={**np.geterr()},
            start_method=multiprocessing.get_start_method(allow_none=True),
            gc_threshold=gc.get_threshold(),
            is_gc_enabled=gc.isenabled(),
        )

    def apply(self) -> None:
        """Set what is otherwise here. NumPy keeps its setting by thread: to be called in the thread that trains."""
        present = self.current()
        if self.directory is not None and self.directory != present.directory:
            # It need not be there on another host, and may be gone on this one.
            with contextlib.suppress(OSError):
                os.chdir(self.directory)
        if self.umask is not None and self.umask != present.umask:
            os.umask(self.umask)
        if self.locale != present.locale:
            with contextlib.suppress(locale.Error):  # not installed on this host
                locale.setlocale(locale.LC_ALL, self.locale)
        self._apply_logging(present)
        self.apply_warning_filters()
        if self.recursion_limit != present.recursion_limit:
            sys.setrecursionlimit(self.recursion_limit)
        np.seterr(**self.float_errors)
        if self.start_method != present.start_method:
            multiprocessing.set_start_method(self.start_method, force=True)
        if self.gc_threshold != present.gc_threshold:
            gc.set_threshold(*self.gc_threshold)
        if self.is_gc_enabled != present.is_gc_enabled:
            (gc.enable if self.is_gc_enabled else gc.disable)()

    def apply_warning_filters(self) -> None:
        """Also to be called after an import of the user's modules: filters for categories of modules that this process
        has not imported are left out, so that nothing is imported for them."""
        filters = [
            (action, message, pickle.loads(category), module, line)
            for action, message, package, category, module, line in self.warning_filters
            if package in sys.modules
        ]
        if filters != list(warnings.filters):
            # It also makes Python forget which warnings it has already shown by the former filters.
            warnings.resetwarnings()
            warnings.filters[:] = filters  # type: ignore[index]

    def _apply_logging(self, present: Self) -> None:
        if self.logging_disabled != present.logging_disabled:
            logging.disable(self.logging_disabled)
        for name in present.loggers.keys() | self.loggers.keys():
            # What a library that is imported here has set for its own logger is its business, unless the driver knows.
            if name in self.loggers or not _is_of_a_library(name):
                level, propagate, is_disabled = self.loggers.get(name, _UNTOUCHED)
                logger = logging.getLogger(name or None)
                if level != logger.level:
                    logger.setLevel(level)
                logger.propagate, logger.disabled = propagate, is_disabled


_UNTOUCHED: LoggerState = (logging.NOTSET, True, False)


def current_directory() -> str | None:
    """None: it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def initial_environment() -> dict[str, str]:
    """What this process began with, before any of its code changed it."""
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as file:
        entries = [entry.partition(b"=") for entry in file.read().split(b"\0")]
        found = {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries if name}
        if "PATH" in found:  # a process that has changed its title has overwritten it
            return found
    return dict(_INITIAL)


def variables_for_live_processes(
    before: Mapping[str, str], *, is_whole: bool, fixed: frozenset[str]
) -> dict[str, str | None]:
    """This process's variables, None for those that it has removed, as another process can take them over while it
    runs. `before`: those that the other process began with, as far as this one knows. `is_whole`: all of them, else
    those alone that have changed. `fixed`: names that the user has set for those processes in another way."""
    names = [name for name in {**before, **os.environ} if name not in fixed and _is_live(name)]
    return {
        name: os.environ.get(name)
        for name in names
        if (is_whole and name in os.environ) or os.environ.get(name) != before.get(name)
    }


def variables_for_new_processes(before: Mapping[str, str], *, fixed: frozenset[str]) -> dict[str, str]:
    """The variables that have changed and are read when a process starts; "" for those that have been removed."""
    names = {**before, **os.environ}
    return {
        name: os.environ.get(name, "")
        for name in sorted(names)
        if _is_read_at_start(name) and name not in fixed and os.environ.get(name) != before.get(name)
    }


def take_over_variables(variables: Mapping[str, str | None]) -> None:
    before = os.environ.get("TZ")
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if os.environ.get("TZ") != before and hasattr(time, "tzset"):
        time.tzset()


def is_installed(path: str) -> bool:
    """A library's or the interpreter's, which nobody edits between two runs."""
    parts = set(os.path.normpath(path).split(os.sep))
    return not parts.isdisjoint({"site-packages", "dist-packages"}) or path.startswith(_STANDARD_LIBRARY)


def files_of_user_modules(modules: Mapping[str, ModuleType]) -> dict[str, str]:
    """By module name, without what is installed."""
    # Some modules import others when they are asked for an attribute; and other threads may import meanwhile.
    files = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in [*modules.items()]}
    files.pop("__main__", None)
    return {name: path for name, path in files.items() if isinstance(path, str) and not is_installed(path)}


_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def _is_read_at_start(name: str) -> bool:
    return bool(_READ_AT_START.fullmatch(name)) and name not in _READ_LATER and not _OF_THE_PROCESS.fullmatch(name)


def _is_live(name: str) -> bool:
    return not _is_read_at_start(name) and not _OF_THE_PROCESS.fullmatch(name)


def _umask() -> int | None:
    """Without setting it, which another thread might notice."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), None)
    return None


def _loggers() -> dict[str, LoggerState]:
    known = {name: logger for name, logger in [*logging.root.manager.loggerDict.items()] if _is_carried(name)}
    states = {
        name: (logger.level, logger.propagate, logger.disabled)
        for name, logger in known.items()
        if isinstance(logger, logging.Logger)
    }
    return {
        "": (logging.root.level, True, logging.root.disabled),
        **{name: state for name, state in states.items() if state != _UNTOUCHED},
    }


def _is_carried(logger_name: str) -> bool:
    return logger_name.partition(".")[0] not in _OF_RAY


def _is_of_a_library(logger_name: str) -> bool:
    path = getattr(sys.modules.get(logger_name.partition(".")[0]), "__file__", None)
    return path is not None and is_installed(path)


def _warning_filters() -> tuple[Filter, ...]:
    """Without those whose category cannot travel."""
    carried = []
    for action, message, category, module, line in warnings.filters:
        with contextlib.suppress(Exception):
            package = category.__module__.partition(".")[0]
            carried.append((action, message, package, cloudpickle.dumps(category), module, line))
    return tuple(carried)
