"""Out-of-memory errors, and a memory limit that stands in for a device's. Driver and worker."""

import contextlib
import re
import resource
import traceback
from collections.abc import Iterator
from typing import Any, Literal

import torch

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError, RemoteTraceback, WorkerDied, without_hidden

FailureKind = Literal["too large", "crashed"]

_MEMORY_ERRORS = re.compile(
    # Errors of CUDA, HIP, MPS, NCCL, XLA and the allocator of CPU tensors; then of DataLoader's processes and mappings.
    r"out of memory|RESOURCE_EXHAUSTED|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc"
    r"|insufficient shared memory|killed by signal: Killed"
    # CUDA's libraries: some only report that they could not start, or found no algorithm, for lack of memory.
    r"|(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_(ALLOC_FAILED|INSUFFICIENT_RESOURCES)|CUFFT_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|CUDNN_STATUS_NOT_SUPPORTED|unable to find an engine",
    re.IGNORECASE,
)
_DEVICE_ERRORS = re.compile(r"(CUDA|HIP|NCCL|CUDA driver) error|(CUBLAS|CUDNN)_STATUS_|device-side assert")


def classify_failure(error: BaseException) -> FailureKind | None:
    """Return whether a trial needs too much memory or has crashed its worker or device, by its exception.

    Returns None for an error that every trial would raise.
    """
    chain = list(_iterate_causes(error))
    if any(is_out_of_memory(each) for each in chain):
        return "too large"
    return "crashed" if any(_is_crash(each) for each in chain) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports a lack of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, WorkerDied):
        # "Out of memory?" with a question mark is raylit's own guess.
        return "memory" in error.reason.replace("out of memory?", "")
    return isinstance(error, (RuntimeError, OSError)) and bool(_MEMORY_ERRORS.search(str(error)))


class MemoryLimit(Callback):
    """Callback that limits the memory which each worker's training allocates. On every worker.

    The limit comes on top of what the process, or its GPU, has in use when training starts: data and weights. A
    larger allocation fails as it does when memory has run out.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._before: tuple[int, int] | None = None
        self._device: torch.device | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        device: torch.device = pl_module.device
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            share = (torch.cuda.memory_allocated(device) + self._num_bytes) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
            self._device = device
        else:
            self._before = resource.getrlimit(resource.RLIMIT_DATA)
            limit, hard = _read_data_bytes() + self._num_bytes, self._before[1]
            resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._remove_limit()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._remove_limit()

    def _remove_limit(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)
        device, self._device = self._device, None
        if device is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_limit(num_bytes: int | None, *, is_on_cpu: bool) -> None:
    """Check a memory limit.

    Raises:
        ConfigError: it is no number of bytes, or cannot be enforced on this system.
    """
    if num_bytes is None:
        return
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 1:
        raise ConfigError(f"memory_limit_bytes={num_bytes!r}: must be a number of bytes")
    if is_on_cpu and not _read_data_bytes():
        raise ConfigError("memory_limit_bytes on a CPU needs Linux, whose /proc tells what a process has")


def drop_tracebacks(error: BaseException) -> BaseException:
    """Remove the frames from an exception, whose variables hold a failed step's tensors, and keep them as text."""
    if error.__cause__ is None:
        user_frames = without_hidden(error.__traceback__) or error.__traceback__
        error.__cause__ = RemoteTraceback("".join(traceback.format_exception(type(error), error, user_frames)))
    for each in _iterate_causes(error):
        each.__traceback__ = None
        # An exception that was being handled explains no more than the cause does.
        each.__context__ = None
    return error


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception and its chain of explicit causes."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _is_crash(error: BaseException) -> bool:
    if isinstance(error, WorkerDied):
        return True
    return isinstance(error, RuntimeError) and bool(_DEVICE_ERRORS.search(str(error)))


def _read_data_bytes() -> int:
    """Return the bytes that count for RLIMIT_DATA: heap and private mappings. 0 if the kernel does not report them."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)
    return 0
