"""BestFiles: which checkpoint files are the best by a score. Driver only."""

import math
from typing import Literal


class BestFiles:
    """At most `count` paths (-1: any number) with their scores; the earlier one wins a tie. Touches no file."""

    def __init__(self, *, count: int, mode: Literal["min", "max"]) -> None:
        self.scores: dict[str, float] = {}
        self.worst_score = math.inf if mode == "min" else -math.inf
        self._capacity = math.inf if count == -1 else count
        self._sign = 1 if mode == "min" else -1

    @property
    def best(self) -> str:
        """Empty where there is none."""
        return min(self.scores, key=self._rank, default="")

    @property
    def next_out(self) -> str:
        """The worst, which the next one to come in replaces; empty while there is room."""
        return "" if len(self.scores) < self._capacity else max(self.scores, key=self._rank, default="")

    def admits(self, score: float) -> bool:
        """Fewer files than there is room for are as good as that."""
        rank = self._sign * self._number(score)
        return sum(self._rank(path) <= rank for path in self.scores) < self._capacity

    def make_room(self) -> list[str]:
        """Take out what has to go before one comes in."""
        out = []
        while path := self.next_out:
            del self.scores[path]
            out.append(path)
        return out

    def add(self, path: str, score: float) -> None:
        self.scores[path] = self._number(score)

    def _number(self, score: float) -> float:
        """NaN counts as the worst score, so that any number is better."""
        return self.worst_score if math.isnan(score) else score

    def _rank(self, path: str) -> float:
        return self._sign * self.scores[path]
