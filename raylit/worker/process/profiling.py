"""Recording: what a profiler is told of this rank's run besides the hooks and steps. Worker."""

from collections.abc import Iterator
from typing import Any

import torch

from raylit.accelerators import Accelerator
from raylit.profilers.base import Profiler
from raylit.profilers.stopwatch import PeakMemory
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
from raylit.worker.data.batches import Feed
from raylit.worker.distributed.collectives import Collectives
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
"""What of a command is not in an action inside it."""

_SHARED = frozenset({*_COMMANDS.values(), DRIVER, "backward"})
"""In these a rank may wait for others."""


class RankProfiler:
    """From a stage's start to its end. Between commands, and while a report is on its way, the time is the driver's."""

    def __init__(
        self, profiler: Profiler, *, stage: str, context: WorkerContext, accelerator: Accelerator, log_dir: str
    ) -> None:
        self._profiler = profiler
        self._stage = stage
        self._context = context
        self._memory = PeakMemory(accelerator.device())
        self._busy_before_s = 0.0
        profiler.setup(stage, context.local_rank, log_dir)

    def over(self, command: Command, reports: Iterator[Report]) -> Iterator[Report]:
        name, profiler = _COMMANDS[type(command)], self._profiler
        with profiler.profile(name):
            for report in reports:
                with profiler.profile(DRIVER):
                    yield report
        if isinstance(command, Start):
            self._busy_before_s = self._busy_s  # one rank prepares the data of all, which does not make it a slow one

    def taken(self, collectives: Collectives) -> Profile | None:
        """Of the ranks which took most and least time in the loops for what they do alone; in the rest they wait for
        each other. None on the other ranks. Collective."""
        profiler = self._profiler
        actions, elapsed_s = profiler.actions, profiler.elapsed_s
        busy_s = self._busy_s - self._busy_before_s
        busy = collectives.gather_vector(torch.tensor([busy_s], dtype=torch.float64))[:, 0]
        rank, (slowest, fastest) = self._context.rank, (int(busy.argmax()), int(busy.argmin()))
        if rank not in (slowest, fastest):
            return None
        role = "Slowest rank" if rank == slowest else "Fastest rank"
        of_many = f"{role}: {rank} of {len(busy)}, on {self._context.host}"
        return Profile(
            title="Worker" if len(busy) == 1 else of_many,
            rank=rank,
            elapsed_s=elapsed_s,
            actions=_complete(actions, elapsed_s),
            peak_memory_bytes=self._memory.read(),
            text=profiler.summary(),
            files=dict(profiler.files()),
        )

    @property
    def _busy_s(self) -> float:
        return sum(action.total_s for action in self._profiler.actions if action.name not in _SHARED)

    def close(self) -> None:
        self._profiler.teardown(self._stage)


class TimedFeed:
    """A Feed whose batches are measured as they come."""

    __slots__ = ("_feed", "_name", "_profiler", "may_run_ahead", "weight")

    def __init__(self, feed: Feed, profiler: Profiler, name: str) -> None:
        self._feed = feed
        self._profiler = profiler
        self._name = name
        self.weight = 1.0
        self.may_run_ahead = feed.may_run_ahead

    def __iter__(self) -> "TimedFeed":
        return self

    def __next__(self) -> Any:
        self._profiler.start(self._name)
        try:
            batch = next(self._feed)
        finally:
            self._profiler.stop(self._name)
        self.weight = self._feed.weight
        return batch


def timed_items(items: Iterator[Any], profiler: Profiler, name: str) -> Iterator[Any]:
    """`items`, with the time that it takes to get each."""
    end = object()
    while True:
        with profiler.profile(name):
            item = next(items, end)
        if item is end:
            return
        yield item


def _complete(actions: tuple[Action, ...], elapsed_s: float) -> tuple[Action, ...]:
    """With the rest, so that they add up."""
    if not actions:
        return ()
    inside = {action.name: action for action in actions}
    waits = inside.pop(DRIVER, None)
    rest_s = elapsed_s - sum(action.total_s for action in inside.values())
    return (*inside.values(), Action(name=DRIVER, num_calls=waits.num_calls if waits else 0, total_s=rest_s))
