"""Accounts of a run's wall time: its goodput by cause, and the rank that the others wait for. Driver.

The coordinator names the cause of the time that passes while it waits for a command or works itself; the workers'
reports say which part of a training command was spent in waiting for data or in compilation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from statistics import median
from time import perf_counter
from typing import Literal

from raylit.protocol.messages import RankTimes

Cause = Literal["steps", "start", "data_wait", "validation", "saving", "recovery", "compilation", "other"]

_LEAST_SHOWN_S = 0.05
_LEAST_SHARE = 0.2
"""A rank is named if its own work takes at least this share longer than the others'."""
_LEAST_LOST_S = 0.1
"""A rank is not named if it has held the others up for less in an interval: that much happens by chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Wall time of a run by cause, in seconds; the causes add up to `total`.

    Attributes:
        steps: Training steps with their hooks; in `validate`, `test` and `predict` the loop over the batches.
        start: Everything before the first batch: workers, data, set-up, reading the checkpoint that is continued.
        data_wait: Waiting for training batches and moving them to the device, on the rank that waited longest.
        validation: Validation inside a fit, with the sanity check.
        saving: Waiting for checkpoints: the copy of the state, and what is written while training stands still.
        recovery: Failures and recovery from them; 0, as a run ends with the first failure.
        compilation: Compilation of what the Trainer's `compile` or a compiled model asks for, in training and
            validation.
        other: The rest: the driver's callbacks and loggers between commands, the ends of epochs and of the run.
    """

    steps: float = 0.0
    start: float = 0.0
    data_wait: float = 0.0
    validation: float = 0.0
    saving: float = 0.0
    recovery: float = 0.0
    compilation: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.to_dict().values())

    @property
    def fraction(self) -> float:
        """Share of the run that was spent in steps, from 0 to 1."""
        return self.steps / self.total if self.total > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """Return the seconds by cause."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_metrics(self) -> dict[str, float]:
        """Return the values that are logged, by name."""
        seconds = {f"goodput/{cause}_s": value for cause, value in self.to_dict().items()}
        return {"goodput/fraction": self.fraction, "goodput/total_s": self.total, **seconds}

    def __str__(self) -> str:
        """Return one line with the share of steps and the causes that took time, the longest first."""
        causes = sorted(self.to_dict().items(), key=lambda item: item[1], reverse=True)
        parts = [f"{cause.replace('_', ' ')} {value:.1f} s" for cause, value in causes if value >= _LEAST_SHOWN_S]
        return f"goodput {self.fraction:.1%} of {self.total:.1f} s: {', '.join(parts) or 'nothing took time'}"


class GoodputLedger:
    """Ledger of a run's wall time: at every moment one cause is charged, from the start to `close`."""

    def __init__(self, *, started_at: float) -> None:
        """Begin with the cause "start" at a time of `perf_counter`."""
        self._seconds: dict[Cause, float] = {}
        self._cause: Cause = "start"
        self._since = started_at
        self._is_closed = False

    def charge(self, cause: Cause) -> Cause:
        """Charge the time from now on to this cause, and return the one before."""
        now = perf_counter()
        before, self._cause = self._cause, cause
        if not self._is_closed:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
            self._since = now
        return before

    @contextmanager
    def measure(self, cause: Cause) -> Iterator[None]:
        """Charge the time inside the context to this cause."""
        before = self.charge(cause)
        try:
            yield
        finally:
            self.charge(before)

    def move(self, seconds: float, *, source: Cause, target: Cause) -> None:
        """Charge to `target` what has been charged to `source`, at most all of it."""
        moved = min(seconds, self._seconds.get(source, 0.0))
        self._seconds[source] = self._seconds.get(source, 0.0) - moved
        self._seconds[target] = self._seconds.get(target, 0.0) + moved

    def close(self) -> None:
        """End the ledger: later time is not charged."""
        self.charge("other")
        self._is_closed = True

    def read(self) -> Goodput:
        """Return the seconds by cause up to now, or up to `close`."""
        self.charge(self._cause)
        return Goodput(**{str(cause): seconds for cause, seconds in self._seconds.items()})


def describe_slowest_rank(ranks: Sequence[RankTimes]) -> str:
    """Describe the rank that is more than 20 % behind the median of the others by its own work, or return "".

    A rank's own work is the time of the interval outside of backward passes, and the shortest time that any rank has
    spent in backward passes: the ranks wait for each other's gradients there, and the rank that is waited for waits
    least itself. Where ranks wait elsewhere, too, as in the forward passes of FSDP or in hooks with collectives, that
    wait counts as own work and makes the ranks alike. On a GPU these are host times: a rank with slow data is found,
    one whose GPU computes slowly is not.
    """
    if len(ranks) < 2:
        return ""
    shared_s = min(rank.backward_s for rank in ranks)
    own_s = [rank.elapsed_s - rank.backward_s + shared_s for rank in ranks]
    slowest = max(range(len(ranks)), key=own_s.__getitem__)
    others = [index for index in range(len(ranks)) if index != slowest]
    usual_s = median(own_s[index] for index in others)
    lost_s = own_s[slowest] - usual_s
    if lost_s < max(_LEAST_LOST_S, _LEAST_SHARE * usual_s):
        return ""
    wait_s = ranks[slowest].data_wait_s - median(ranks[index].data_wait_s for index in others)
    cause = "data wait" if wait_s > lost_s / 2 else "compute"
    return f"rank {slowest} +{lost_s / max(usual_s, 1e-9):.0%} {cause}"
