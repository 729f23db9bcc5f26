"""The tables of times, as they are shown."""

import pytest

from raylit.profilers.base import draw_profiles
from raylit.protocol.messages import Action, Profile


def profile(rank, title, **seconds):
    actions = tuple(Action(name=name, num_calls=2, total_s=total_s) for name, total_s in seconds.items())
    memory = (("resident", 3 * 2**30), ("on cuda:0", 7 * 2**20))
    return Profile(title=title, rank=rank, elapsed_s=sum(seconds.values()), actions=actions, peak_memory_bytes=memory)


def test_rows_are_sorted_by_time_and_add_up():
    text = draw_profiles("fit", [profile(0, "Worker", short=1.0, long=3.0)])
    rows = [line.strip("│").replace("│", " ").split() for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["long", "3.000", "1,500.000", "2", "75.0%"],
        ["short", "1.000", "500.000", "2", "25.0%"],
        ["total", "4.000", "100.0%"],
    ]
    assert "Peak memory: 3.00 GiB resident, 7 MiB on cuda:0" in text


def test_without_extended_there_are_totals_and_means():
    text = draw_profiles("fit", [profile(0, "Worker", step=1.0)], is_extended=False)
    rows = [line.strip("│").replace("│", " ").split() for line in text.splitlines() if line.startswith("│")]
    assert rows == [["step", "1.000", "500.000"], ["total", "1.000"]]


@pytest.mark.parametrize(("columns", "is_abreast"), [("60", False), ("200", True)])
def test_ranks_are_side_by_side_if_the_terminal_is_wide_enough(columns, is_abreast, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    profiles = [profile(3, "Slowest rank: 3", a=1.0, b=3.0), profile(1, "Fastest rank: 1", a=2.0, c=1.0)]
    lines = draw_profiles("fit", profiles).splitlines()
    assert all(len(line) <= int(columns) for line in lines)
    assert any("Slowest rank: 3" in line and "Fastest rank: 1" in line for line in lines) is is_abreast
    assert sum("total" in line for line in lines) == (1 if is_abreast else 2)


def test_ranks_have_the_same_rows_in_the_same_order(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    profiles = [profile(3, "Slowest rank: 3", a=1.0, b=3.0), profile(1, "Fastest rank: 1", a=2.0, c=1.0)]
    lines = draw_profiles("fit", profiles).splitlines()
    names = [line.strip("│").split()[0] for line in lines if line.startswith("│")]
    assert names == ["b", "a", "c", "total"] * 2


def test_a_profile_without_actions_draws_nothing():
    assert draw_profiles("fit", [Profile(title="Worker", rank=0, elapsed_s=1.0, actions=())]) == ""
