"""Race: candidates for the learning rate train side by side, and who is behind is cut. Driver; LossProbe on workers.

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
from raylit.tune.search.lr_range_test import loss_in
from raylit.tune.search.trial import LOSS, Outcome

_REDUCTION = 3
"""Of the candidates at a rung one in so many goes on."""


@dataclass(kw_only=True, slots=True)
class Entrant:
    """A candidate and how far it has come."""

    lr: float
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """At each of the steps, the mean since the one before."""
    error: str = ""
    """What ended its trial, where it was not the race."""


class LearningRateRace:
    """Proposes the candidates, keeps their losses at the rungs and says who is to go."""

    def __init__(self, min_lr: float, max_lr: float, *, num_candidates: int, num_steps: int) -> None:
        self.rungs = rungs_of(num_steps)
        self.num_at_once = num_candidates
        self.entrants = [Entrant(lr=lr) for lr in np.geomspace(min_lr, max_lr, num_candidates).tolist()]
        # The first to come to a rung have nobody to be behind: they should be neither alike nor at the grid's end.
        self._left = [self.entrants[index] for index in _spread_order(num_candidates)]
        self._at_rung: dict[int, list[float]] = {step: [] for step in self.rungs}

    def propose(self) -> float | None:
        return self._left.pop(0).lr if self._left else None

    def is_losing(self, value: float, step: int, loss: float) -> bool:
        entrant = self._entrant(value)
        entrant.steps.append(step)
        entrant.losses.append(loss)
        if not math.isfinite(loss):
            return True
        losses = self._at_rung[step]
        losses.append(loss)
        num_kept = math.ceil(len(losses) / _REDUCTION)
        return loss > sorted(losses)[num_kept - 1]

    def receive(self, value: float, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._entrant(value).error = f"{outcome.verdict}: {outcome.error}".partition("\n")[0]

    def _entrant(self, lr: float) -> Entrant:
        return next(entrant for entrant in self.entrants if entrant.lr == lr)


class RaceResult:
    """How far each candidate came, and with which loss."""

    def __init__(self, race: LearningRateRace) -> None:
        entrants = [entrant for entrant in race.entrants if entrant.losses]
        self.results: dict[str, Any] = {
            "lr": [entrant.lr for entrant in entrants],
            "loss": [entrant.losses[-1] for entrant in entrants],
            "steps": [entrant.steps[-1] for entrant in entrants],
        }
        """Ascending in the rate; the loss is that of the last rung which the candidate came to, after so many steps."""
        self.failures = {entrant.lr: entrant.error for entrant in race.entrants if entrant.error}
        """What has ended trials before their time, other than being behind."""
        self._entrants = entrants
        self._rungs = race.rungs
        since = race.rungs[-2] + 1 if len(race.rungs) > 1 else 1
        self.rule = f"the lowest mean loss of steps {since} to {race.rungs[-1]}, of {len(race.entrants)} candidates"
        """What `suggestion()` goes by."""

    def suggestion(self) -> float | None:
        """The winner's rate; None, with a warning, where no candidate came to the end."""
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
        """A matplotlib figure of the candidates' losses over their steps, saved under `path` if one is given; None
        where `ax` is given to draw on. `suggest` marks the winner."""
        figure, ax = figures.axes(ax, is_shown=show)
        winner = self.suggestion() if suggest else None
        for entrant in self._entrants:
            width = 3 if entrant.lr == winner else 1
            ax.plot(entrant.steps, entrant.losses, "o-", linewidth=width, label=f"{entrant.lr:.1e}")
        figures.mark(ax.xaxis, self._rungs)
        is_positive = all(loss > 0 for each in self._entrants for loss in each.losses if math.isfinite(loss))
        ax.set(yscale="log" if is_positive else "linear", xlabel="step", ylabel="mean loss since the rung before")
        ax.legend(title="learning rate", fontsize="small")
        return figures.finish(figure, path=path, is_shown=show)


class LossProbe(Callback):
    """Logs the mean loss since the last rung, for the driver to read there. On every worker."""

    def __init__(self, rungs: list[int]) -> None:
        self._rungs = rungs
        self._sum: Tensor | None = None
        self._count = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._rungs and trainer.global_step >= self._rungs[0]:
            self._rungs = self._rungs[1:]
            self._sum, self._count = None, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = loss_in(outputs)
        if loss is None:
            return
        self._sum = loss.detach().float() + (0.0 if self._sum is None else self._sum)
        self._count += 1
        trainer.metrics.log_step(LOSS, self._sum / self._count)

    def found(self) -> None: ...


def rungs_of(num_steps: int) -> list[int]:
    """Up to four, each a third of the next; the last is the end."""
    steps = {max(1, num_steps // _REDUCTION**power) for power in range(4)}
    return sorted(steps)


def _spread_order(count: int) -> list[int]:
    """Of the places in a row, the middle first: early ones lie far apart, as bits in reverse order do."""
    num_bits = max(1, (count - 1).bit_length())
    reversed_bits = [int(f"{index:0{num_bits}b}"[::-1], 2) for index in range(2**num_bits)]
    return [index for index in [*reversed_bits[1:], 0] if index < count]
