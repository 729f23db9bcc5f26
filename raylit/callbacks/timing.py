"""Timing of driver callbacks: ends of epochs, validations and time intervals. Driver."""

import math
import time
from datetime import timedelta

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import CheckpointError


def is_validated_by_epoch_end(run: Run) -> bool:
    """Return whether every training epoch's end has all metrics: validation runs once in each epoch, or never."""
    validation = run.plan.validation
    is_whole = isinstance(validation.interval, float) and validation.interval == 1.0 and validation.interval_s is None
    return not run.state.has_validation or (is_whole and validation.every_n_epochs == 1)


def is_saved_at_epoch_end(run: Run, setting: bool | None) -> bool:
    """Return the user's setting; without one, whether no more metrics come after an epoch's end."""
    return is_validated_by_epoch_end(run) if setting is None else setting


def is_validation_next(run: Run) -> bool:
    """Return whether validation is due at the current batch; False for validation at time intervals."""
    progress, validation, num_batches = run.state.progress, run.plan.validation, run.state.num_training_batches
    every = validation.every_n_epochs
    if not run.state.has_validation or validation.interval_s is not None:
        return False
    if every is not None and (progress.epoch + 1) % every != 0:
        return False
    if isinstance(validation.interval, int):
        return (progress.batch + (progress.batches_before if every is None else 0)) % validation.interval == 0
    if validation.interval == 1.0:
        return progress.batch >= num_batches
    return progress.batch % max(1, int(num_batches * validation.interval)) == 0


class Clock:
    """Clock for a time interval, which also estimates the optimizer step at which it will have passed.

    Without an interval nothing is ever due.
    """

    def __init__(self, interval: timedelta | None) -> None:
        self._interval_s = None if interval is None else interval.total_seconds()
        self.start(0)

    def start(self, step: int) -> None:
        """Begin the first interval at this optimizer step."""
        self._start_s = self._last_s = time.monotonic()
        self._first_step = step

    def reset(self) -> None:
        """Begin the next interval now."""
        self._last_s = time.monotonic()

    def is_due(self) -> bool:
        """Return True once for each interval that has passed."""
        now_s = time.monotonic()
        if self._interval_s is None or now_s - self._last_s < self._interval_s:
            return False
        self._last_s = now_s
        return True

    def next_step(self, step: int) -> int | None:
        """Estimate the optimizer step at which the interval will have passed, from the speed so far.

        The first estimate after the start is the next step. An estimate that is too low only leads to another call.
        """
        if self._interval_s is None:
            return None
        now_s = time.monotonic()
        steps_per_s = (step - self._first_step) / max(now_s - self._start_s, 1e-9)
        return step + max(1, math.ceil(steps_per_s * (self._last_s + self._interval_s - now_s)))


class SavedReport(DriverCallback):
    """Base of callbacks that report metrics together with a checkpoint.

    The checkpoint is written before the report is sent; an error of the save ends the run.
    """

    def save(self, run: Run, path: str) -> None:
        """Save the run to `path` and wait until the file is written."""
        run.save_checkpoint(path)
        run.finish_saves()

    def on_save_end(self, run: Run, path: str, error: CheckpointError | None) -> None:
        if error is not None:
            raise error
