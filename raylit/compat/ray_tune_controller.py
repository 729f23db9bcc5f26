"""Ray Tune's controller, except where that ends a process, or the whole sweep, without need. Driver.

Written against Ray 2.60, which lets nobody choose the controller, nor says by a callback or to a scheduler what these
methods change. What Tune's own does, and users would feel:

- it ends the whole sweep where Ray's memory monitor has killed one trial's process;
- synchronous population based training waits for ever where the last trial to report has failed instead;
- population based training ends a process, and starts one anew with its workers, at each perturbation of a trial;
- a pause that overtakes a save ends the trial at its next save;
- a trial that fails by a user's mistake ends a process that the next trial could take over.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.utils import flatten_dict

from raylit.compat.private_names import explain_missing
from raylit.errors import RaylitError

_VERSION = "2.60"

try:
    from ray.air.execution._internal import RayActorManager
    from ray.tune import tune as tune_run
    from ray.tune.execution.tune_controller import TuneController
except ImportError as missing:
    raise RaylitError(explain_missing(f"ray's module {missing.name}", written_for=_VERSION)) from missing

_OVERRIDDEN = ("on_step_begin", "_schedule_trial_pause", "_schedule_trial_stop", "_set_trial_status")


class _Controller(TuneController):
    """Tune keeps a process only for a trial that already waits for one, and one more; this one also those of trials
    that pause, and of trials that fail by a mistake."""

    def is_reusable_after(self, exception: Exception | None) -> bool:
        raise NotImplementedError

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._actor_manager = _Actors(resource_manager=self._actor_manager._resource_manager)

    def on_step_begin(self) -> None:
        """Synchronous population based training goes on when the last trial reports; where the last one has ended
        instead, nobody asks it any more."""
        super().on_step_begin()
        is_standing_still = self._paused_trials and not (self._running_trials or self._pending_trials)
        if is_standing_still and isinstance(self._scheduler_alg, PopulationBasedTraining):
            trial = min(self._paused_trials, key=lambda trial: trial.trial_id)
            self._scheduler_alg.on_trial_result(self._wrapped(), trial, flatten_dict(trial.last_result))

    def _schedule_trial_pause(self, trial: Trial, should_checkpoint: bool = True) -> None:
        if should_checkpoint or trial not in self._trial_to_actor:
            super()._schedule_trial_pause(trial, should_checkpoint=should_checkpoint)
            return
        # What is staged is waited for by a trial: this one, from the moment on at which its process is free.
        self._staged_trials.add(trial)
        self._actor_cache.increase_max(trial.placement_group_factory)
        try:
            super()._schedule_trial_pause(trial, should_checkpoint=False)
        finally:
            self._staged_trials.discard(trial)
            self._actor_cache.decrease_max(trial.placement_group_factory)
        # Left by a pause that overtakes a save, of which no result comes any more: the next save would end the trial.
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


class _Actors(RayActorManager):
    """What Ray's memory monitor has killed is dead: to Tune its word on that is unexpected, and ends the run."""

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        super()._actor_task_failed(tracked_actor_task, _death(exception))

    def _actor_start_failed(self, tracked_actor: Any, exception: Exception) -> None:
        super()._actor_start_failed(tracked_actor, _death(exception))


def _death(exception: Exception) -> Exception:
    if isinstance(exception, OutOfMemoryError):
        death = ActorDiedError()
        death.error_msg = str(exception)
        return death
    return exception


@contextlib.contextmanager
def replace_controller(*, is_reusable_after: Callable[[Exception | None], bool]) -> Iterator[None]:
    """Have sweeps that start within this context run under this controller.

    Only for trials that all ask for the same resources, of which each can take any other's process.
    `is_reusable_after`: whether a trial's process is as good as new after this exception.

    Raises: RaylitError if the installed version of Ray does not have what the controller changes.
    """
    for name in _OVERRIDDEN:
        if not hasattr(TuneController, name):
            raise RaylitError(explain_missing(f"ray.tune.execution.TuneController.{name}", written_for=_VERSION))
    before = tune_run.TuneController  # type: ignore[attr-defined]

    class Controller(_Controller):
        def is_reusable_after(self, exception: Exception | None) -> bool:
            return is_reusable_after(exception)

    tune_run.TuneController = Controller  # type: ignore[attr-defined]
    try:
        yield
    finally:
        tune_run.TuneController = before  # type: ignore[attr-defined]
