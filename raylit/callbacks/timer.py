"""Timer: ends training after a given time. Driver only."""

import logging
import time
from datetime import timedelta
from typing import Any, Literal

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import ConfigError

_log = logging.getLogger(__name__)

Duration = str | timedelta | dict[str, int]

_STAGES = ("train", "validate", "sanity_check", "test", "predict")
_UNITS = frozenset({"weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds"})


class Timer(DriverCallback):
    """Driver callback that ends training after `duration`.

    The clock runs from the start of training and includes validation; a resumed run continues from the time that had
    passed. `time_elapsed` and the other methods report on a stage: "train", "validate", "sanity_check", "test" or
    "predict"; for one that runs several times, on the last run of it.

    Args:
        duration: "DD:HH:MM:SS", a timedelta, or a dict of its keywords; None: only measure.
        interval: Stop between two batches ("step") or at the end of an epoch ("epoch").
        verbose: Log the stop.

    Raises:
        ConfigError: if the interval or duration is invalid.
    """

    def __init__(
        self,
        duration: Duration | None = None,
        interval: Literal["step", "epoch"] = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise ConfigError(f"Timer(interval={interval!r}): must be 'step' or 'epoch'")
        self.duration_s = None if duration is None else parse_seconds(duration, name="duration")
        self.verbose = verbose
        self._interval = interval
        self.reset_state()

    def reset_state(self) -> None:
        self._started_at: dict[str, float] = {}
        self._ended_at: dict[str, float] = {}
        self._before_s = 0.0

    def start_time(self, stage: str = "train") -> float | None:
        """Return when the stage began, by time.monotonic(); None if it has not begun."""
        return self._started_at.get(_check_stage(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """Return when the stage ended, by time.monotonic(); None if it has not ended."""
        return self._ended_at.get(_check_stage(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Return the seconds that the stage has taken so far."""
        before_s = self._before_s if stage == "train" else 0.0
        start = self.start_time(stage)
        return before_s if start is None else before_s + self._ended_at.get(stage, time.monotonic()) - start

    def time_remaining(self, stage: str = "train") -> float | None:
        """Return the seconds until training ends; None if there is no limit."""
        return None if self.duration_s is None else self.duration_s - self.time_elapsed(stage)

    def on_train_start(self, run: Run) -> None:
        self._start("train")
        self._check(run)

    def on_tick(self, run: Run, batch: int, dataloader_idx: int) -> None:
        if self._interval == "step":
            self._check(run)

    def on_train_pause(self, run: Run) -> None:
        if self._interval == "step":
            self._check(run)

    def on_train_epoch_end(self, run: Run) -> None:
        self._check(run)

    def on_evaluation_start(self, run: Run, stage: str) -> None:
        self._start("sanity_check" if run.state.is_sanity_checking else stage)

    def on_evaluation_end(self, run: Run, stage: str) -> None:
        self._ended_at["sanity_check" if run.state.is_sanity_checking else stage] = time.monotonic()

    def on_end(self, run: Run) -> None:
        for stage in self._started_at:
            self._ended_at.setdefault(stage, time.monotonic())

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before_s = float(state_dict["time_elapsed"]["train"])

    def _start(self, stage: str) -> None:
        self._started_at[stage] = time.monotonic()
        self._ended_at.pop(stage, None)

    def _check(self, run: Run) -> None:
        is_running = "train" in self._started_at and "train" not in self._ended_at
        remaining_s = self.time_remaining()
        if not is_running or remaining_s is None or remaining_s > 0:
            return
        reason = f"the time limit of {self.duration_s:g} s is reached"
        if self.verbose and run.state.stop_reason is None:
            _log.info(reason)
        run.stop(reason)


def parse_seconds(duration: Duration, *, name: str) -> float:
    """Return the seconds of a timedelta, a dict of its keywords, or "DD:HH:MM:SS".

    Raises:
        ConfigError: if it is neither, or negative; the message uses `name`.
    """
    match duration:
        case timedelta():
            delta = duration
        case dict() if duration.keys() <= _UNITS:
            delta = timedelta(**duration)
        case str() if len(parts := duration.split(":")) == 4 and all(part.strip().isdigit() for part in parts):
            days, hours, minutes, seconds = map(int, parts)
            delta = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        case _:
            raise ConfigError(
                f'{name}={duration!r}: must be "DD:HH:MM:SS", a timedelta, or a dict of its keywords: {{"hours": 1}}'
            )
    if delta < timedelta(0):
        raise ConfigError(f"{name}={duration!r}: must not be negative")
    return delta.total_seconds()


def _check_stage(stage: str) -> str:
    if stage not in _STAGES:
        raise ConfigError(f"Timer: there is no stage {stage!r}, but {', '.join(_STAGES)}")
    return stage
