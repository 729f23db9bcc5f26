"""Which files are the best."""

import math
from typing import Any

import pytest

from raylit.callbacks.model_checkpoint import TopK


def offered(best: TopK, scores: dict[str, float]) -> list[str]:
    """Return the removed files, in order, when these are offered one after the other."""
    out = []
    for path, score in scores.items():
        if best.admits(score):
            out += best.make_room()
            best.add(path, score)
    return out


@pytest.mark.parametrize(
    ("mode", "out", "best", "next_out"), [("min", ["a", "c"], "d", "b"), ("max", ["b", "a"], "e", "c")]
)
def test_the_best_two_are_kept(mode: Any, out: list[str], best: str, next_out: str) -> None:
    files = TopK(count=2, mode=mode)
    assert offered(files, {"a": 4, "b": 2, "c": 5 if mode == "max" else 3, "d": 1, "e": 9}) == out
    assert (files.best, files.next_removed) == (best, next_out)


def test_the_earlier_one_wins_a_tie() -> None:
    files = TopK(count=1, mode="min")
    assert offered(files, {"a": 1, "b": 1}) == []
    assert files.best == "a"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_kept_only_while_fewer_than_k_files_exist(mode: Any) -> None:
    files = TopK(count=1, mode=mode)
    assert offered(files, {"a": math.nan, "b": math.nan}) == []
    assert files.scores == {"a": math.inf if mode == "min" else -math.inf}
    assert offered(files, {"c": 1e300}) == ["a"]


def test_all_files_or_none_are_kept() -> None:
    everything, nothing = TopK(count=-1, mode="min"), TopK(count=0, mode="min")
    scores = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert offered(everything, scores) == offered(nothing, scores) == []
    assert (everything.best, everything.next_removed, list(everything.scores)) == ("b", "", ["a", "b", "c"])
    assert (nothing.best, nothing.scores) == ("", {})


def test_excess_files_are_removed_worst_first() -> None:
    files = TopK(count=1, mode="min")
    files.scores = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert not files.admits(1.5)
    assert files.admits(0.5)
    assert files.make_room() == ["b", "c", "a"]
