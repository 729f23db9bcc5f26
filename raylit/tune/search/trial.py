"""One trial of a search: a copy of the job with a value set, fitted for a few steps."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from torch.utils.data import DataLoader, Dataset

from raylit.callbacks.base import DriverCallback, Run
from raylit.checkpoint import format
from raylit.config.plan import Plan
from raylit.driver.loop.coordinator import Coordinator
from raylit.errors import ConfigError
from raylit.tune.search.out_of_memory import Verdict
from raylit.worker.job import Job
from raylit.worker.process import result_sync

RATE_NAMES = ("lr", "learning_rate")
SIZE_NAMES = ("batch_size",)


def owners_of(job: Job) -> list[Any]:
    """What may have it."""
    return [owner for owner in (job.module, job.datamodule) if owner is not None]


def find(names: Sequence[str], job: Job, *, argument: str) -> str:
    """The first name that module or data module has, as an attribute or in its `hparams`; "hparams.lr" is read as "lr".

    ConfigError names the numbers that there are.
    """
    owners = owners_of(job)
    for name in (name.removeprefix("hparams.") for name in names):
        if any(_places(name, owner) for owner in owners):
            return name
    wanted = " or ".join(map(repr, names))
    there = sorted({f"{type(owner).__name__}.{name}" for owner in owners for name in _numbers(owner)})
    raise ConfigError(
        f"{argument}: there is no attribute or hyper-parameter {wanted} to set; numbers that there are: "
        f"{', '.join(there) or 'none'}. Add self.{names[0]} = ... and use it, or give another name"
    )


def get(name: str, job: Job) -> Any:
    return next(place[name] for owner in owners_of(job) for place in _places(name, owner))


def put(name: str, value: Any, job: Job) -> None:
    """In every place that has it, so that whichever is read has the value."""
    for owner in owners_of(job):
        for place in _places(name, owner):
            place[name] = value


def _places(name: str, owner: Any) -> list[Any]:
    """The dictionaries of the owner that hold it; `hparams` are one."""
    own, hparams = vars(owner), owner.find_hparams()
    return [place for place in (own, hparams) if place is not None and name in place]


def _numbers(owner: Any) -> list[str]:
    held = {**vars(owner), **(owner.find_hparams() or {})}
    return [
        name
        for name, value in held.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("_")
    ]


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


ReportLoss = Callable[[int, float], bool]
"""Is told the step and the loss of a rung; says whether the trial is to end."""


def fit_trial(experiment: Experiment, value: Any, *, job: Job, told: ReportLoss) -> Outcome:
    """Fit `job`, which is the trial's own. Raises what ends it; the random state of the process stays."""
    if experiment.attribute is not None:
        put(experiment.attribute, value, job)
    callbacks = [_Rungs(experiment.rungs, told)] if experiment.rungs else []
    accelerator = experiment.plan.workers.accelerator
    random_state = format.random_state(accelerator)
    coordinator = Coordinator(plan=experiment.plan, job=job, callbacks=callbacks, loggers=[], stage="fit")
    try:
        format.set_random_state(experiment.random_state, accelerator)
        coordinator.fit()
    finally:
        format.set_random_state(random_state, accelerator)
    if coordinator.finished is not None and coordinator.finished.attributes:
        result_sync.apply(coordinator.finished.attributes, job.module, job.callbacks)
    probe = cast("Probe", job.callbacks[0])
    return Outcome(findings=probe.found(), num_batches=coordinator.state.num_training_batches)


def copy_job(job: Job) -> Job:
    """For a worker in this process, which would train the user's own objects. Data sets are shared, as nobody writes
    to them; what cannot be copied, such as a generator, is used itself."""
    memo: dict[int, Any] = {}
    for owner in owners_of(job):
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

    def __init__(self, steps: Sequence[int], told: ReportLoss) -> None:
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
