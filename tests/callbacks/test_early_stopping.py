"""When early stopping asks for the end."""

import io
import logging
import math
from typing import Any

import pytest
import torch

from raylit.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from raylit.config import Plan, Validation
from raylit.errors import ConfigError
from raylit.protocol.state import Progress, RunState


class RecordedRun:
    """What a callback sees of a run; keeps the reasons for which it was asked to stop."""

    def __init__(self, plan: Plan | None = None, *, has_validation: bool = True) -> None:
        self.plan = plan or Plan()
        self.state = RunState(stage="fit", has_validation=has_validation)
        self.loggers: list[Any] = []
        self.log_dir = "."
        self.reasons: list[str] = []

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)

    def save_checkpoint(self, path: str, *, is_weights_only: bool = False) -> None:
        raise AssertionError("early stopping saves nothing")

    def remove_checkpoint(self, path: str) -> None:
        raise AssertionError("early stopping removes nothing")


def epochs_until_stop(callback: EarlyStopping, values: list[float], run: RecordedRun | None = None) -> int | None:
    """Return the index of the epoch at whose end the callback requested the stop; None if it never did."""
    run = run or RecordedRun()
    for epoch, value in enumerate(values):
        run.state.progress = Progress(epoch=epoch, global_step=epoch + 1, is_epoch_ended=True)
        run.state.callback_metrics[callback.monitor] = value
        callback.on_validation_end(run)
        callback.on_train_epoch_end(run)
        if run.reasons:
            return epoch
    return None


@pytest.mark.parametrize(
    ("arguments", "values", "expected"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 1], 3),
        ({"patience": 2}, [3, 2, 2, 1, 1, 1], 5),  # a gain starts the count anew
        ({"patience": 3}, [3, 4, 5, 6], 3),
        ({"patience": 0}, [3, 2, 2], 2),
        ({"patience": 1}, [3, 2, 1, 0], None),
        ({"patience": 1, "mode": "max"}, [1, 2, 1], 2),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.5, 2], 1),  # exactly min_delta is no gain
        ({"patience": 1, "min_delta": 0.5}, [3, 2.25, 1.5, 0.75], None),
        ({"patience": 1, "min_delta": 0.5, "mode": "max"}, [1, 1.75, 2.25], 2),
        ({"patience": 9}, [1, math.nan], 1),
        ({"patience": 9}, [1, -math.inf], 1),
        ({"patience": 2, "check_finite": False}, [1, math.nan, math.nan], 2),
        ({"patience": 9, "stopping_threshold": 1.0}, [2, 1.0, 0.9], 2),  # strictly beyond
        ({"patience": 9, "stopping_threshold": 0.9, "mode": "max"}, [0.5, 0.95], 1),
        ({"patience": 9, "divergence_threshold": 5.0}, [2, 5.0, 5.1], 2),
        ({"patience": 9, "divergence_threshold": 0.1, "mode": "max"}, [0.5, 0.05], 1),
    ],
)
def test_it_stops_after_the_expected_check(
    arguments: dict[str, Any], values: list[float], expected: int | None
) -> None:
    assert epochs_until_stop(EarlyStopping("loss", **arguments), values) == expected


@pytest.mark.parametrize(
    ("arguments", "values", "reason", "message"),
    [
        ({"patience": 1}, [1, 2], EarlyStoppingReason.PATIENCE_EXHAUSTED, "loss: no gain in 1 checks; the best was 1"),
        ({}, [1, math.nan], EarlyStoppingReason.NON_FINITE_METRIC, "loss=nan is not finite; the best was 1"),
        ({"stopping_threshold": 2}, [1], EarlyStoppingReason.STOPPING_THRESHOLD, "better than stopping_threshold=2"),
        ({"divergence_threshold": 0.5}, [1], EarlyStoppingReason.DIVERGENCE_THRESHOLD, "worse than divergence_thresh"),
    ],
)
def test_it_records_the_reason_and_the_epoch(
    arguments: dict[str, Any], values: list[float], reason: EarlyStoppingReason, message: str
) -> None:
    callback, run = EarlyStopping("loss", **arguments), RecordedRun()
    epoch = epochs_until_stop(callback, values, run)
    assert callback.stopped_epoch == epoch == len(values) - 1
    assert callback.stopping_reason is reason
    assert message in run.reasons[0]
    assert callback.stopping_reason_message == run.reasons[0]


def test_before_a_stop_there_is_no_reason() -> None:
    callback = EarlyStopping("loss")
    assert epochs_until_stop(callback, [3, 2]) is None
    assert callback.stopping_reason is EarlyStoppingReason.NOT_STOPPED
    assert (callback.stopped_epoch, callback.stopping_reason_message) == (0, None)


def test_the_best_score_is_a_tensor() -> None:
    callback = EarlyStopping("loss", mode="max")
    assert callback.best_score.item() == -math.inf
    epochs_until_stop(callback, [0.25, 0.75, 0.5])
    assert torch.equal(callback.best_score, torch.tensor(0.75))
    assert callback.wait_count == 1


# When it checks


def checks(
    callback: EarlyStopping, *, interval: float = 1.0, every_n_epochs: int = 1, has_validation: bool = True
) -> tuple[bool, bool]:
    """Whether a bad value stops after a validation, and at a training epoch's end."""
    seen = []
    for hook in ("on_validation_end", "on_train_epoch_end"):
        validation = Validation(interval=interval, every_n_epochs=every_n_epochs)
        run = RecordedRun(Plan(validation=validation), has_validation=has_validation)
        run.state.callback_metrics["loss"] = math.nan
        getattr(callback, hook)(run)
        seen.append(bool(run.reasons))
    return seen[0], seen[1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (False, True)),
        ({"interval": 0.5}, (True, False)),
        ({"interval": 1}, (True, False)),  # after every batch
        ({"every_n_epochs": 2}, (True, False)),
        ({"has_validation": False, "interval": 0.5}, (False, True)),
    ],
)
def test_it_checks_once_for_each_validation_or_epoch(settings: dict[str, Any], expected: tuple[bool, bool]) -> None:
    assert checks(EarlyStopping("loss"), **settings) == expected
    assert checks(EarlyStopping("loss", check_on_train_epoch_end=True), **settings) == (False, True)
    assert checks(EarlyStopping("loss", check_on_train_epoch_end=False), **settings) == (True, False)


def test_the_time_of_the_check_follows_each_runs_validation() -> None:
    callback = EarlyStopping("loss")
    assert checks(callback, interval=0.5) == (True, False)
    assert checks(callback) == (False, True)


@pytest.mark.parametrize("kind", ["dev run", "sanity check", "validate"])
def test_it_does_not_check_outside_of_training(kind: str) -> None:
    run = RecordedRun(Plan(is_dev_run=kind == "dev run"))
    run.state.is_sanity_checking = kind == "sanity check"
    run.state.stage = "validate" if kind == "validate" else "fit"
    callback = EarlyStopping("loss")
    assert epochs_until_stop(callback, [math.nan], run) is None
    run.state.callback_metrics.clear()
    callback.on_train_epoch_end(run)  # nor does it miss the metric


# A missing metric


def test_a_missing_metric_is_an_error_that_names_the_others() -> None:
    run = RecordedRun()
    run.state.callback_metrics.update(val_acc=1.0, train_loss=2.0)
    with pytest.raises(ConfigError, match=r"monitor='val_loss'.*there are: train_loss, val_acc\..*strict=False"):
        EarlyStopping("val_loss").on_train_epoch_end(run)


def test_a_missing_metric_is_a_warning_without_strict() -> None:
    callback, run = EarlyStopping("val_loss", strict=False, patience=0), RecordedRun()
    with pytest.warns(RuntimeWarning, match=r"monitor='val_loss'.*there are: none"):
        callback.on_train_epoch_end(run)
    assert (run.reasons, callback.wait_count) == ([], 0)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"mode": "auto"}, "mode='auto'.*'min' or 'max'"), ({"patience": -1}, "patience=-1.*0")]
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EarlyStopping("loss", **arguments)


def test_verbose_logs_gains_and_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="raylit"):
        epochs_until_stop(EarlyStopping("loss", patience=1, verbose=False), [2, 1, 1])
        assert caplog.messages == []
        epochs_until_stop(EarlyStopping("loss", patience=1, verbose=True), [2, 1, 1])
    assert caplog.messages == [
        "loss=2 is the new best; it was inf",
        "loss=1 is the new best; it was 2",
        "loss: no gain in 1 checks; the best was 1",
    ]


# State


def test_a_resumed_run_continues_the_wait_count() -> None:
    first = EarlyStopping("loss", patience=3)
    epochs_until_stop(first, [1, 2, 2])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed = EarlyStopping("loss", patience=9)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert (resumed.wait_count, resumed.patience, resumed.best_score.item()) == (2, 3, 1.0)
    assert epochs_until_stop(resumed, [2]) == 0


def test_the_state_of_a_stopped_run_is_restored() -> None:
    first, resumed = EarlyStopping("loss", patience=1), EarlyStopping("loss")
    epochs_until_stop(first, [1, 2])
    resumed.load_state_dict(first.state_dict())
    assert resumed.stopped_epoch == 1
    assert resumed.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert resumed.stopping_reason_message == first.stopping_reason_message


def test_lightnings_state_is_loaded() -> None:
    callback = EarlyStopping("loss")
    lightnings = {"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(0.5), "patience": 2}
    callback.load_state_dict(lightnings)
    assert epochs_until_stop(callback, [0.75]) == 0


def test_the_state_key_is_lightnings() -> None:
    assert EarlyStopping("val_loss").state_key == "EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"


def test_log_rank_zero_only_has_no_effect() -> None:
    assert epochs_until_stop(EarlyStopping("loss", patience=1, log_rank_zero_only=True), [1, 2]) == 1
