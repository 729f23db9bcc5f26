"""Race of learning rates: candidates train side by side, and the worst are stopped. Driver; LossProbe on workers.

The rule is that of asynchronous successive halving, in its stopping form: Li et al., "A System for Massively Parallel
Hyperparameter Tuning", 2018, https://arxiv.org/abs/1810.05934.
"""

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from raylit.callbacks.base import Callback
from raylit.tune import figures
from raylit.tune.search.lr_range_test import find_loss
from raylit.tune.search.trial import LOSS, Outcome

_REDUCTION = 3
"""Reduction factor: one in this many candidates at a rung goes on."""


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
        """Plot the candidates' losses over their steps.

        Args:
            suggest: whether to mark the winner.
            show: whether to show the figure.
            ax: matplotlib axes to draw on, instead of a new figure.
            path: where to save the figure.

        Returns:
            The matplotlib figure; None if `ax` is given.
        """
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

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._rungs and trainer.global_step >= self._rungs[0]:
            self._rungs = self._rungs[1:]
            self._sum, self._count = None, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = find_loss(outputs)
        if loss is None:
            return
        self._sum = loss.detach().float() + (0.0 if self._sum is None else self._sum)
        self._count += 1
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
