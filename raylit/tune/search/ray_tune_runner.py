"""Runner of a search's trials on Ray Tune, as many at a time as the cluster has resources for. Driver."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cloudpickle
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raylit.accelerators import Accelerator
from raylit.checkpoint import format
from raylit.compat import ray_core
from raylit.config import Workers
from raylit.driver.ray.failures import format_traceback
from raylit.driver.ray.placement import read_hosts
from raylit.driver.ray.serialization import SerializedJob, pickle_job, unpickle_job
from raylit.errors import RaylitError, RemoteTraceback, WorkerFailed
from raylit.tune.search.out_of_memory import classify_failure
from raylit.tune.search.trial import Experiment, Outcome, Search, run_trial
from raylit.tune.trial.progress import read_error
from raylit.tune.trial.resources import TrialResources, find_trial_resources
from raylit.tune.trial.run_trials import Run, run_trials
from raylit.tune.trial.trainable import TrialContext
from raylit.worker.job import Job

_VALUE, _STEP, _LOSS, _OUTCOME = "value", "step", "loss", "outcome"
"""Keys in the config of a trial and in its results."""
_MIN_CPU = 0.01
_TITLE = "search"


class TuneRunner:
    """Runner with a placement group for each trial; the death of a worker or trial process ends its trial only."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown

    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        """Run the search's trials on Ray Tune. Raises the error that every trial would raise."""
        workers = _share_cores(experiment.plan.workers)
        experiment = replace(experiment, plan=replace(experiment.plan, workers=workers))
        trials = _Trials(search, experiment.plan.workers.accelerator)
        with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
            run_trials(
                _TrialFunction(experiment, pickle_job(job)),
                {},
                resources=find_trial_resources(workers, title=_TITLE),
                run=Run(
                    title=_TITLE,
                    directory=os.path.join(directory, "trials"),
                    metric=None,
                    num_samples=-1,  # until the search proposes no more
                    searcher=_SearcherAdapter(trials),
                    scheduler=_SchedulerAdapter(trials),
                    max_concurrent=search.num_at_once,
                    num_checkpoints=0,
                    is_shown=self._is_shown,
                ),
            )
        if trials.error is not None:
            raise trials.error


class _TrialFunction:
    """Training function of a search's trials, in a trial's process; it unpickles the data once per process."""

    def __init__(self, experiment: Experiment, serialized_job: SerializedJob) -> None:
        self._experiment = replace(experiment, random_state={})
        self._serialized_job: SerializedJob | None = serialized_job
        self._job: Job | None = None

    def __call__(self, context: TrialContext) -> Mapping[str, Any]:
        if self._job is None:
            assert self._serialized_job is not None
            self._job, _ = unpickle_job(self._serialized_job)
            self._job.shared_memory = self._serialized_job = None

        def report_loss(step: int, loss: float) -> bool:
            return not context.thread.report({_STEP: step, _LOSS: loss}, save=_save_nothing)

        # Every trial's process starts with the driver's random state.
        experiment = replace(
            self._experiment, random_state=format.random_state(self._experiment.plan.workers.accelerator)
        )
        try:
            outcome = run_trial(experiment, context.config[_VALUE], self._job, report_loss=report_loss)
        except Exception as error:
            outcome = Outcome(error=error)
        return {_OUTCOME: _pickle_outcome(outcome)}


class _Trials:
    """State of the search that Tune's searcher and scheduler share: values by trial, and an error that concerns all."""

    def __init__(self, search: Search, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.error: BaseException | None = None
        self._search = search
        self._values: dict[str, Any] = {}
        self._errors: dict[str, BaseException] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing to pickle: Tune saves its state for a resume, and a search starts anew instead."""
        return {}

    def next_value(self, trial_id: str) -> Any:
        """Return the search's next value for a trial; None: there is none."""
        if self.error is not None:
            return None
        value = self._search.propose()
        if value is not None:
            self._values[trial_id] = value
        return value

    def is_losing(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Return whether the trial is to be stopped after a result."""
        if self.error is not None:
            return True
        return _LOSS in result and self._search.is_losing(self._values[trial_id], result[_STEP], result[_LOSS])

    def record_error(self, trial: TuneTrial) -> None:
        error = read_error(trial)
        self._errors[trial.trial_id] = error or RaylitError("a trial failed, and Tune does not say why")

    def receive(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Pass the outcome of a trial to the search."""
        error = self._errors.pop(trial_id, None)
        if error is not None:
            outcome = Outcome(error=error, failure=classify_failure(error, self._accelerator))
        else:
            # Without an outcome, the trial was stopped by the scheduler.
            outcome = _unpickle_outcome(result[_OUTCOME]) if _OUTCOME in result else Outcome()
        if outcome.error is not None and outcome.failure is None:
            self.error = self.error or outcome.error
            return
        try:
            self._search.receive(self._values[trial_id], outcome)
        except Exception as error:  # raised in the driver; Tune would leave its trials running
            self.error = self.error or error


class _SearcherAdapter(Searcher):
    """Tune's searcher, which takes its configs from the search."""

    def __init__(self, trials: _Trials) -> None:
        super().__init__()
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:
        value = self._trials.next_value(trial_id)
        return Searcher.FINISHED if value is None else {_VALUE: value}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._trials.receive(trial_id, result or {})

    def save(self, checkpoint_path: str) -> None:
        """Save nothing, as a search is not resumed."""

    def restore(self, checkpoint_path: str) -> None: ...


class _SchedulerAdapter(FIFOScheduler):
    """Tune's scheduler, which stops the trials that the search gives up."""

    def __init__(self, trials: _Trials) -> None:
        super().__init__()
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        return self.STOP if self._trials.is_losing(trial.trial_id, result) else self.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._trials.record_error(trial)


def _share_cores(workers: Workers) -> Workers:
    """Return workers that share cores if there are too few and no more will come, as those of an ordinary fit do."""
    if ray_core.read_autoscaling() is not None:
        return workers
    hosts, cpu = read_hosts(), 1.0
    resources = TrialResources(workers=workers)
    while "CPU" not in workers.resources_per_worker and not resources.demand.fits(hosts) and cpu > _MIN_CPU:
        cpu = round(cpu / 2, 3)
        resources = TrialResources(
            workers=replace(workers, resources_per_worker={"CPU": cpu, **workers.resources_per_worker})
        )
    return resources.workers if resources.demand.fits(hosts) else workers


def _pickle_outcome(outcome: Outcome) -> bytes:
    text = None if outcome.error is None else format_traceback(outcome.error)
    try:
        pickled = cloudpickle.dumps((outcome, text))
        cloudpickle.loads(pickled)
    except Exception:
        assert text is not None
        error = WorkerFailed(f"an exception that cannot be pickled ended a trial: {text.splitlines()[-1]}")
        pickled = cloudpickle.dumps((replace(outcome, error=error), text))
    return pickled


def _unpickle_outcome(pickled: bytes) -> Outcome:
    outcome: Outcome
    outcome, text = cloudpickle.loads(pickled)
    if outcome.error is not None and not isinstance(outcome.error, RaylitError):
        outcome.error.__cause__ = RemoteTraceback(text)
    return outcome


def _save_nothing(path: str) -> None:
    """Write nothing, as the scheduler asks for no checkpoints."""
