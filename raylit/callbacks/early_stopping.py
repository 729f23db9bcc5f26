"""EarlyStopping: ends training when a metric no longer gets better. Driver only."""

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
    """Why training was asked to end."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(DriverCallback):
    """Stops the run after `patience` checks in a row without a gain of more than `min_delta`.

    Without `monitor` it follows `early_stop_on` where that is logged, else `val_loss`.

    A check comes after each validation, or with `check_on_train_epoch_end` after each training epoch; None takes the
    epoch's end where validation runs once in every epoch, or never; an epoch inside which the run ends is not judged.
    `check_finite` stops at NaN and infinity,
    `stopping_threshold` at a value that is good enough and `divergence_threshold` at one that is too bad, both strictly
    beyond the threshold. `strict` makes a missing metric an error instead of a warning. `log_rank_zero_only` is
    Lightning's and without effect: the driver alone logs.
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
        """The user's, where a checkpoint's has taken its place."""
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
            self._miss(name, sorted(metrics))
            return
        reason, message = self._judge(name, metrics[name])
        if reason is not EarlyStoppingReason.NOT_STOPPED:
            self.stopped_epoch = run.state.progress.epoch
            self.stopping_reason = reason
            self.stopping_reason_message = message
            run.stop(message)
        if message and self.verbose:
            _log.info(message)

    def _miss(self, name: str, names: list[str]) -> None:
        message = (
            f"EarlyStopping(monitor={name!r}): no such metric has been logged; there are: "
            f"{', '.join(names) or 'none'}. Log it with self.log, or monitor one of these"
        )
        if self.strict:
            raise ConfigError(f"{message}; strict=False passes over it")
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _judge(self, name: str, value: float) -> tuple[EarlyStoppingReason, str]:
        """Takes the value in; whether to stop, and what to say about it (nothing: an empty string)."""
        shown = f"{name}={value:g}"
        if self.check_finite and not math.isfinite(value):
            return EarlyStoppingReason.NON_FINITE_METRIC, f"{shown} is not finite; the best was {self._best_score:g}"
        limit = self.stopping_threshold
        if limit is not None and self._is_better(value, limit):
            return EarlyStoppingReason.STOPPING_THRESHOLD, f"{shown} is better than stopping_threshold={limit:g}"
        limit = self.divergence_threshold
        if limit is not None and self._is_better(limit, value):
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, f"{shown} is worse than divergence_threshold={limit:g}"
        gain = -self.min_delta if self.mode == "max" else self.min_delta
        if self._is_better(value + gain, self._best_score):
            previous, self._best_score, self.wait_count = self._best_score, value, 0
            return EarlyStoppingReason.NOT_STOPPED, f"{shown} is the new best; it was {previous:g}"
        self.wait_count += 1
        if self.wait_count < self.patience:
            return EarlyStoppingReason.NOT_STOPPED, ""
        message = f"{name}: no gain in {self.wait_count} checks; the best was {self._best_score:g}"
        return EarlyStoppingReason.PATIENCE_EXHAUSTED, message

    def _is_better(self, value: float, other: float) -> bool:
        return value < other if self.mode == "min" else value > other
