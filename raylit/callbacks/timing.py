"""When driver callbacks act: epochs, validations, time intervals, and what is logged then."""

import math
import time
from datetime import timedelta

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import CheckpointError


def is_validated_by_epoch_end(run: Run) -> bool:
    """Every training epoch's end has all the metrics there will be: validation runs once in each epoch, or never."""
    validation = run.plan.validation
    is_whole = isinstance(validation.interval, float) and validation.interval == 1.0 and validation.interval_s is None
    return not run.state.has_validation or (is_whole and validation.every_n_epochs == 1)


def is_saved_at_epoch_end(run: Run, given: bool | None) -> bool:
    """What was asked for; else where there are no more metrics to come."""
    return is_validated_by_epoch_end(run) if given is None else given


def is_validation_next(run: Run) -> bool:
    """Validation is due at this batch border. Never certain of one by time."""
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
    """Tells when a time interval has passed, and at about which optimizer step it will have. None: never."""

    def __init__(self, interval: timedelta | None) -> None:
        self._interval_s = None if interval is None else interval.total_seconds()
        self.start(0)

    def start(self, step: int) -> None:
        self._start_s = self._last_s = time.monotonic()
        self._first_step = step

    def reset(self) -> None:
        """The next interval begins now."""
        self._last_s = time.monotonic()

    def is_due(self) -> bool:
        """True once for each interval."""
        now_s = time.monotonic()
        if self._interval_s is None or now_s - self._last_s < self._interval_s:
            return False
        self._last_s = now_s
        return True

    def next_step(self, step: int) -> int | None:
        """By the rate so far, which the first step tells first. An estimate too low only means to be asked again."""
        if self._interval_s is None:
            return None
        now_s = time.monotonic()
        steps_per_s = (step - self._first_step) / max(now_s - self._start_s, 1e-9)
        return step + max(1, math.ceil(steps_per_s * (self._last_s + self._interval_s - now_s)))


class SavedReport(DriverCallback):
    """Whoever gets the report counts on its checkpoint: it is there before, or the save's error ends the run."""

    def save(self, run: Run, path: str) -> None:
        run.save_checkpoint(path)
        run.finish_saves()

    def on_save_end(self, run: Run, path: str, error: CheckpointError | None) -> None:
        if error is not None:
            raise error
