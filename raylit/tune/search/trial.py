"""One trial of a search, a copy of the job fitted for a few steps, and its runner. Driver and trial processes."""

import copy
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

from torch.utils.data import DataLoader, Dataset

from raylit.callbacks.base import DriverCallback, Run
from raylit.checkpoint import format
from raylit.config import Plan
from raylit.driver.loop.coordinator import Coordinator
from raylit.errors import ConfigError
from raylit.tune.search.out_of_memory import FailureKind, classify_failure, drop_tracebacks
from raylit.worker.job import Job
from raylit.worker.process import result_sync

RATE_NAMES = ("lr", "learning_rate")
SIZE_NAMES = ("batch_size",)
LOSS = "raylit/trial_loss"
"""Metric that a probe logs for the rungs."""


class Probe(Protocol):
    """Callback on the workers that collects the result of the trial; the first of the job's callbacks."""

    def collect(self) -> Any:
        """Return what it has collected, in plain values."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Settings that the trials of a search share.

    Each trial runs a copy of the same job, whose callbacks are the probe and others that a trial needs.
    """

    plan: Plan
    random_state: dict[str, Any]
    attribute: str | None = None
    """Attribute that is set to the trial's value."""
    rungs: tuple[int, ...] = ()
    """Optimizer steps at which the trial's loss is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Outcome of a trial."""

    findings: Any = None
    """What the probe has collected."""
    num_batches: float = 0
    """Batches of an epoch, per worker."""
    error: BaseException | None = None
    """Error that ended the trial, without its frames."""
    failure: FailureKind | None = None
    """Kind of failure that the error stands for."""


class Search(Protocol):
    """Search that proposes values and receives their outcomes, independent of how trials are run."""

    num_at_once: int
    """Number of trials that may run at the same time."""

    def propose(self) -> Any:
        """Return the next value; None: there is none. With `num_at_once=1` the last outcome was received before."""
        ...

    def is_losing(self, value: Any, step: int, loss: float) -> bool:
        """Return whether to end the trial of a value that has reached a rung with this loss."""
        ...

    def receive(self, value: Any, outcome: Outcome) -> None:
        """Receive the outcome of a value's trial."""
        ...


ReportLoss = Callable[[int, float], bool]
"""Function of the step and the loss of a rung, which returns whether the trial is to end."""


class Runner(Protocol):
    """Way to run the trials of a search."""

    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        """Run a trial for each value that the search proposes. Raises an error that every trial would raise."""
        ...


class DirectRunner:
    """Runner of one trial after the other, on the workers of an ordinary fit; with `num_workers=0` in this process."""

    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        """Run a trial for each value that the search proposes. Raises an error that every trial would raise."""
        while (value := search.propose()) is not None:
            search.receive(value, run_trial(experiment, value, job, report_loss=partial(search.is_losing, value)))


def run_trial(experiment: Experiment, value: Any, job: Job, *, report_loss: ReportLoss) -> Outcome:
    """Run a trial with a copy of the job and return its outcome.

    An error that comes from this trial's value is part of the outcome; any other error is raised.
    """
    accelerator = experiment.plan.workers.accelerator
    try:
        return fit_trial(experiment, value, job=copy_job(job), report_loss=report_loss)
    except Exception as error:
        failure = classify_failure(error, accelerator)
        if failure is None:
            raise
        outcome = Outcome(error=drop_tracebacks(error), failure=failure)
    # This stands outside of the except clause, which keeps the failed step's frames and with them its tensors.
    gc.collect()
    accelerator.empty_cache()
    return outcome


def fit_trial(experiment: Experiment, value: Any, *, job: Job, report_loss: ReportLoss) -> Outcome:
    """Fit `job`, which belongs to this trial alone, and leave the random state of the process unchanged.

    Raises whatever error ends the fit.
    """
    if experiment.attribute is not None:
        set_attribute(experiment.attribute, value, job)
    callbacks = [_RungReporter(experiment.rungs, report_loss)] if experiment.rungs else []
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
    return Outcome(findings=probe.collect(), num_batches=coordinator.state.num_training_batches)


def copy_job(job: Job) -> Job:
    """Copy a job for a worker in this process, which would otherwise train the user's own objects.

    Data sets are shared, as trials only read them. A loader that cannot be copied, such as a generator, is shared
    too.
    """
    memo: dict[int, Any] = {}
    for owner in list_owners(job):
        for value in vars(owner).values():
            _share_data(value, memo)
    for loader in job.loaders.values():
        _share_data(loader, memo)
    result = replace(job, callbacks=copy.deepcopy(job.callbacks))
    result.module, result.datamodule = copy.deepcopy((job.module, job.datamodule), memo)
    result.loaders = {name: _copy_if_possible(loader, memo) for name, loader in job.loaders.items()}
    return result


def find_attribute(names: Sequence[str], job: Job, *, argument: str) -> str:
    """Return the first name that module or data module has, as an attribute or in its `hparams`.

    "hparams.lr" is read as "lr".

    Raises:
        ConfigError: there is none; the message lists the numbers that there are.
    """
    owners = list_owners(job)
    for name in (name.removeprefix("hparams.") for name in names):
        if any(_list_dictionaries(name, owner) for owner in owners):
            return name
    expected = " or ".join(map(repr, names))
    there = sorted({f"{type(owner).__name__}.{name}" for owner in owners for name in _list_numbers(owner)})
    raise ConfigError(
        f"{argument}: there is no attribute or hyper-parameter {expected} to set; numbers that there are: "
        f"{', '.join(there) or 'none'}. Add self.{names[0]} = ... and use it, or give another name"
    )


def get_attribute(name: str, job: Job) -> Any:
    """Return the value of an attribute that `find_attribute` has found."""
    return next(values[name] for owner in list_owners(job) for values in _list_dictionaries(name, owner))


def set_attribute(name: str, value: Any, job: Job) -> None:
    """Set an attribute in every dictionary that has it, so that all readers see the value."""
    for owner in list_owners(job):
        for values in _list_dictionaries(name, owner):
            values[name] = value


def list_owners(job: Job) -> list[Any]:
    """Return the objects that may have the attribute: the module and the data module, if there is one."""
    return [owner for owner in (job.module, job.datamodule) if owner is not None]


class _RungReporter(DriverCallback):
    """Driver callback that reports the trial's loss at each rung, and stops the fit if the trial is to end."""

    def __init__(self, steps: Sequence[int], report_loss: ReportLoss) -> None:
        self._left = list(steps)
        self._report_loss = report_loss

    def next_pause_step(self, run: Run) -> int | None:
        return self._left[0] if self._left else None

    def on_train_pause(self, run: Run) -> None:
        if not self._left or run.state.progress.global_step < self._left[0]:
            return
        step = self._left.pop(0)
        if self._report_loss(step, run.state.callback_metrics.get(LOSS, math.nan)):
            run.stop("the trial is behind others")


def _share_data(value: Any, memo: dict[int, Any]) -> None:
    data = value.dataset if isinstance(value, DataLoader) else value
    if isinstance(data, Dataset):
        memo[id(data)] = data


def _copy_if_possible(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except TypeError:  # raised by Python for objects that cannot be copied
        return value


def _list_dictionaries(name: str, owner: Any) -> list[Any]:
    """Return the owner's dictionaries that have the name, `hparams` among them."""
    own, hparams = vars(owner), owner.find_hparams()
    return [values for values in (own, hparams) if values is not None and name in values]


def _list_numbers(owner: Any) -> list[str]:
    attributes = {**vars(owner), **(owner.find_hparams() or {})}
    return [
        name
        for name, value in attributes.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("_")
    ]
