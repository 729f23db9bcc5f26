"""Metrics of a run for Prometheus, by Ray's own exporter: those of each worker, and the driver's goodput.

Ray's agent on each node exports them with the prefix `ray_`, where `ray[default]` is installed; elsewhere they go
nowhere. It forgets a gauge that has not been set for two of its report intervals (20 s), so the driver's heartbeat
sets the last values again.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

from ray.util.metrics import Counter, Gauge

from raylit.accelerators import Accelerator
from raylit.protocol.messages import Command, Measured, Save

DESCRIPTIONS = {
    "raylit_step_time_s": "Seconds of a training step: the mean of the last logging interval.",
    "raylit_samples_per_s": "Samples of this worker per second in the last logging interval, by the size of its last "
    "batch.",
    "raylit_data_wait_s": "Seconds of waiting for batches in a step: the mean of the last logging interval.",
    "raylit_collective_wait_s": "Seconds of a step's backward pass beyond those of the rank with the shortest: waiting "
    "for the gradients of slower ranks, without the transfer that all ranks take part in. Host time.",
    "raylit_checkpoint_time_s": "Seconds in which the last save has held up this worker: the copy of its state.",
    "raylit_host_memory_bytes": "Resident memory of the worker's process.",
    "raylit_device_memory_bytes": "Memory of tensors on the worker's device, if the accelerator tells it.",
}
"""What a worker exports: descriptions by name."""
GOODPUT, GOODPUT_DESCRIPTION = "raylit_goodput_s", "Seconds of the run's wall time by cause, up to its last pause."

_TAGS = ("rank", "run", "node")


class WorkerMetrics:
    """Gauges of one worker's process; a run's values have its tags and are set until it ends."""

    def __init__(self) -> None:
        self._gauges = {name: Gauge(name, text, tag_keys=_TAGS) for name, text in DESCRIPTIONS.items()}
        self._values: dict[str, float] = {}
        self._rank = 0
        self._accelerator: Accelerator | None = None

    def begin_run(self, *, rank: int, node: str, log_dir: str, accelerator: Accelerator) -> None:
        """Tag later values with the run, whose name is made of the last three parts of its log directory."""
        self._rank, self._accelerator = rank, accelerator
        for gauge in self._gauges.values():
            gauge.set_default_tags({"rank": str(rank), "run": name_run(log_dir), "node": node})

    @contextmanager
    def measure(self, command: Command) -> Iterator[None]:
        """Record the time inside the context if the command saves, unless it fails."""
        began_at = perf_counter()
        yield
        if isinstance(command, Save):
            self._values["raylit_checkpoint_time_s"] = perf_counter() - began_at
            self.refresh()

    def record_interval(self, measured: Measured) -> None:
        """Record this rank's times of a logging interval; a few microseconds for each metric."""
        own, num_steps = measured.ranks[self._rank], max(1, measured.num_steps)
        self._values["raylit_step_time_s"] = own.elapsed_s / num_steps
        self._values["raylit_samples_per_s"] = measured.num_samples / own.elapsed_s
        self._values["raylit_data_wait_s"] = own.data_wait_s / num_steps
        if own.backward_s > 0:  # manual optimization does not measure its backward passes
            shared_s = min(rank.backward_s for rank in measured.ranks)
            self._values["raylit_collective_wait_s"] = (own.backward_s - shared_s) / num_steps
        self.refresh()

    def refresh(self) -> None:
        """Set all gauges of the run again. Called from the training thread and from the event loop."""
        values, accelerator = self._values, self._accelerator
        if accelerator is None or not values:
            return
        if (num_bytes := _read_resident_bytes()) > 0:
            values["raylit_host_memory_bytes"] = float(num_bytes)
        if (num_bytes := accelerator.allocated_bytes()) > 0:
            values["raylit_device_memory_bytes"] = float(num_bytes)
        for name, value in list(values.items()):
            self._gauges[name].set(value)

    def end_run(self) -> None:
        """Forget the run's values, which Ray's agent then drops."""
        self._values, self._accelerator = {}, None


class GoodputMetrics:
    """Counter of a run's seconds by cause, in the driver's process."""

    def __init__(self) -> None:
        self._counter = Counter(GOODPUT, GOODPUT_DESCRIPTION, tag_keys=("run", "cause"))
        self._run = ""
        self._counted_s: dict[str, float] = {}

    def begin_run(self, log_dir: str) -> None:
        """Count from zero, with the name of a new run."""
        self._run, self._counted_s = name_run(log_dir), {}

    def count(self, seconds_by_cause: Mapping[str, float]) -> None:
        """Count what has been added to each cause since the last call."""
        for cause, seconds in seconds_by_cause.items():
            # Time that is moved to another cause later is not taken back: a counter cannot fall.
            if (added_s := seconds - self._counted_s.get(cause, 0.0)) > 0:
                self._counter.inc(added_s, tags={"run": self._run, "cause": cause})
                self._counted_s[cause] = seconds


def name_run(log_dir: str) -> str:
    """Return the tag of a run: the last three parts of its log directory."""
    return "/".join([part for part in os.path.abspath(log_dir).split("/") if part][-3:])


def _read_resident_bytes() -> int:
    """Return the resident memory of this process; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
