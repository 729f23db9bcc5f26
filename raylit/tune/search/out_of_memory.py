"""Memory: what running out of it looks like, and a limit that stands in for a device's. Driver and worker."""

import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

from raylit.accelerators import Accelerator
from raylit.callbacks.base import Callback
from raylit.errors import ConfigError, RemoteTraceback, WorkerDied, drop_hidden_frames

Verdict = Literal["too large", "crashed"]

_OF_MEMORY = re.compile(
    # Devices and the allocator of CPU tensors; then DataLoader's processes and mappings.
    r"out of memory|RESOURCE_EXHAUSTED|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc"
    r"|insufficient shared memory|killed by signal: Killed",
    re.IGNORECASE,
)


def classify_failure(error: BaseException, accelerator: Accelerator) -> Verdict | None:
    """What an exception says of a trial: it needs too much memory, or it has crashed its worker or the device. None: it
    is a mistake that every trial would make."""
    chain = list(_chain(error))
    if any(is_out_of_memory(each, accelerator) for each in chain):
        return "too large"
    return "crashed" if any(_is_crash(each, accelerator) for each in chain) else None


def is_out_of_memory(error: BaseException, accelerator: Accelerator) -> bool:
    if isinstance(error, MemoryError) or accelerator.is_out_of_memory(error):
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
        self._lift_limit: Callable[[], None] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._lift_limit = trainer.accelerator.limit_memory(self._num_bytes)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._lift()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._lift()

    def _lift(self) -> None:
        lift_limit, self._lift_limit = self._lift_limit, None
        if lift_limit is not None:
            lift_limit()


def check_limit(num_bytes: int | None, *, accelerator: Accelerator) -> None:
    if num_bytes is None:
        return
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 1:
        raise ConfigError(f"memory_limit_bytes={num_bytes!r}: must be a number of bytes")
    accelerator.check_memory_limit()


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


def _is_crash(error: BaseException, accelerator: Accelerator) -> bool:
    return isinstance(error, WorkerDied) or accelerator.is_device_failure(error)
