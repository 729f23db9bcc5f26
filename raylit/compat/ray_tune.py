"""Private names of Ray Tune, each behind one function. Driver.

Written for Ray 2.60. A missing name is a RaylitError, or is ignored if it only saves time. The largest part is Tune's
controller without its needless ends of processes and sweeps.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray import tune
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.utils import flatten_dict

from raylit.compat.private_names import describe_missing, import_private
from raylit.errors import RaylitError

_FEATURE = "a sweep or a search with workers"

try:
    from ray.air.execution._internal import RayActorManager
    from ray.tune import tune as tune_run
    from ray.tune.execution.tune_controller import TuneController
except ImportError as missing:
    owner, _, module_name = str(missing.name).rpartition(".")
    raise describe_missing(owner, module_name, feature=_FEATURE, library="ray") from missing

_OVERRIDDEN = ("on_step_begin", "_schedule_trial_pause", "_schedule_trial_stop", "_set_trial_status")


def has_metric(algorithm: object) -> bool:
    """Return True if a scheduler or searcher of Tune has a metric; False if the private name is missing.

    Only searchers have a public property for it.
    """
    return getattr(algorithm, "metric", None) is not None or getattr(algorithm, "_metric", None) is not None


def list_trials(results: tune.ResultGrid) -> list[Trial]:
    """Return the trials of Tune's results, with their states and checkpoints, which the public results leave out."""
    analysis = getattr(results, "_experiment_analysis", None)
    if analysis is None:
        raise describe_missing("ray.tune.ResultGrid", "_experiment_analysis", feature=_FEATURE, library="ray")
    return list(analysis.trials)


@contextlib.contextmanager
def set_trial_variables(variables: Mapping[str, str], *, is_pooled: bool) -> Iterator[None]:
    """Give the processes of trials that start within this context these environment variables.

    Tune adds some of its own, and passes on some of this process's. For variables Ray starts new processes, with two
    more starts of Python, where trials without any use prestarted ones. `is_pooled`: leave Tune's variables out, unless
    this process has some to pass on.

    Without the private names Tune's variables apply and none of raylit's; that is an error if the trials need some.
    """
    try:
        module = import_private("ray.tune.execution", "class_cache", feature=_FEATURE)
        names, defaults = module.ENV_VARS_TO_PROPAGATE, dict(module.DEFAULT_ENV_VARS)
    except (RaylitError, AttributeError):
        if variables:
            raise
        yield
        return
    if is_pooled or not names & os.environ.keys():
        module.DEFAULT_ENV_VARS.clear()
        module.ENV_VARS_TO_PROPAGATE = set()
    module.DEFAULT_ENV_VARS.update(variables)
    try:
        yield
    finally:
        module.DEFAULT_ENV_VARS.clear()
        module.DEFAULT_ENV_VARS.update(defaults)
        module.ENV_VARS_TO_PROPAGATE = names


@contextlib.contextmanager
def replace_controller(*, is_reusable_after: Callable[[Exception | None], bool]) -> Iterator[None]:
    """Run sweeps that start within this context under a controller without needless ends of processes and sweeps.

    Neither can the controller be chosen in Ray 2.60, nor can a callback or a scheduler change what these methods do.
    Tune's own controller:

    - ends the whole sweep if Ray's memory monitor has killed one trial's process;
    - waits for ever in synchronous population based training if the last trial to report has failed instead;
    - ends a process, and starts one anew with its workers, at each perturbation of a trial in population based
      training;
    - ends a trial at its next save after a pause that overtakes a save;
    - ends the process of a trial that fails by a user's mistake, which the next trial could reuse.

    Use it only for trials that all request the same resources, so that each can reuse any other's process.

    Args:
        is_reusable_after: Tells whether a trial's process can be reused after this exception.

    Raises:
        RaylitError: The installed version of Ray does not have what the controller changes.
    """
    for name in _OVERRIDDEN:
        if not hasattr(TuneController, name):
            raise describe_missing(TuneController, name, feature=_FEATURE, library="ray")
    before = tune_run.TuneController  # type: ignore[attr-defined]

    class Controller(_Controller):
        def is_reusable_after(self, exception: Exception | None) -> bool:
            return is_reusable_after(exception)

    tune_run.TuneController = Controller  # type: ignore[attr-defined]
    try:
        yield
    finally:
        tune_run.TuneController = before  # type: ignore[attr-defined]


class _Controller(TuneController):
    """Controller that also keeps processes of trials that pause, and of trials that fail by a user's mistake.

    Tune keeps a process only for a trial that already waits for one, and one more.
    """

    def is_reusable_after(self, exception: Exception | None) -> bool:
        raise NotImplementedError

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._actor_manager = _ActorManager(resource_manager=self._actor_manager._resource_manager)

    def on_step_begin(self) -> None:
        """Resume synchronous population based training if no trial runs.

        It continues when the last trial reports; if that one has ended instead, Tune does not ask the scheduler again.
        """
        super().on_step_begin()
        is_stalled = self._paused_trials and not (self._running_trials or self._pending_trials)
        if is_stalled and isinstance(self._scheduler_alg, PopulationBasedTraining):
            trial = min(self._paused_trials, key=lambda trial: trial.trial_id)
            self._scheduler_alg.on_trial_result(self._wrapped(), trial, flatten_dict(trial.last_result))

    def _schedule_trial_pause(self, trial: Trial, should_checkpoint: bool = True) -> None:
        if should_checkpoint or trial not in self._trial_to_actor:
            super()._schedule_trial_pause(trial, should_checkpoint=should_checkpoint)
            return
        # Tune keeps the process for a staged trial: this one is staged from when its process is free.
        self._staged_trials.add(trial)
        self._actor_cache.increase_max(trial.placement_group_factory)
        try:
            super()._schedule_trial_pause(trial, should_checkpoint=False)
        finally:
            self._staged_trials.discard(trial)
            self._actor_cache.decrease_max(trial.placement_group_factory)
        # A pause that overtakes a save leaves it, and no result of it will come: the next save would end the trial.
        self._cached_trial_decisions.pop(trial.trial_id, None)

    def _schedule_trial_stop(self, trial: Trial, exception: Exception | None = None) -> None:
        if trial in self._trial_to_actor and self.is_reusable_after(exception):
            self._mark_trial_to_checkpoint(trial)
            self._maybe_cache_trial_actor(trial)  # Tune then finds no process to end
        super()._schedule_trial_stop(trial, exception)

    def _set_trial_status(self, trial: Trial, status: str) -> None:
        was_paused = trial.status == Trial.PAUSED
        super()._set_trial_status(trial, status)
        is_paused = trial.status == Trial.PAUSED
        if is_paused and not was_paused:
            self._actor_cache.increase_max(trial.placement_group_factory)
        elif was_paused and not is_paused:
            self._actor_cache.decrease_max(trial.placement_group_factory)


class _ActorManager(RayActorManager):
    """Actor manager that reports a kill by Ray's memory monitor as a death.

    Tune does not expect the monitor's own error and ends the run.
    """

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        super()._actor_task_failed(tracked_actor_task, _to_actor_death(exception))

    def _actor_start_failed(self, tracked_actor: Any, exception: Exception) -> None:
        super()._actor_start_failed(tracked_actor, _to_actor_death(exception))


def _to_actor_death(exception: Exception) -> Exception:
    if isinstance(exception, OutOfMemoryError):
        death = ActorDiedError()
        death.error_msg = str(exception)
        return death
    return exception
