"""Memory: what running out of it looks like, and a limit that stands in for a device's. Driver and worker."""

import contextlib
import re
import resource
import traceback
from collections.abc import Iterator
from typing import Any, Literal

import torch

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError, RemoteTraceback, WorkerDied, drop_hidden_frames

Verdict = Literal["too large", "crashed"]

_OF_MEMORY = re.compile(
    # CUDA, HIP, MPS, NCCL, XLA and the allocator of CPU tensors; then DataLoader's processes and mappings.
    r"out of memory|RESOURCE_EXHAUSTED|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc"
    r"|insufficient shared memory|killed by signal: Killed"
    # The libraries of CUDA: some only say that they could not start, or found no way to compute, for want of memory.
    r"|(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_(ALLOC_FAILED|INSUFFICIENT_RESOURCES)|CUFFT_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|CUDNN_STATUS_NOT_SUPPORTED|unable to find an engine",
    re.IGNORECASE,
)
_OF_THE_DEVICE = re.compile(r"(CUDA|HIP|NCCL|CUDA driver) error|(CUBLAS|CUDNN)_STATUS_|device-side assert")


def classify_failure(error: BaseException) -> Verdict | None:
    """What an exception says of a trial: it needs too much memory, or it has crashed its worker or the device. None: it
    is a mistake that every trial would make."""
    chain = list(_chain(error))
    if any(is_out_of_memory(each) for each in chain):
        return "too large"
    return "crashed" if any(_is_crash(each) for each in chain) else None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, WorkerDied):
        # "Out of memory?" with a question mark is a guess of ours.
        return "memory" in error.reason.replace("out of memory?", "")
    return isinstance(error, (RuntimeError, OSError)) and bool(_OF_MEMORY.search(str(error)))


class MemoryLimit(Callback):
    """Lets each worker's training allocate so many bytes beyond what its process, or its GPU, has in use when it
    starts: data and weights. A larger allocation fails as it does where there is no more. On every worker."""

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
            limit, hard = _data_bytes() + self._num_bytes, self._before[1]
            resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._lift()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._lift()

    def _lift(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)
        device, self._device = self._device, None
        if device is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_limit(num_bytes: int | None, *, is_on_cpu: bool) -> None:
    if num_bytes is None:
        return
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 1:
        raise ConfigError(f"memory_limit_bytes={num_bytes!r}: must be a number of bytes")
    if is_on_cpu and not _data_bytes():
        raise ConfigError("memory_limit_bytes on a CPU needs Linux, whose /proc tells what a process has")


def without_tracebacks(error: BaseException) -> BaseException:
    """The exception, but no longer the frames that it has passed, whose variables hold a failed step's tensors: a text
    tells of them."""
    if error.__cause__ is None:
        shown = drop_hidden_frames(error.__traceback__) or error.__traceback__
        error.__cause__ = RemoteTraceback("".join(traceback.format_exception(type(error), error, shown)))
    for each in _chain(error):
        each.__traceback__ = None
        # What was handled meanwhile explains nothing that the cause does not.
        each.__context__ = None
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it says that it comes from."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _is_crash(error: BaseException) -> bool:
    if isinstance(error, WorkerDied):
        return True
    return isinstance(error, RuntimeError) and bool(_OF_THE_DEVICE.search(str(error)))


def _data_bytes() -> int:
    """What the kernel holds RLIMIT_DATA against: heap and private mappings. 0 where it does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)
    return 0
