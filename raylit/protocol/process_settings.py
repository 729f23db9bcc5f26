"""Settings of the driver's process that the workers apply: torch, warnings, logging, environment variables."""

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

Filter = tuple[str, Any, str, bytes, Any, int]
"""An item of warnings.filters, with the category replaced by its top-level package and the pickled category."""
LoggerState = tuple[int, bool, bool]
"""Level, propagate, disabled."""
_REDUCED_PRECISION = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
_INITIAL = dict(os.environ)
"""Environment variables at this module's import, used if the kernel does not provide those at the process's start."""
_READ_AT_START = re.compile(
    r"(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS|NUMEXPR|VECLIB|DNNL|ONEDNN|CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|HIP|ROCR|HSA|PYTORCH|"
    r"TORCH|TRITON|LD|MALLOC|GLIBC|HF|TRANSFORMERS|PJRT|XLA|LIBTPU)_\w+|CPU_NUM_DEVICES|PYTHONHASHSEED"
)
"""Variables that the dynamic linker, Python or libraries read once at start, so that live processes ignore changes."""
_READ_LATER = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "TRITON_CACHE_DIR",
    }
)
"""Variables that libraries set themselves, in the driver too, when they are imported or first used."""
_OF_THE_PROCESS = re.compile(
    r"RAY_\w+|RAYLIT_EMBEDDED_NODE|(LOCAL_|NODE_|GROUP_|)RANK|(LOCAL_|)WORLD_SIZE|MASTER_(ADDR|PORT)|"
    r"\w+_VISIBLE_(DEVICES|CHIPS|CORES)|ONEAPI_DEVICE_SELECTOR"
)
"""Variables that differ by process: Ray's, ranks and world size, and the devices that Ray has assigned."""
_OF_RAY = ("ray",)
"""Top-level names of the loggers that Ray configures in its processes itself."""
_UNTOUCHED: LoggerState = (logging.NOTSET, True, False)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchSettings:
    """Torch's global settings in a process at one moment."""

    dtype: torch.dtype
    """Default type of new floating-point tensors."""
    matmul_precision: str
    """Precision of float32 matrix products: torch.set_float32_matmul_precision."""
    float32_precisions: tuple[str, ...]
    """`fp32_precision` of each operation in `_operations`, torch's newer setting for the same and more."""
    deterministic: bool | Literal["warn"]
    is_cudnn_deterministic: bool
    benchmark: bool
    """cuDNN benchmarks its kernels and uses the fastest."""
    reduced_precision: tuple[bool, ...]
    """For each name in `_REDUCED_PRECISION`, whether half-precision products may be accumulated in that type."""
    attention: tuple[bool, ...]
    """For each kernel in `_ATTENTION`, whether scaled dot product attention may use it."""
    libraries: tuple[bool, ...]
    """Whether torch may use cuDNN and oneDNN."""
    sharing_strategy: str
    """Transport of tensors from a DataLoader's processes: torch.multiprocessing.set_sharing_strategy."""

    @classmethod
    def current(cls) -> Self:
        """Read this process's settings."""
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
        return cls(
            dtype=torch.get_default_dtype(),
            matmul_precision=torch.get_float32_matmul_precision(),
            float32_precisions=tuple(operation.fp32_precision for operation in _operations()),
            deterministic="warn" if is_deterministic and is_warning else is_deterministic,
            is_cudnn_deterministic=torch.backends.cudnn.deterministic,
            benchmark=torch.backends.cudnn.benchmark,
            reduced_precision=tuple(getattr(torch.backends.cuda.matmul, name) for name in _REDUCED_PRECISION),
            attention=tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION),
            libraries=tuple(library.enabled for library in _libraries()),
            sharing_strategy=torch.multiprocessing.get_sharing_strategy(),
        )

    def apply(self) -> None:
        """Apply the settings that differ in this process, and touch no others.

        Some settings warn when they are set, and the one for determinism imports torch's compiler, which takes seconds.
        """
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
            for name, is_allowed in zip(_REDUCED_PRECISION, self.reduced_precision, strict=True):
                setattr(torch.backends.cuda.matmul, name, is_allowed)
        if present.attention != self.attention:
            for name, is_enabled in zip(_ATTENTION, self.attention, strict=True):
                getattr(torch.backends.cuda, f"enable_{name}_sdp")(is_enabled)
        if present.libraries != self.libraries:
            for library, is_enabled in zip(_libraries(), self.libraries, strict=True):
                library.enabled = is_enabled
        if present.sharing_strategy != self.sharing_strategy:
            torch.multiprocessing.set_sharing_strategy(self.sharing_strategy)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessSettings:
    """A process's settings at one moment, besides torch's."""

    directory: str | None
    """Working directory; None if it has been removed, or is not to be changed."""
    umask: int | None
    """None if the system does not provide it."""
    locale: str
    loggers: dict[str, LoggerState]
    """States of the loggers that differ from a new one; the root's name is empty."""
    logging_disabled: int
    """Level up to which logging.disable has switched logging off."""
    warning_filters: tuple[Filter, ...]
    recursion_limit: int
    float_errors: dict[str, Any]
    """NumPy's handling of divisions by zero and similar: np.geterr()."""
    start_method: str | None
    """Start method of multiprocessing; None if it has not been chosen."""
    gc_threshold: tuple[int, int, int]
    is_gc_enabled: bool

    @classmethod
    def current(cls) -> Self:
        """Read this process's settings."""
        return cls(
            directory=current_directory(),
            umask=_read_umask(),
            locale=locale.setlocale(locale.LC_ALL),
            loggers=_read_loggers(),
            logging_disabled=logging.root.manager.disable,
            warning_filters=_pickle_warning_filters(),
            recursion_limit=sys.getrecursionlimit(),
            float_errors={**np.geterr()},
            start_method=multiprocessing.get_start_method(allow_none=True),
            gc_threshold=gc.get_threshold(),
            is_gc_enabled=gc.isenabled(),
        )

    def apply(self) -> None:
        """Apply the settings that differ in this process.

        NumPy keeps its setting per thread: call this in the thread that trains.
        """
        present = self.current()
        if self.directory is not None and self.directory != present.directory:
            # The directory may not exist on another host, or may have been removed on this one.
            with contextlib.suppress(OSError):
                os.chdir(self.directory)
        if self.umask is not None and self.umask != present.umask:
            os.umask(self.umask)
        if self.locale != present.locale:
            with contextlib.suppress(locale.Error):  # the locale is not installed on this host
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
        """Apply the warning filters whose category's package is imported in this process.

        Others are left out, so that nothing is imported for them: call this again after importing the user's modules.
        """
        filters = [
            (action, message, pickle.loads(category), module, line)
            for action, message, package, category, module, line in self.warning_filters
            if package in sys.modules
        ]
        if filters != list(warnings.filters):
            # resetwarnings also makes Python forget which warnings it has already shown.
            warnings.resetwarnings()
            warnings.filters[:] = filters  # type: ignore[index]

    def _apply_logging(self, present: Self) -> None:
        if self.logging_disabled != present.logging_disabled:
            logging.disable(self.logging_disabled)
        for name in present.loggers.keys() | self.loggers.keys():
            # Keep what an imported library has set for its own logger, unless the driver has settings for it.
            if name in self.loggers or not _belongs_to_library(name):
                level, propagate, is_disabled = self.loggers.get(name, _UNTOUCHED)
                logger = logging.getLogger(name or None)
                if level != logger.level:
                    logger.setLevel(level)
                logger.propagate, logger.disabled = propagate, is_disabled


def set_matmul_precision(precision: str) -> None:
    """Set the precision of float32 matrix products, unless it is set already."""
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)


def current_directory() -> str | None:
    """Return the working directory; None if it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def initial_environment() -> dict[str, str]:
    """Return the environment variables with which this process began, before its code changed any."""
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as file:
        entries = [entry.partition(b"=") for entry in file.read().split(b"\0")]
        variables = {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries if name}
        if "PATH" in variables:  # a process that changed its title has overwritten this memory
            return variables
    return dict(_INITIAL)


def variables_for_live_processes(
    before: Mapping[str, str], *, is_whole: bool, fixed: frozenset[str]
) -> dict[str, str | None]:
    """Return this process's variables that another, running process can apply; None for removed ones.

    Args:
        before: Variables with which the other process began, as far as this process knows them.
        is_whole: Return all variables, instead of only those that have changed.
        fixed: Names that the user has set for those processes in another way; they are left out.
    """
    names = [name for name in {**before, **os.environ} if name not in fixed and _is_live(name)]
    return {
        name: os.environ.get(name)
        for name in names
        if (is_whole and name in os.environ) or os.environ.get(name) != before.get(name)
    }


def variables_for_new_processes(before: Mapping[str, str], *, fixed: frozenset[str]) -> dict[str, str]:
    """Return the changed variables that are read when a process starts; "" for removed ones."""
    names = {**before, **os.environ}
    return {
        name: os.environ.get(name, "")
        for name in sorted(names)
        if _is_read_at_start(name) and name not in fixed and os.environ.get(name) != before.get(name)
    }


def take_over_variables(variables: Mapping[str, str | None]) -> None:
    """Set or remove environment variables of this process, including the time zone."""
    before = os.environ.get("TZ")
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if os.environ.get("TZ") != before and hasattr(time, "tzset"):
        time.tzset()


def is_installed(path: str) -> bool:
    """Return whether the path belongs to an installed library or the interpreter, which stay the same between runs."""
    parts = set(os.path.normpath(path).split(os.sep))
    return not parts.isdisjoint({"site-packages", "dist-packages"}) or path.startswith(_STANDARD_LIBRARY)


def files_of_user_modules(modules: Mapping[str, ModuleType]) -> dict[str, str]:
    """Return the modules' files by module name, without installed modules."""
    # Read from __dict__, as some modules import others on attribute access; copied, as other threads may import.
    files = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in [*modules.items()]}
    files.pop("__main__", None)
    return {name: path for name, path in files.items() if isinstance(path, str) and not is_installed(path)}


def _libraries() -> tuple[Any, ...]:
    return torch.backends.cudnn, torch.backends.mkldnn


def _operations() -> tuple[Any, ...]:
    """Return the backends with an `fp32_precision`, from general to special, as the special ones must be set last."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return (backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)


def _is_read_at_start(name: str) -> bool:
    return bool(_READ_AT_START.fullmatch(name)) and name not in _READ_LATER and not _OF_THE_PROCESS.fullmatch(name)


def _is_live(name: str) -> bool:
    return not _is_read_at_start(name) and not _OF_THE_PROCESS.fullmatch(name)


def _read_umask() -> int | None:
    """Read the umask without setting it, which other threads might notice."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), None)
    return None


def _read_loggers() -> dict[str, LoggerState]:
    loggers = {name: logger for name, logger in [*logging.root.manager.loggerDict.items()] if _is_transferred(name)}
    states = {
        name: (logger.level, logger.propagate, logger.disabled)
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger)
    }
    return {
        "": (logging.root.level, True, logging.root.disabled),
        **{name: state for name, state in states.items() if state != _UNTOUCHED},
    }


def _is_transferred(logger_name: str) -> bool:
    return logger_name.partition(".")[0] not in _OF_RAY


def _belongs_to_library(logger_name: str) -> bool:
    path = getattr(sys.modules.get(logger_name.partition(".")[0]), "__file__", None)
    return path is not None and is_installed(path)


def _pickle_warning_filters() -> tuple[Filter, ...]:
    """Return the warning filters, without those whose category cannot be pickled."""
    carried = []
    for action, message, category, module, line in warnings.filters:
        with contextlib.suppress(Exception):
            package = category.__module__.partition(".")[0]
            carried.append((action, message, package, cloudpickle.dumps(category), module, line))
    return tuple(carried)
