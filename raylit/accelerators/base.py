"""Accelerator: the interface between raylit and one kind of device. Driver and worker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raylit.errors import ConfigError


class Accelerator(ABC):
    """One kind of device. A subclass is all that raylit needs to know of it; `register_accelerator` gives it a name.

    The Trainer makes one in the driver and puts it into the Plan, in which it is pickled to every worker. So it holds
    plain values only, and two of the same class and values are equal: their workers can be used again. Nothing here
    is called in a step, but for `after_step` where a subclass has one.
    """

    name: str
    """As in `Trainer(accelerator=...)` and in messages; the device's random state has this key in checkpoints."""
    collective_backend: str
    """What `torch.distributed.init_process_group` takes. CPU tensors travel too: "cpu:gloo,cuda:nccl"."""
    resources: Mapping[str, float] = {}
    """What a worker asks Ray for besides CPUs, unless `resources_per_worker` says otherwise: {"GPU": 1.0}."""
    is_host: bool = False
    """The device is the host itself: without a word of workers the driver's process trains, on its own."""
    is_automatic: bool = False
    """`accelerator="auto"` takes it where it is available."""
    has_copy_streams: bool = False
    """Copies run beside kernels: batches travel on a stream of their own, checkpoints into pinned memory. The module
    `torch.get_device_module(device)` has Stream, stream and current_stream."""

    # Driver: what there is

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this process could use such a device. The driver asks before a run in its own process or on its own
        machine; a cluster may have what the driver's machine lacks."""

    def explain_unavailable(self) -> str:
        """The ConfigError's text where a run needs a device here and `is_available` is False."""
        return (
            f"accelerator={self.name!r} is asked for, but this machine has no such device: use accelerator='cpu' with "
            "num_workers, or connect to a cluster that has some (ray.init(address=...) or RAY_ADDRESS)"
        )

    @abstractmethod
    def num_devices(self) -> int:
        """How many workers this machine can have: `devices=-1`, and the default where `is_host` is False."""

    # Worker: the process and its device

    @abstractmethod
    def device(self) -> torch.device:
        """The device of this process, on which the module and its batches are put. Its type is autocast's, too."""

    def set_up(self, *, num_threads: int | None) -> None:
        """Prepare this process, once in each run and before tensors move. `num_threads`: CPU threads for torch; None:
        leave them."""
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def seed(self, seed: int) -> None:
        """Seed the device's generator where `torch.manual_seed`, which has been called before, does not."""

    def random_state(self) -> Any | None:
        """The state of the device's generator, as a CPU tensor or plain values, for checkpoints and for the loops,
        which put it back after what is not part of the training. None: there is none, or it has not been used."""
        return None

    def set_random_state(self, state: Any) -> None:
        """Continue from a `random_state`, perhaps of another process."""
        raise NotImplementedError(f"{type(self).__name__} has a random_state, but no set_random_state")

    def synchronize(self) -> None:
        """Wait until the device has done all it was given: before a time is taken or a copy on the host is read."""

    def after_step(self) -> None:
        """Called after each optimizer step of a class that overrides it, such as for XLA's mark_step. Else nothing is
        called at all."""

    # Worker: memory

    def memory_stats(self) -> Mapping[str, float]:
        """What DeviceStatsMonitor logs of the device."""
        return {}

    def reset_peak_memory(self) -> None:
        """Begin to measure `peak_memory_bytes` anew: a profiler does, at a stage's start."""

    def peak_memory_bytes(self) -> int | None:
        """The most memory of the device that this process has had in use, for a profiler's report. None: not known."""
        return None

    def allocated_bytes(self) -> int:
        """Memory of the device that this process has in use: between two runs of a worker, what a run has left."""
        return 0

    def empty_cache(self) -> None:
        """Give back the device's memory that no tensor is in: between runs, and after a trial that failed."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the device was out of memory, as the search for a batch size asks of a trial's error."""
        return isinstance(error, torch.OutOfMemoryError)

    def is_device_failure(self, error: BaseException) -> bool:
        """Whether the device or its libraries failed, so that the search tries no such batch again."""
        return False

    def check_memory_limit(self) -> None:
        """Called in the driver before `limit_memory` is in the workers. ConfigError: there can be no limit here."""
        raise ConfigError(f"memory_limit_bytes: the memory of accelerator={self.name!r} cannot be limited")

    def limit_memory(self, num_bytes: int) -> Callable[[], None]:
        """Have allocations fail that go beyond `num_bytes` more than this process has now, as they do where there is no
        more; returns what lifts the limit."""
        raise NotImplementedError(f"{type(self).__name__} cannot limit memory")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(type(self))
