"""Profiling of one rank: the time of commands, waits and batches, besides the hooks and steps."""

from collections.abc import Iterator
from typing import Any

import torch

from raylit.accelerators import Accelerator
from raylit.profilers.base import PeakMemory, Profiler
from raylit.protocol.messages import (
    Action,
    Command,
    EndEpoch,
    Evaluate,
    Finish,
    LookAhead,
    Predict,
    Profile,
    Reload,
    Report,
    Save,
    Start,
    Train,
)
from raylit.worker.collectives import Collectives
from raylit.worker.job import WorkerContext

DRIVER = "wait for the driver"

_COMMANDS: dict[type, str] = {
    Start: "start",
    Reload: "reload loaders",
    Train: "training loop",
    LookAhead: "look ahead",
    EndEpoch: "end of epoch",
    Evaluate: "evaluation loop",
    Predict: "prediction loop",
    Save: "checkpoint: gather state",
    Finish: "finish",
}
"""Name of the time of a command that no action inside it accounts for."""

_SHARED = frozenset({*_COMMANDS.values(), DRIVER, "backward"})
"""Actions in which a rank may wait for others."""


class RankProfiler:
    """Measures a rank from a stage's start to its end.

    Between commands, and while a report is consumed, the time counts as the driver's.
    """

    def __init__(
        self, profiler: Profiler, *, stage: str, context: WorkerContext, accelerator: Accelerator, log_dir: str
    ) -> None:
        self._profiler = profiler
        self._stage = stage
        self._context = context
        self._memory = PeakMemory(accelerator)
        self._busy_before_s = 0.0
        profiler.setup(stage, context.local_rank, log_dir)

    def measure_reports(self, command: Command, reports: Iterator[Report]) -> Iterator[Report]:
        """Yield a command's reports and measure the time that each takes."""
        name, profiler = _COMMANDS[type(command)], self._profiler
        with profiler.profile(name):
            for report in reports:
                with profiler.profile(DRIVER):
                    yield report
        if isinstance(command, Start):
            self._busy_before_s = self._busy_s  # preparing the data for all ranks does not make a rank slow

    def read_profile(self, collectives: Collectives) -> Profile | None:
        """Return the profile of the slowest and of the fastest rank, and None on other ranks. Collective.

        A rank's time is what it spends in the loops on work of its own; the rest is waiting for other ranks.
        """
        profiler = self._profiler
        actions, elapsed_s = profiler.actions, profiler.elapsed_s
        busy_s = self._busy_s - self._busy_before_s
        busy = collectives.gather_vector(torch.tensor([busy_s], dtype=torch.float64))[:, 0]
        rank, (slowest, fastest) = self._context.rank, (int(busy.argmax()), int(busy.argmin()))
        if rank not in (slowest, fastest):
            return None
        role = "Slowest rank" if rank == slowest else "Fastest rank"
        rank_title = f"{role}: {rank} of {len(busy)}, on {self._context.host}"
        return Profile(
            title="Worker" if len(busy) == 1 else rank_title,
            rank=rank,
            elapsed_s=elapsed_s,
            actions=_add_driver_time(actions, elapsed_s),
            peak_memory_bytes=self._memory.read(),
            text=profiler.summary(),
            files=dict(profiler.files()),
        )

    @property
    def _busy_s(self) -> float:
        return sum(action.total_s for action in self._profiler.actions if action.name not in _SHARED)

    def close(self) -> None:
        self._profiler.teardown(self._stage)


def timed_items(items: Iterator[Any], profiler: Profiler, name: str) -> Iterator[Any]:
    """Yield the items and measure the time of fetching each."""
    end = object()
    while True:
        with profiler.profile(name):
            item = next(items, end)
        if item is end:
            return
        yield item


def _add_driver_time(actions: tuple[Action, ...], elapsed_s: float) -> tuple[Action, ...]:
    """Add the driver's time, so that the actions add up to the elapsed time."""
    if not actions:
        return ()
    worker_actions = {action.name: action for action in actions}
    driver_wait = worker_actions.pop(DRIVER, None)
    rest_s = elapsed_s - sum(action.total_s for action in worker_actions.values())
    return (
        *worker_actions.values(),
        Action(name=DRIVER, num_calls=driver_wait.num_calls if driver_wait else 0, total_s=rest_s),
    )
