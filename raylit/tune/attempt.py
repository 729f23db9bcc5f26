"""A trial of a search: a short fit of a copy of the user's objects, with a probe. Driver, or the trial's process."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from torch.utils.data import DataLoader, Dataset

from raylit.callbacks.base import DriverCallback, Run
from raylit.checkpoint import format
from raylit.driver.coordinator import Coordinator
from raylit.plan import Plan
from raylit.tune import attribute
from raylit.tune.memory import Verdict
from raylit.worker import handback
from raylit.worker.context import Job

LOSS = "raylit/trial_loss"
"""The metric that a probe logs for the rungs."""


class Probe(Protocol):
    """A callback on the workers that collects what the trial is for; the first of the job's callbacks."""

    def found(self) -> Any:
        """What it has collected, in plain values."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What the trials of a search have in common, beside the Job: a copy of the same for each, whose callbacks are the
    probe and what else a trial needs."""

    plan: Plan
    random_state: dict[str, Any]
    attribute: str | None = None
    """What is set to the trial's value."""
    rungs: tuple[int, ...] = ()
    """Optimizer steps at which the trial's loss is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a trial."""

    findings: Any = None
    num_batches: float = 0
    """Of an epoch, per worker."""
    error: BaseException | None = None
    """What ended it, without the frames that it has passed."""
    verdict: Verdict | None = None
    """What that means."""


class Search(Protocol):
    """Proposes the values to try and takes in what comes of them. Knows nothing of who runs the trials."""

    num_at_once: int
    """Trials that may run at the same time."""

    def propose(self) -> Any:
        """The next value; None: no further one. With `num_at_once=1` the outcome of the one before is in."""
        ...

    def is_losing(self, value: Any, step: int, loss: float) -> bool:
        """Whether to end the trial of a value that has come to a rung with a loss."""
        ...

    def receive(self, value: Any, outcome: Outcome) -> None: ...


Told = Callable[[int, float], bool]
"""Is told the step and the loss of a rung; says whether the trial is to end."""


def attempt(experiment: Experiment, value: Any, *, job: Job, told: Told) -> Outcome:
    """Fit `job`, which is the trial's own. Raises what ends it; the random state of the process stays."""
    if experiment.attribute is not None:
        attribute.put(experiment.attribute, value, job)
    callbacks = [_Rungs(experiment.rungs, told)] if experiment.rungs else []
    random_state = format.random_state()
    coordinator = Coordinator(plan=experiment.plan, job=job, callbacks=callbacks, loggers=[], stage="fit")
    try:
        format.set_random_state(experiment.random_state)
        coordinator.fit()
    finally:
        format.set_random_state(random_state)
    if coordinator.finished is not None and coordinator.finished.attributes:
        handback.apply(coordinator.finished.attributes, job.module, job.callbacks)
    probe = cast("Probe", job.callbacks[0])
    return Outcome(findings=probe.found(), num_batches=coordinator.state.num_training_batches)


def copied(job: Job) -> Job:
    """For a worker in this process, which would train the user's own objects. Data sets are shared, as nobody writes
    to them; what cannot be copied, such as a generator, is used itself."""
    memo: dict[int, Any] = {}
    for owner in attribute.owners_of(job):
        for value in vars(owner).values():
            _share_data(value, memo)
    for loader in job.loaders.values():
        _share_data(loader, memo)
    result = replace(job, callbacks=copy.deepcopy(job.callbacks))
    result.module, result.datamodule = copy.deepcopy((job.module, job.datamodule), memo)
    result.loaders = {name: _or_itself(loader, copy.deepcopy, memo) for name, loader in job.loaders.items()}
    return result


class _Rungs(DriverCallback):
    """Tells the trial's loss at each rung, and ends the trial where it is to end."""

    def __init__(self, steps: Sequence[int], told: Told) -> None:
        self._left = list(steps)
        self._told = told

    def next_pause_step(self, run: Run) -> int | None:
        return self._left[0] if self._left else None

    def on_train_pause(self, run: Run) -> None:
        if not self._left or run.state.progress.global_step < self._left[0]:
            return
        step = self._left.pop(0)
        if self._told(step, run.state.callback_metrics.get(LOSS, math.nan)):
            run.stop("the trial is behind others")


def _share_data(value: Any, memo: dict[int, Any]) -> None:
    data = value.dataset if isinstance(value, DataLoader) else value
    if isinstance(data, Dataset):
        memo[id(data)] = data


def _or_itself(value: Any, copying: Callable[[Any, dict[int, Any]], Any], memo: dict[int, Any]) -> Any:
    try:
        return copying(value, memo)
    except TypeError:  # what Python raises for what cannot be copied
        return value
