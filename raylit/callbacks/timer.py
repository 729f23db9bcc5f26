"""Timer: ends training after a time. Driver only."""

import time
from datetime import timedelta
from typing import Any, Literal

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import ConfigError

Duration = str | timedelta | dict[str, int]

_UNITS = frozenset({"weeks", "days", "hours", "minutes", "seconds"})


class Timer(DriverCallback):
    """Ends training that has taken `duration`: at the next batch border, or with interval="epoch" at an epoch's end.

    The clock runs from the start of training and includes validation; a resumed run's goes on from what had passed.
    """

    def __init__(self, duration: Duration | None = None, interval: Literal["step", "epoch"] = "step") -> None:
        if interval not in ("step", "epoch"):
            raise ConfigError(f"Timer(interval={interval!r}): must be 'step' or 'epoch'")
        self.duration_s = None if duration is None else seconds_of(duration, name="duration")
        self._interval = interval
        self._started_at: float | None = None
        self._ended_at: float | None = None
        self._before_s = 0.0

    def time_elapsed(self) -> float:
        """Seconds of training so far."""
        if self._started_at is None:
            return self._before_s
        return self._before_s + (self._ended_at or time.monotonic()) - self._started_at

    def time_remaining(self) -> float | None:
        """Seconds until the end; None: there is no limit."""
        return None if self.duration_s is None else self.duration_s - self.time_elapsed()

    def on_train_start(self, run: Run) -> None:
        self._started_at, self._ended_at = time.monotonic(), None
        self._check(run)

    def on_tick(self, run: Run, batch: int, dataloader_idx: int) -> None:
        if self._interval == "step":
            self._check(run)

    def on_train_pause(self, run: Run) -> None:
        if self._interval == "step":
            self._check(run)

    def on_train_epoch_end(self, run: Run) -> None:
        self._check(run)

    def on_end(self, run: Run) -> None:
        self._ended_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": self.time_elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before_s = float(state_dict["time_elapsed"])

    def _check(self, run: Run) -> None:
        remaining_s = self.time_remaining()
        if self._started_at is not None and self._ended_at is None and remaining_s is not None and remaining_s <= 0:
            run.stop(f"the time limit of {self.duration_s:g} s is reached")


def seconds_of(duration: Duration, *, name: str) -> float:
    """From a timedelta, its keywords as a dict, or "DD:HH:MM:SS". ConfigError, which calls it by its name."""
    match duration:
        case timedelta():
            given = duration
        case dict() if duration.keys() <= _UNITS:
            given = timedelta(**duration)
        case str() if len(parts := duration.split(":")) == 4 and all(part.strip().isdigit() for part in parts):
            days, hours, minutes, seconds = map(int, parts)
            given = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        case _:
            raise ConfigError(
                f'{name}={duration!r}: must be "DD:HH:MM:SS", a timedelta, or a dict of its keywords: {{"hours": 1}}'
            )
    if given < timedelta(0):
        raise ConfigError(f"{name}={duration!r}: must not be negative")
    return given.total_seconds()
