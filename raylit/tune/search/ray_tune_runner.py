"""TuneRunner: the trials of a search as Ray Tune's, which run as many at a time as there is room for. Driver."""

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
from raylit.config.plan import Workers
from raylit.driver.ray.failures import format_traceback
from raylit.driver.ray.placement import cluster_hosts
from raylit.driver.ray.serialization import SerializedJob, pickle_job, unpickle_job
from raylit.errors import RaylitError, RemoteTraceback, WorkerFailed
from raylit.tune.search.out_of_memory import classify_failure
from raylit.tune.search.runner import run_trial
from raylit.tune.search.trial import Experiment, Outcome, Search
from raylit.tune.trial.progress import error_of
from raylit.tune.trial.resources import TrialResources, find_trial_resources
from raylit.tune.trial.run_trials import Run, run_trials
from raylit.tune.trial.trainable import TrialContext
from raylit.worker.job import Job

_VALUE, _STEP, _LOSS, _OUTCOME = "value", "step", "loss", "outcome"
"""In the config of a trial, and in its results."""
_LEAST_CPU = 0.01
_TITLE = "search"


class TuneRunner:
    """Each trial's workers have a placement group; what ends one of them, or its whole process, ends that trial."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown

    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        workers = _with_room(experiment.plan.workers)
        experiment = replace(experiment, plan=replace(experiment.plan, workers=workers))
        trials = _Trials(search, experiment.plan.workers.accelerator)
        with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
            run_trials(
                _Recipe(experiment, pickle_job(job)),
                {},
                room=find_trial_resources(workers, title=_TITLE),
                run=Run(
                    title=_TITLE,
                    directory=os.path.join(directory, "trials"),
                    metric=None,
                    num_samples=-1,  # until the search proposes no more
                    searcher=_Proposals(trials),
                    scheduler=_Cuts(trials),
                    max_concurrent=search.num_at_once,
                    num_checkpoints=0,
                    is_shown=self._is_shown,
                ),
            )
        if trials.error is not None:
            raise trials.error


class _Recipe:
    """A trial, in its own process. The data comes once for all trials of a process."""

    def __init__(self, experiment: Experiment, parcel: SerializedJob) -> None:
        self._experiment = replace(experiment, random_state={})
        self._parcel: SerializedJob | None = parcel
        self._job: Job | None = None

    def __call__(self, context: TrialContext) -> Mapping[str, Any]:
        if self._job is None:
            assert self._parcel is not None
            self._job, _ = unpickle_job(self._parcel)
            self._job.shared_memory = self._parcel = None

        def told(step: int, loss: float) -> bool:
            return not context.handover.report({_STEP: step, _LOSS: loss}, save=_save_nothing)

        # A trial's process starts with the driver's.
        experiment = replace(
            self._experiment, random_state=format.random_state(self._experiment.plan.workers.accelerator)
        )
        try:
            outcome = run_trial(experiment, context.config[_VALUE], self._job, told=told)
        except Exception as error:
            outcome = Outcome(error=error)
        return {_OUTCOME: _pickled(outcome)}


class _Trials:
    """The search, as Tune's parts see it: which trial has which value, and what was wrong with all of them."""

    def __init__(self, search: Search, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.error: BaseException | None = None
        self._search = search
        self._values: dict[str, Any] = {}
        self._errors: dict[str, BaseException] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps what it would go on with after an interruption; a search then starts anew."""
        return {}

    def next_value(self, trial_id: str) -> Any:
        if self.error is not None:
            return None
        value = self._search.propose()
        if value is not None:
            self._values[trial_id] = value
        return value

    def is_losing(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        if self.error is not None:
            return True
        return _LOSS in result and self._search.is_losing(self._values[trial_id], result[_STEP], result[_LOSS])

    def note_error(self, trial: TuneTrial) -> None:
        error = error_of(trial)
        self._errors[trial.trial_id] = error or RaylitError("a trial failed, and Tune does not say why")

    def receive(self, trial_id: str, result: Mapping[str, Any]) -> None:
        error = self._errors.pop(trial_id, None)
        if error is not None:
            outcome = Outcome(error=error, verdict=classify_failure(error, self._accelerator))
        else:
            # Without one, the trial was cut.
            outcome = _unpickled(result[_OUTCOME]) if _OUTCOME in result else Outcome()
        if outcome.error is not None and outcome.verdict is None:
            self.error = self.error or outcome.error
            return
        try:
            self._search.receive(self._values[trial_id], outcome)
        except Exception as error:  # for the driver, not for Tune, which would leave its trials alone
            self.error = self.error or error


class _Proposals(Searcher):
    """What Tune asks for a config."""

    def __init__(self, trials: _Trials) -> None:
        super().__init__()
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:
        value = self._trials.next_value(trial_id)
        return Searcher.FINISHED if value is None else {_VALUE: value}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._trials.receive(trial_id, result or {})

    def save(self, checkpoint_path: str) -> None:
        """Nothing to go on with."""

    def restore(self, checkpoint_path: str) -> None: ...


class _Cuts(FIFOScheduler):
    """What Tune asks whether a trial goes on."""

    def __init__(self, trials: _Trials) -> None:
        super().__init__()
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        return self.STOP if self._trials.is_losing(trial.trial_id, result) else self.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._trials.note_error(trial)


def _with_room(workers: Workers) -> Workers:
    """Where there are not as many cores, and no more will come, the workers share them, as those of an ordinary fit
    do."""
    if ray_core.read_autoscaling() is not None:
        return workers
    hosts, cpu = cluster_hosts(), 1.0
    room = TrialResources(workers=workers)
    while "CPU" not in workers.resources_per_worker and not room.demand.fits(hosts) and cpu > _LEAST_CPU:
        cpu = round(cpu / 2, 3)
        room = TrialResources(
            workers=replace(workers, resources_per_worker={"CPU": cpu, **workers.resources_per_worker})
        )
    return room.workers if room.demand.fits(hosts) else workers


def _pickled(outcome: Outcome) -> bytes:
    text = None if outcome.error is None else format_traceback(outcome.error)
    try:
        pickled = cloudpickle.dumps((outcome, text))
        cloudpickle.loads(pickled)
    except Exception:
        assert text is not None
        error = WorkerFailed(f"an exception that cannot be pickled ended a trial: {text.splitlines()[-1]}")
        pickled = cloudpickle.dumps((replace(outcome, error=error), text))
    return pickled


def _unpickled(pickled: bytes) -> Outcome:
    outcome: Outcome
    outcome, text = cloudpickle.loads(pickled)
    if outcome.error is not None and not isinstance(outcome.error, RaylitError):
        outcome.error.__cause__ = RemoteTraceback(text)
    return outcome


def _save_nothing(path: str) -> None:
    """No scheduler of ours asks for it."""
