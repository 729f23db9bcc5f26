"""When epochs, validations and time intervals are due."""

import math
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from raylit.callbacks.timing import Clock, is_validated_by_epoch_end, is_validation_next
from raylit.config import Plan, Validation
from raylit.protocol.state import Progress, RunState


class RecordedRun:
    """A run at a batch border."""

    def __init__(
        self,
        *,
        interval: float = 1.0,
        every_n_epochs: int = 1,
        epoch: int = 0,
        batch: int = 4,
        num_batches: float = 4,
        has_validation: bool = True,
    ) -> None:
        self.plan = Plan(validation=Validation(interval=interval, every_n_epochs=every_n_epochs))
        self.state = RunState(stage="fit", num_training_batches=num_batches, has_validation=has_validation)
        self.state.progress = Progress(epoch=epoch, batch=batch)
        self.loggers: list[Any] = []
        self.log_dir = "."

    def stop(self, reason: str) -> None: ...
    def save_checkpoint(self, path: str, *, is_weights_only: bool = False) -> None: ...
    def remove_checkpoint(self, path: str) -> None: ...


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"batch": 3}, False),
        ({"has_validation": False}, False),
        ({"every_n_epochs": 2}, False),
        ({"every_n_epochs": 2, "epoch": 1}, True),
        ({"interval": 0.5, "batch": 2}, True),
        ({"interval": 0.5, "batch": 3}, False),
        ({"interval": 0.3, "num_batches": 10, "batch": 9}, True),
        ({"interval": 0.01, "batch": 3}, True),
        ({"interval": 3, "batch": 3}, True),
        ({"interval": 3, "batch": 4}, False),
        ({"interval": 3, "num_batches": math.inf, "batch": 6}, True),
        ({"num_batches": math.inf}, False),
    ],
    ids=repr,
)
def test_is_validation_next_at_each_batch(settings: dict[str, Any], expected: bool) -> None:
    assert is_validation_next(RecordedRun(**settings)) is expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"interval": 0.5}, False),
        ({"interval": 1}, False),
        ({"every_n_epochs": 2}, False),
        ({"every_n_epochs": 2, "interval": 1, "has_validation": False}, True),
    ],
    ids=repr,
)
def test_is_validated_by_epoch_end_for_each_setting(settings: dict[str, Any], expected: bool) -> None:
    assert is_validated_by_epoch_end(RecordedRun(**settings)) is expected


def test_without_an_interval_nothing_is_ever_due() -> None:
    clock = Clock(None)
    assert (clock.is_due(), clock.next_step(5)) == (False, None)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the clock's time, which the test sets."""
    set_s = [100.0]
    monkeypatch.setattr("raylit.callbacks.timing.time", SimpleNamespace(monotonic=lambda: set_s[0]))
    return set_s


def test_an_interval_is_due_once_each_time_it_has_passed(now: list[float]) -> None:
    clock = Clock(timedelta(seconds=5))
    clock.start(0)
    assert not clock.is_due()
    now[0] += 6
    assert clock.is_due()
    assert not clock.is_due()


def test_the_next_step_is_estimated_from_the_steps_since_the_start(now: list[float]) -> None:
    clock = Clock(timedelta(seconds=1000))
    clock.start(10)
    assert clock.next_step(10) == 11
    now[0] += 10
    assert clock.next_step(30) == 30 + 2 * 990


def test_an_interval_that_has_passed_asks_for_the_next_step(now: list[float]) -> None:
    clock = Clock(timedelta(seconds=1))
    clock.start(0)
    now[0] += 2
    assert clock.next_step(100) == 101
