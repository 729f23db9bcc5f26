"""Rules by which a fit validates and ends, from the plan and the sizes of the loaders. Driver."""

import math
import warnings
from dataclasses import replace
from datetime import timedelta

from raylit.callbacks.timing import Clock
from raylit.config import Plan
from raylit.errors import ConfigError
from raylit.protocol.messages import Reloaded, Started
from raylit.protocol.state import Progress, RunState


class Schedule:
    """Schedule of validations and of the end of a run, computed from the run's state.

    It keeps the plan, the validation interval in batches (or the time of the last validation) and the epoch of the
    loaders.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._validation_batches = math.inf
        interval_s = plan.validation.interval_s
        self._clock = None if interval_s is None else Clock(timedelta(seconds=interval_s))
        """Clock of a validation by time."""
        self._loaded_epoch = 0
        self._num_batches = math.inf
        """Batches of an epoch; the epoch under way may have another number, see `Started`."""
        self._irregular_epoch: int | None = None

    def set_sizes(self, state: RunState, started: Started | Reloaded) -> None:
        """Set the loaders' sizes.

        Raises:
            ConfigError: Validation would only be due after the end of an epoch, or a limit does not fit the loaders.
        """
        self._loaded_epoch = state.progress.at_next_batch().epoch
        if state.stage == "fit":
            self._num_batches = state.num_training_batches = started.num_training_batches
        state.num_val_batches = started.num_eval_batches
        if state.stage == "fit" and started.num_training_batches == 0 and self._plan.limits.train_batches == 1.0:
            warnings.warn(
                "the training loader has no batch for the workers: its data set is empty, or drop_last drops it all. "
                "Nothing is trained",
                stacklevel=2,
            )
        state.has_validation = state.stage == "fit" and any(num > 0 for num in started.num_eval_batches)
        self._check_limits(state)
        if state.has_validation:
            self._validation_batches = self._convert_interval_to_batches(started.num_training_batches)
        self._irregular_epoch = None
        if isinstance(started, Started) and started.num_batches_in_epoch != started.num_training_batches:
            self._irregular_epoch = self._loaded_epoch
            state.num_training_batches = started.num_batches_in_epoch

    def begin_epoch(self, state: RunState) -> None:
        """Set the usual number of batches, unless a run with another number of workers has begun this epoch."""
        if state.progress.epoch != self._irregular_epoch:
            state.num_training_batches = self._num_batches

    @property
    def last_step(self) -> float:
        max_steps = self._plan.limits.max_steps
        return math.inf if max_steps is None else max_steps

    def next_decision_step(self, state: RunState) -> float:
        """Return the next optimizer step at which training may have to end or validate.

        That is the last step, the minimum after which a stop may happen, or the step at which a validation by time is
        due.
        """
        min_steps, step = self._plan.limits.min_steps, state.progress.global_step
        if self.may_stop(state):
            return step + 1  # a stop was requested before the epoch's first batch
        end = min(self.last_step, min_steps) if step < min_steps else self.last_step
        if self._clock is None or not self._is_validation_epoch(state):
            return end
        return min(end, self._clock.next_step(step) or math.inf)

    def has_sanity_check(self, state: RunState) -> bool:
        return state.has_validation and self._plan.limits.sanity_val_batches != 0 and not self._is_nothing_left(state)

    def is_reload_due(self, state: RunState) -> bool:
        """Return True if the hooks must create new loaders at the start of this epoch."""
        every_n_epochs, epoch = self._plan.reload_loaders_every_n_epochs, state.progress.epoch
        return every_n_epochs > 0 and epoch % every_n_epochs == 0 and epoch != self._loaded_epoch

    def is_finished(self, state: RunState) -> bool:
        """Return True if no further epoch is to be trained. Asked between two epochs."""
        return self._is_nothing_left(state) or self.may_stop(state)

    def begin(self, state: RunState, *, is_continued: bool) -> None:
        """Start the clock; warn if the run resumes from a checkpoint and has nothing left to train."""
        if self._clock is not None:
            self._clock.start(state.progress.global_step)
        if not is_continued or not self.is_finished(state):
            return
        limits, epochs, step = self._plan.limits, _count_epochs_done(state.progress), state.progress.global_step
        limits_by_name = {"max_epochs": limits.max_epochs, "max_steps": limits.max_steps}
        limit = " and ".join(f"{name}={value}" for name, value in limits_by_name.items() if value is not None)
        warnings.warn(
            f"nothing is left to train: the checkpoint is of epoch {epochs}, step {step}, the limit is {limit}",
            stacklevel=2,
        )

    def may_stop(self, state: RunState) -> bool:
        """Return True if a stop is requested and the minimum numbers of epochs and steps are reached."""
        limits = self._plan.limits
        return (
            state.stop_reason is not None
            and _count_epochs_done(state.progress) >= limits.min_epochs
            and state.progress.global_step >= limits.min_steps
        )

    def is_run_over(self, state: RunState) -> bool:
        """Return True if training ends here, inside an epoch or at its end."""
        return state.progress.global_step >= self.last_step or self.may_stop(state)

    def next_validation_batch(self, state: RunState) -> float:
        """Return the batch of this epoch, counted from 1, after which validation is due."""
        if not self._is_validation_epoch(state) or math.isinf(self._validation_batches):
            return math.inf
        if self.is_validation_owed(state):
            return state.progress.batch
        before = self._count_batches_before(state.progress)
        done = before + state.progress.batch
        interval = self._get_interval(state)
        return (done // interval + 1) * interval - before

    def is_validation_owed(self, state: RunState) -> bool:
        """Return True if the run resumes from a checkpoint saved before the validation that was due at its batch."""
        progress = state.progress
        is_validated = progress.validated_batch == progress.batch or not self._is_validation_epoch(state)
        if is_validated or not progress.is_inside_epoch or math.isinf(self._validation_batches):
            return False
        return (self._count_batches_before(progress) + progress.batch) % self._get_interval(state) == 0

    def is_validation_due(self, state: RunState, *, is_epoch_finished: bool) -> bool:
        progress = state.progress
        if not self._is_validation_epoch(state) or progress.batch in (0, progress.validated_batch):
            return False
        if self._clock is not None:
            return self._clock.is_due() or self.may_stop(state)
        if math.isinf(self._validation_batches):
            return is_epoch_finished
        done = self._count_batches_before(progress) + progress.batch
        validation = self._plan.validation
        # The length of an iterable data set is an estimate: the epoch may end before it. A fraction of an epoch that
        # another number of workers has begun need not fall on its end.
        is_by_epoch = validation.interval == 1.0 or (
            isinstance(validation.interval, float) and self._is_irregular_epoch(state)
        )
        is_at_end = is_epoch_finished and is_by_epoch and validation.every_n_epochs is not None
        return is_at_end or done % self._get_interval(state) == 0 or self.may_stop(state)

    def progress_after_evaluation(self, state: RunState) -> Progress:
        """Return the progress after an evaluation."""
        if state.stage != "fit" or state.is_sanity_checking:
            return state.progress
        if self._clock is not None:
            self._clock.reset()
        return replace(state.progress, validated_batch=state.progress.batch)

    def _is_validation_epoch(self, state: RunState) -> bool:
        every_n_epochs = self._plan.validation.every_n_epochs
        return state.has_validation and (every_n_epochs is None or (state.progress.epoch + 1) % every_n_epochs == 0)

    def _count_batches_before(self, progress: Progress) -> int:
        """Return the number of batches before this epoch, if the interval counts across epochs, else 0."""
        return progress.batches_before if self._plan.validation.every_n_epochs is None else 0

    def _is_irregular_epoch(self, state: RunState) -> bool:
        return state.progress.epoch == self._irregular_epoch

    def _get_interval(self, state: RunState) -> float:
        is_whole = isinstance(self._plan.validation.interval, float) and self._plan.validation.interval == 1.0
        return state.num_training_batches if is_whole and self._is_irregular_epoch(state) else self._validation_batches

    def _convert_interval_to_batches(self, num_batches: float) -> float:
        validation = self._plan.validation
        interval = validation.interval
        if validation.interval_s is not None:
            return math.inf
        if isinstance(interval, int):
            if interval > num_batches and validation.every_n_epochs is not None:
                raise ConfigError(
                    f"val_check_interval={interval} is more than the {num_batches:g} training batches of an epoch: "
                    "lower it, give a fraction of the epoch, or count batches across epochs with "
                    "check_val_every_n_epoch=None"
                )
            return interval
        if interval == 1.0:
            return num_batches
        if math.isinf(num_batches):
            raise ConfigError(
                f"val_check_interval={interval} of a training loader without a length: give an int, or 1.0"
            )
        return max(1, int(num_batches * interval))

    def _check_limits(self, state: RunState) -> None:
        """Raise ConfigError for a fraction of a loader without a length, or one that leaves no batch."""
        limits = self._plan.limits
        evaluation_limits = {"test": ("test", limits.test_batches), "predict": ("predict", limits.predict_batches)}
        name, limit = evaluation_limits.get(state.stage, ("val", limits.val_batches))
        loaders = [(name, limit, num_batches) for num_batches in state.num_val_batches]
        if state.stage == "fit" and not limits.overfit_batches:
            loaders.append(("train", limits.train_batches, state.num_training_batches))
        for name, limit, num_batches in loaders:
            if not isinstance(limit, float) or limit in (0.0, 1.0):
                continue
            if math.isinf(num_batches):
                raise ConfigError(
                    f"limit_{name}_batches={limit} of a {name} loader without a length: give an int, or 1.0"
                )
            if num_batches == 0:
                raise ConfigError(
                    f"limit_{name}_batches={limit} of the {name} loader is less than one batch for each worker: raise "
                    "it, or give a count of batches"
                )

    def _is_nothing_left(self, state: RunState) -> bool:
        """Return True if nothing is left to train."""
        limits = self._plan.limits
        has_epochs = limits.max_epochs is None or _count_epochs_done(state.progress) < limits.max_epochs
        return not has_epochs or state.progress.global_step >= self.last_step or state.num_training_batches == 0


def _count_epochs_done(progress: Progress) -> int:
    return progress.epoch + progress.is_epoch_ended
