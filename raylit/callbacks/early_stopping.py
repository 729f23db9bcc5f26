"""EarlyStopping: ends training when a metric no longer improves. Driver only."""

import enum
import logging
import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from raylit.callbacks.base import DriverCallback, Run
from raylit.callbacks.timing import is_validated_by_epoch_end
from raylit.errors import ConfigError

_log = logging.getLogger(__name__)

_AUTOMATIC_MONITORS = ("early_stop_on", "val_loss")


class EarlyStoppingReason(enum.Enum):
    """Reason why the end of training was requested."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(DriverCallback):
    """Driver callback that stops the run after `patience` checks in a row without an improvement.

    Args:
        monitor: Name of the metric; None follows `early_stop_on` if that is logged, else `val_loss`.
        min_delta: Least improvement that counts.
        patience: Number of checks in a row without an improvement after which to stop.
        verbose: Log improvements and the stop.
        mode: Whether the metric should be "min" or "max".
        strict: Raise an error if the metric is missing, instead of a warning.
        check_finite: Stop at NaN and infinity.
        stopping_threshold: Stop at a value strictly better than this one.
        divergence_threshold: Stop at a value strictly worse than this one.
        check_on_train_epoch_end: Check after each training epoch instead of after each validation. None does so if
            validation runs once in every epoch, or never. An epoch inside which the run ends is not checked.
        log_rank_zero_only: Accepted for compatibility with Lightning, without effect: only the driver logs.

    Raises:
        ConfigError: if `mode` or `patience` is invalid; during a run, if the metric is missing with `strict`.
    """

    def __init__(
        self,
        monitor: str | None = None,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: Literal["min", "max"] = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"EarlyStopping(mode={mode!r}): must be 'min' or 'max'")
        if patience < 0:
            raise ConfigError(f"EarlyStopping(patience={patience}): must be at least 0")
        self.monitor = monitor
        self.min_delta = min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self._patience_before: int | None = None
        """The user's `patience`, while a value from a checkpoint replaces it."""
        self.reset_state()

    def reset_state(self) -> None:
        if self._patience_before is not None:
            self.patience, self._patience_before = self._patience_before, None
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._best_score = math.inf if self.mode == "min" else -math.inf

    @property
    def best_score(self) -> Tensor:
        """The best value so far, 0-dim; infinite before the first check."""
        return torch.tensor(self._best_score)

    def on_validation_end(self, run: Run) -> None:
        if not self._is_checked_at_epoch_end(run):
            self._check(run)

    def on_train_epoch_end(self, run: Run) -> None:
        if not run.state.is_epoch_cut_short and self._is_checked_at_epoch_end(run):
            self._check(run)

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{ {'monitor': self.monitor, 'mode': self.mode}!r}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self._best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self._best_score = float(state_dict["best_score"])
        self._patience_before, self.patience = self.patience, state_dict["patience"]
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")

    def _is_checked_at_epoch_end(self, run: Run) -> bool:
        if self._check_on_train_epoch_end is not None:
            return self._check_on_train_epoch_end
        return is_validated_by_epoch_end(run)

    def _check(self, run: Run) -> None:
        if run.plan.is_dev_run or run.state.stage != "fit" or run.state.is_sanity_checking:
            return
        metrics = run.state.callback_metrics
        name = self.monitor or next((name for name in _AUTOMATIC_MONITORS if name in metrics), _AUTOMATIC_MONITORS[-1])
        if name not in metrics:
            self._handle_missing_metric(name, sorted(metrics))
            return
        reason, message = self._judge(name, metrics[name])
        if reason is not EarlyStoppingReason.NOT_STOPPED:
            self.stopped_epoch = run.state.progress.epoch
            self.stopping_reason = reason
            self.stopping_reason_message = message
            run.stop(message)
        if message and self.verbose:
            _log.info(message)

    def _handle_missing_metric(self, name: str, names: list[str]) -> None:
        message = (
            f"EarlyStopping(monitor={name!r}): no such metric has been logged; there are: "
            f"{', '.join(names) or 'none'}. Log it with self.log, or monitor one of these"
        )
        if self.strict:
            raise ConfigError(f"{message}; strict=False passes over it")
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _judge(self, name: str, value: float) -> tuple[EarlyStoppingReason, str]:
        """Record the value; return why to stop, and a message about the value ("" for none)."""
        text = f"{name}={value:g}"
        if self.check_finite and not math.isfinite(value):
            return EarlyStoppingReason.NON_FINITE_METRIC, f"{text} is not finite; the best was {self._best_score:g}"
        limit = self.stopping_threshold
        if limit is not None and self._is_better(value, limit):
            return EarlyStoppingReason.STOPPING_THRESHOLD, f"{text} is better than stopping_threshold={limit:g}"
        limit = self.divergence_threshold
        if limit is not None and self._is_better(limit, value):
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, f"{text} is worse than divergence_threshold={limit:g}"
        gain = -self.min_delta if self.mode == "max" else self.min_delta
        if self._is_better(value + gain, self._best_score):
            previous, self._best_score, self.wait_count = self._best_score, value, 0
            return EarlyStoppingReason.NOT_STOPPED, f"{text} is the new best; it was {previous:g}"
        self.wait_count += 1
        if self.wait_count < self.patience:
            return EarlyStoppingReason.NOT_STOPPED, ""
        message = f"{name}: no gain in {self.wait_count} checks; the best was {self._best_score:g}"
        return EarlyStoppingReason.PATIENCE_EXHAUSTED, message

    def _is_better(self, value: float, other: float) -> bool:
        return value < other if self.mode == "min" else value > other
