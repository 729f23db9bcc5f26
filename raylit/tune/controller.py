"""own_controller: Ray Tune's, except where that ends a process, or the whole run, without need. Driver."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.air.execution._internal import RayActorManager
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.tune import tune as tune_run
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.utils import flatten_dict

from raylit.tune.trial import TrialFailed


class _Controller(TuneController):
    """Tune keeps a process only for a trial that already waits for one, and one more; those of the other trials that
    pause it ends, to start as many anew when they go on: with population based training at every perturbation. And it
    ends that of every trial that fails."""

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

    def _schedule_trial_pause(self, trial: TuneTrial, should_checkpoint: bool = True) -> None:
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

    def _schedule_trial_stop(self, trial: TuneTrial, exception: Exception | None = None) -> None:
        cause = getattr(exception, "cause", None)
        if isinstance(cause, TrialFailed) and cause.is_harmless and trial in self._trial_to_actor:
            self._mark_trial_to_checkpoint(trial)
            self._maybe_cache_trial_actor(trial)  # Tune then finds no process to end
        super()._schedule_trial_stop(trial, exception)

    def _set_trial_status(self, trial: TuneTrial, status: str) -> None:
        was_paused = trial.status == TuneTrial.PAUSED
        super()._set_trial_status(trial, status)
        is_paused = trial.status == TuneTrial.PAUSED
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
def own_controller() -> Iterator[None]:
    """Tune offers no switch: its controller is another one while this lasts. Only for trials that all ask for the
    same resources, of which each can take any other's process."""
    before = tune_run.TuneController  # type: ignore[attr-defined]
    tune_run.TuneController = _Controller  # type: ignore[attr-defined]
    try:
        yield
    finally:
        tune_run.TuneController = before  # type: ignore[attr-defined]
