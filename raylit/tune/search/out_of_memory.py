"""Out-of-memory errors, and a memory limit that stands in for a device's. Driver and worker."""

import re
import traceback
from collections.abc import Callable, Iterator
from typing import Literal

from raylit.accelerators import Accelerator
from raylit.callbacks.base import Callback
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError, RemoteTraceback, WorkerDied, drop_hidden_frames

FailureKind = Literal["too large", "crashed"]

_MEMORY_ERRORS = re.compile(
    # Errors of devices and of the allocator of CPU tensors; then of DataLoader's processes and mappings.
    r"out of memory|RESOURCE_EXHAUSTED|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc"
    r"|insufficient shared memory|killed by signal: Killed",
    re.IGNORECASE,
)


def classify_failure(error: BaseException, accelerator: Accelerator) -> FailureKind | None:
    """Return whether a trial needs too much memory or has crashed its worker or device, by its exception.

    Returns None for an error that every trial would raise.
    """
    chain = list(_iterate_causes(error))
    if any(is_out_of_memory(each, accelerator) for each in chain):
        return "too large"
    return "crashed" if any(_is_crash(each, accelerator) for each in chain) else None


def is_out_of_memory(error: BaseException, accelerator: Accelerator) -> bool:
    """Return whether an exception reports a lack of memory."""
    if isinstance(error, MemoryError) or accelerator.is_out_of_memory(error):
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
        self._lift_limit: Callable[[], None] | None = None

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._lift_limit = trainer.accelerator.limit_memory(self._num_bytes)

    def teardown(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        self._remove_limit()

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_limit()

    def _remove_limit(self) -> None:
        lift_limit, self._lift_limit = self._lift_limit, None
        if lift_limit is not None:
            lift_limit()


def check_limit(num_bytes: int | None, *, accelerator: Accelerator) -> None:
    """Check a memory limit.

    Raises:
        ConfigError: it is no number of bytes, or cannot be enforced on this system.
    """
    if num_bytes is None:
        return
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 1:
        raise ConfigError(f"memory_limit_bytes={num_bytes!r}: must be a number of bytes")
    accelerator.check_memory_limit()


def drop_tracebacks(error: BaseException) -> BaseException:
    """Remove the frames from an exception, whose variables hold a failed step's tensors, and keep them as text."""
    if error.__cause__ is None:
        user_frames = drop_hidden_frames(error.__traceback__) or error.__traceback__
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


def _is_crash(error: BaseException, accelerator: Accelerator) -> bool:
    return isinstance(error, WorkerDied) or accelerator.is_device_failure(error)
