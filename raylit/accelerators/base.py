"""Accelerator: the interface between raylit and one kind of device. Driver and worker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from typing_extensions import Self

from raylit.accelerators.tpu_slices import TPUPlace
from raylit.accelerators.transfer import to_device
from raylit.errors import ConfigError


class Accelerator(ABC):
    """Interface to one kind of device; `register_accelerator` gives a subclass a name for the Trainer.

    The Trainer creates an instance in the driver. It is pickled with the Plan to every worker, so it contains plain
    values only. Instances of the same class with equal values are equal: workers of one can run a job of the other.
    In a training step nothing here is called except `after_step`, if a subclass overrides it.
    """

    name: str
    """Name in `Trainer(accelerator=...)` and in messages, and the key of the device's random state in checkpoints."""
    collective_backend: str
    """Backend for `torch.distributed.init_process_group`, for CPU tensors too: "cpu:gloo,cuda:nccl"."""
    resources: Mapping[str, float] = {}
    """Ray resources of a worker besides CPUs, unless `resources_per_worker` gives others: {"GPU": 1.0}."""
    is_host: bool = False
    """True if the device is the host itself: if no argument asks for workers, the driver's process trains."""
    is_automatic: bool = False
    """True if `accelerator="auto"` chooses it when it is available."""
    has_copy_streams: bool = False
    """True if copies run concurrently with kernels: batches are copied on a separate stream, checkpoints into pinned
    memory. The module `torch.get_device_module(device)` has Stream, stream and current_stream."""
    half_precision: Literal["16-mixed", "bf16-mixed"] = "16-mixed"
    """What `precision=16` stands for."""
    is_spmd: bool = False
    """True if one worker drives all devices of its host as one, by XLA's SPMD, which divides batches and parameters."""
    has_static_shapes: bool = False
    """True if each new shape of a batch costs a compilation: training leaves out an epoch's last, smaller batch."""
    has_storages: bool = True
    """False if the memory of tensors on the device has no address; checkpoints copy each of them to the host then."""
    is_on_tpu: bool = False
    """True if its devices are TPU chips: Ray reserves slices as a whole, ranks follow the hosts of a slice, and a chip
    serves one process at a time."""

    @property
    def is_one_graph(self) -> bool:
        """True in a worker whose compiled graph spans all ranks: they run the same steps and draw the same numbers."""
        return False

    # Driver: available devices

    @abstractmethod
    def is_available(self) -> bool:
        """Return True if this process can use such a device.

        The driver asks before a run in its own process or on its own machine. A cluster may have devices that the
        driver's machine lacks.
        """

    def explain_unavailable(self) -> str:
        """Return the text of the ConfigError for a run that needs a device here if `is_available` is False."""
        return (
            f"accelerator={self.name!r} is asked for, but this machine has no such device: use accelerator='cpu' with "
            "num_workers, or connect to a cluster that has some (ray.init(address=...) or RAY_ADDRESS)"
        )

    @abstractmethod
    def num_devices(self) -> int:
        """Return the number of workers for `devices=-1`, and the default number if `is_host` is False."""

    def check_settings(
        self, *, precision: str, num_workers: int, is_compiling: bool, is_syncing_batchnorm: bool
    ) -> None:
        """Check the Trainer's settings in the driver.

        Args:
            precision: Name of the precision, such as "bf16-mixed".
            num_workers: Number of workers; 0 for the loop in this process.
            is_compiling: The Trainer compiles the module by torch.compile.
            is_syncing_batchnorm: Batch norms compute their statistics over all ranks.

        Raises:
            ConfigError: The device cannot work with them.
        """

    # Driver: the workers' processes

    def with_storage(self, directory: str) -> Self:
        """Return this accelerator, or one that keeps files for later runs, such as compiled programs, in a directory.

        Args:
            directory: `default_root_dir` of the Trainer: a path or an fsspec URL.
        """
        return self

    def process_variables(self, place: TPUPlace | None) -> Mapping[str, str]:
        """Return the environment variables with which a worker's process must start, before it imports torch.

        Args:
            place: The worker's place in TPU slices; None outside of them, where ranks are not known yet.
        """
        return {}

    # Worker: the process and its device

    @abstractmethod
    def device(self) -> torch.device:
        """Return the device of this process, for the module and its batches. Its type is also that of autocast."""

    def set_up(self, *, num_threads: int | None) -> None:
        """Prepare this process, once in each run, before tensors are moved.

        Args:
            num_threads: CPU threads of torch; None leaves them as they are.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def seed(self, seed: int) -> None:
        """Seed the device's generator if `torch.manual_seed`, which has been called before, does not do it."""

    def random_state(self) -> Any | None:
        """Return the state of the device's generator, as a CPU tensor or plain values; None if it has not been used.

        Checkpoints contain it. The loops restore it after what does not belong to the training, such as sanity checks.
        """
        return None

    def set_random_state(self, state: Any) -> None:
        """Set the generator to a state that `random_state` returned, perhaps in another process."""
        raise NotImplementedError(f"{type(self).__name__} has a random_state, but no set_random_state")

    def synchronize(self) -> None:
        """Wait until the device has finished all its work, before a time is measured or a copy on the host is read."""

    def place_batch(self, batch: Any, *, is_same_on_all_ranks: bool = False) -> Any:
        """Return the batch on the device, without waiting for the copy; called where `has_copy_streams` is False.

        `is_same_on_all_ranks` matters where `is_one_graph`: the batch is the whole one, not this rank's part of it.
        """
        return to_device(batch, self.device())

    def after_step(self) -> None:
        """Finish an optimizer step, such as by torch_xla.sync. Only called if a subclass overrides it."""

    def after_evaluation_batch(self) -> None:
        """Finish the step of an evaluation or prediction batch, as `after_step` does for an optimizer step."""

    # Worker: memory

    def memory_stats(self) -> Mapping[str, float]:
        """Return the values that DeviceStatsMonitor logs, by name."""
        return {}

    def reset_peak_memory(self) -> None:
        """Restart the measurement of `peak_memory_bytes`, at the start of a profiled stage."""

    def peak_memory_bytes(self) -> int | None:
        """Return this process's peak memory on the device since `reset_peak_memory`; None if it is unknown."""
        return None

    def allocated_bytes(self) -> int:
        """Return the device memory that this process uses; between two runs of a worker, what a run has left."""
        return 0

    def empty_cache(self) -> None:
        """Release cached device memory that no tensor uses, between runs and after a trial that failed."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return True if the error says that the device was out of memory. The search for a batch size asks."""
        return isinstance(error, torch.OutOfMemoryError)

    def is_device_failure(self, error: BaseException) -> bool:
        """Return True if the device or its libraries failed; the batch size search then tries no larger batch."""
        return False

    def check_memory_limit(self) -> None:
        """Check in the driver that `limit_memory` can work in the workers.

        Raises:
            ConfigError: The memory of this kind of device cannot be limited here.
        """
        raise ConfigError(f"memory_limit_bytes: the memory of accelerator={self.name!r} cannot be limited")

    def limit_memory(self, num_bytes: int) -> Callable[[], None]:
        """Limit this process to its present memory and `num_bytes` more; return a function that lifts the limit."""
        raise NotImplementedError(f"{type(self).__name__} cannot limit memory")

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(type(self))
