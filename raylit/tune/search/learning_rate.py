"""Searches for a learning rate: the range test and the race of candidates. Driver; RangeTest, LossProbe on workers.

The range test is that of Smith 2015. The race's rule is that of asynchronous successive halving, in its stopping form:
Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2018, https://arxiv.org/abs/1810.05934.
"""

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raylit.callbacks.base import Callback
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.tune import figures
from raylit.tune.search.trial import LOSS, Outcome

RangeMode = Literal["exponential", "linear"]
_SMOOTHING = 0.98
_FALL_START = 0.9
"""Fraction of the way from the minimum up to the usual level at which the fall starts."""
_REDUCTION = 3
"""Reduction factor: one in this many candidates at a rung goes on."""


class RangeTest(Callback):
    """Callback that sets the rate of every optimizer before each step and collects the smoothed loss after it."""

    def __init__(
        self, *, min_lr: float, max_lr: float, num_steps: int, mode: RangeMode, early_stop_threshold: float | None
    ) -> None:
        make_space = np.geomspace if mode == "exponential" else np.linspace
        self.mode = mode
        self.lrs: list[float] = make_space(min_lr, max_lr, num_steps).tolist()
        self.losses: list[float] = []
        self._threshold = math.inf if early_stop_threshold is None else early_stop_threshold
        self._average = 0.0
        self._num_windows = 0
        self._window: list[Tensor] = []
        """Losses of this rank's batches since the last step; it may have no share of some batches."""

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the last step's loss and set the next rate. Collective.

        Unlike the end of a batch, its start is called on every rank, also on one without a share of the batch.
        """
        if trainer.num_windows > self._num_windows:
            self._num_windows = trainer.num_windows
            self._record_loss(_mean_over_ranks(self._window, trainer, pl_module))
            self._window = []
            trainer.should_stop = self._is_over()
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lrs[min(len(self.losses), len(self.lrs) - 1)]

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (loss := find_loss(outputs)) is not None:
            self._window.append(loss)

    def collect(self) -> tuple[list[float], list[float]]:
        """Return the rates in rising order and the smoothed loss at each."""
        return self.lrs[: len(self.losses)], self.losses

    def _record_loss(self, loss: float) -> None:
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        # An average that starts at 0 is too small by as much as its weights sum up to less than 1.
        self.losses.append(self._average / (1 - _SMOOTHING ** (len(self.losses) + 1)))

    def _is_over(self) -> bool:
        newest, lowest = self.losses[-1], min(self.losses)
        # The threshold is a multiple of the minimum for a positive loss; a loss that may be negative has no multiples.
        has_diverged = not math.isfinite(newest) or newest - lowest > (self._threshold - 1) * abs(lowest)
        return has_diverged or len(self.losses) >= len(self.lrs)


class RangeCurve:
    """Result of a range test: the rates and the loss at each."""

    rule = "where the smoothed loss falls most steeply, on the way from its usual level to its minimum"
    """Rule of `suggestion()`, in words."""

    def __init__(self, *, lrs: list[float], losses: list[float], mode: str = "exponential") -> None:
        self.results: dict[str, Any] = {"lr": lrs, "loss": losses}
        """Columns: the rates in rising order, and the smoothed loss at each."""
        self._mode = mode

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """Return the rate at which the loss falls most steeply; None, with a warning, if there are too few points.

        The beginning of the smoothed curve is the mean of few losses and jumps. Therefore only the fall counts, from
        the last point near the usual level down to the minimum.

        Args:
            skip_begin: number of points that are left out at the beginning.
            skip_end: number of points that are left out at the end.
        """
        lrs, losses = (np.array(self.results[name][skip_begin : -skip_end or None]) for name in ("lr", "loss"))
        lrs, losses = lrs[np.isfinite(losses)], losses[np.isfinite(losses)]
        if len(losses) < 2:
            warnings.warn(
                f"the range test has too few points for a suggestion ({len(self.results['lr'])}): raise num_training, "
                "or lower max_lr",
                stacklevel=2,
            )
            return None
        lowest = max(1, int(np.argmin(losses)))
        falling = losses[: lowest + 1]
        high = losses[lowest] + _FALL_START * (np.median(falling) - losses[lowest])
        first = int(np.flatnonzero(falling[:-1] >= high)[-1]) if (falling[:-1] >= high).any() else 0
        return float(lrs[first + np.argmin(np.gradient(falling)[first:])])

    def plot(
        self,
        suggest: bool = False,
        show: bool = False,
        ax: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Plot the curve.

        Args:
            suggest: whether to mark the suggested rate.
            show: whether to show the figure.
            ax: matplotlib axes to draw on, instead of a new figure.
            path: where to save the figure.

        Returns:
            The matplotlib figure; None if `ax` is given.
        """
        figure, ax = figures.create_axes(ax, is_shown=show)
        ax.plot(self.results["lr"], self.results["loss"])
        scale = "log" if self._mode == "exponential" else "linear"
        ax.set(xscale=scale, xlabel="learning rate", ylabel="smoothed loss")
        if suggest and (rate := self.suggestion()) is not None:
            ax.plot(rate, self.results["loss"][self.results["lr"].index(rate)], "o", color="red", label=f"{rate:.3g}")
            ax.legend(title="suggestion")
        return figures.finish_figure(figure, path=path, is_shown=show)


@dataclass(kw_only=True, slots=True)
class Candidate:
    """Candidate for the learning rate, with its losses so far."""

    lr: float
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Mean loss since the step before, for each of the steps."""
    error: str = ""
    """Error that ended its trial, if any."""


class LearningRateRace:
    """Search that proposes the candidates, keeps their losses at the rungs and decides which ones are stopped."""

    def __init__(self, min_lr: float, max_lr: float, *, num_candidates: int, num_steps: int) -> None:
        self.rungs = list_rungs(num_steps)
        self.num_at_once = num_candidates
        self.candidates = [Candidate(lr=lr) for lr in np.geomspace(min_lr, max_lr, num_candidates).tolist()]
        # The first candidates at a rung have none to compare with: they should be neither alike nor at the ends of the
        # grid.
        self._left = [self.candidates[index] for index in _order_far_apart(num_candidates)]
        self._at_rung: dict[int, list[float]] = {step: [] for step in self.rungs}

    def propose(self) -> float | None:
        return self._left.pop(0).lr if self._left else None

    def is_losing(self, value: float, step: int, loss: float) -> bool:
        candidate = self._find_candidate(value)
        candidate.steps.append(step)
        candidate.losses.append(loss)
        if not math.isfinite(loss):
            return True
        losses = self._at_rung[step]
        losses.append(loss)
        num_kept = math.ceil(len(losses) / _REDUCTION)
        return loss > sorted(losses)[num_kept - 1]

    def receive(self, value: float, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._find_candidate(value).error = f"{outcome.failure}: {outcome.error}".partition("\n")[0]

    def _find_candidate(self, lr: float) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.lr == lr)


class RaceResult:
    """Result of a race: how far each candidate came, and with which loss."""

    def __init__(self, race: LearningRateRace) -> None:
        candidates = [candidate for candidate in race.candidates if candidate.losses]
        self.results: dict[str, Any] = {
            "lr": [candidate.lr for candidate in candidates],
            "loss": [candidate.losses[-1] for candidate in candidates],
            "steps": [candidate.steps[-1] for candidate in candidates],
        }
        """Columns, ascending in the rate; the loss is that of the candidate's last rung, after `steps` steps."""
        self.failures = {candidate.lr: candidate.error for candidate in race.candidates if candidate.error}
        """Errors that ended trials, by rate."""
        self._candidates = candidates
        self._rungs = race.rungs
        since = race.rungs[-2] + 1 if len(race.rungs) > 1 else 1
        self.rule = f"the lowest mean loss of steps {since} to {race.rungs[-1]}, of {len(race.candidates)} candidates"
        """Rule of `suggestion()`, in words."""

    def suggestion(self) -> float | None:
        """Return the winner's rate; None, with a warning, if no candidate finished."""
        finished = [
            (loss, lr)
            for lr, loss, steps in zip(*self.results.values(), strict=True)
            if steps == self._rungs[-1] and math.isfinite(loss)
        ]
        if not finished:
            warnings.warn("no candidate has come to the end of the race with a finite loss: lower max_lr", stacklevel=2)
            return None
        return min(finished)[1]

    def plot(
        self,
        suggest: bool = False,
        show: bool = False,
        ax: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Plot the candidates' losses over their steps; arguments and result are those of `RangeCurve.plot`."""
        figure, ax = figures.create_axes(ax, is_shown=show)
        winner = self.suggestion() if suggest else None
        for candidate in self._candidates:
            width = 3 if candidate.lr == winner else 1
            ax.plot(candidate.steps, candidate.losses, "o-", linewidth=width, label=f"{candidate.lr:.1e}")
        figures.set_log_ticks(ax.xaxis, self._rungs)
        is_positive = all(loss > 0 for each in self._candidates for loss in each.losses if math.isfinite(loss))
        ax.set(yscale="log" if is_positive else "linear", xlabel="step", ylabel="mean loss since the rung before")
        ax.legend(title="learning rate", fontsize="small")
        return figures.finish_figure(figure, path=path, is_shown=show)


class LossProbe(Callback):
    """Callback that logs the mean loss since the last rung, which the driver reads there. On every worker."""

    def __init__(self, rungs: list[int]) -> None:
        self._rungs = rungs
        self._sum: Tensor | None = None
        self._count = 0

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._rungs and trainer.global_step >= self._rungs[0]:
            self._rungs = self._rungs[1:]
            self._sum, self._count = None, 0

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = find_loss(outputs)
        if loss is None:
            return
        self._sum = loss.detach().float() + (0.0 if self._sum is None else self._sum)
        self._count += 1
        assert trainer.metrics is not None
        trainer.metrics.log_step(LOSS, self._sum / self._count)

    def collect(self) -> None:
        """Return nothing: the losses were reported at the rungs."""


def list_rungs(num_steps: int) -> list[int]:
    """Return up to four step counts, each a third of the next; the last is the end."""
    steps = {max(1, num_steps // _REDUCTION**power) for power in range(4)}
    return sorted(steps)


def _order_far_apart(count: int) -> list[int]:
    """Return the indices in an order whose early ones lie far apart, beginning in the middle, by reversed bits."""
    num_bits = max(1, (count - 1).bit_length())
    reversed_bits = [int(f"{index:0{num_bits}b}"[::-1], 2) for index in range(2**num_bits)]
    return [index for index in [*reversed_bits[1:], 0] if index < count]


def find_loss(outputs: Any) -> Tensor | None:
    """Return the loss among the outputs of `training_step`, the first one's of several; None if there is none."""
    if isinstance(outputs, list):
        return next((loss for loss in map(find_loss, outputs) if loss is not None), None)
    if isinstance(outputs, dict):
        outputs = outputs.get("loss")
    elif not isinstance(outputs, torch.Tensor):
        outputs = getattr(outputs, "minimize", None)
    return outputs if isinstance(outputs, torch.Tensor) else None


def _mean_over_ranks(losses: list[Tensor], trainer: TrainerView, module: LightningModule) -> float:
    """Return the mean of all ranks' losses; nan if no rank has any. Collective."""
    share = torch.zeros(2, device=module.device)
    if losses:
        own = torch.stack([loss.detach().float() for loss in losses])
        share = torch.stack([own.sum(), torch.full_like(own[0], len(losses))])
    total, count = trainer.all_gather(share).reshape(-1, 2).sum(dim=0).tolist()
    return total / count if count else math.nan
