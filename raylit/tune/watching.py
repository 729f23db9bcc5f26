"""Watcher: Tune's events as lines of progress; Ending: an end to runs that cannot work. Driver."""

import os
import sys
import time
from collections import Counter
from typing import Any

import cloudpickle
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from raylit.tune.records import Mode, is_better, is_number
from raylit.tune.trial import TrialFailed

_BETWEEN_LINES_S = 10.0


class Ending(tune.Stopper):
    """Ends a run whose trials would all fail in the same way."""

    def __init__(self) -> None:
        self.is_due = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.is_due


class Watcher(tune.Callback):
    """Says how far the trials are and which have failed."""

    def __init__(self, *, title: str, metric: str | None, mode: Mode, ending: Ending, is_shown: bool = True) -> None:
        self._title = title
        self._metric = metric
        self._mode = mode
        self._ending = ending
        self._is_shown = is_shown
        self._best: float | None = None
        self._best_id = ""
        self._shown_at_s = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        value = result.get(self._metric or "")
        if is_number(value) and (self._best is None or is_better(value, self._best, self._mode)):
            self._best, self._best_id = value, trial.trial_id
        self._say(trials)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        error = error_of(trial)
        if isinstance(error, TrialFailed) and error.is_fatal:
            self._ending.is_due = True
            return
        self._write(f"trial {trial.trial_id} failed with {trial.config}:\n{error}")

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._say(trials)

    def _say(self, trials: list[TuneTrial]) -> None:
        if not self._is_shown or time.monotonic() - self._shown_at_s < _BETWEEN_LINES_S:
            return
        self._shown_at_s = time.monotonic()
        self._write(self._progress(trials))

    def _progress(self, trials: list[TuneTrial]) -> str:
        counts = Counter(trial.status for trial in trials)
        parts = [f"{counts['TERMINATED']} trials done", f"{counts['RUNNING']} running"]
        if counts["ERROR"]:
            parts.append(f"{counts['ERROR']} failed")
        if self._best is not None:
            parts.append(f"best {self._metric}={self._best:.4g} (trial {self._best_id})")
        return ", ".join(parts)

    def _write(self, text: str) -> None:
        sys.stderr.write(f"raylit: {self._title}: {text}\n")
        sys.stderr.flush()


def error_of(trial: TuneTrial) -> BaseException | None:
    """What ended a failed trial: raylit's own words where it got to say them."""
    error: Any = None
    if os.path.exists(trial.pickled_error_file or ""):
        with open(trial.pickled_error_file, "rb") as file:
            error = cloudpickle.load(file)
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, TrialFailed) else error
