"""The stopwatch under every table of times."""

import pytest

from raylit.profilers.base import Stopwatch


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def test_an_action_takes_its_time_from_the_one_around_it(clock):
    stopwatch = Stopwatch(clock)
    for name, seconds in [("outer", 1.0), ("inner", 2.0)]:
        stopwatch.start(name)
        clock.now_s += seconds
    for name, seconds in [("inner", 4.0), ("outer", 8.0)]:
        stopwatch.stop(name)
        clock.now_s += seconds
    found = {action.name: (action.num_calls, action.total_s) for action in stopwatch.actions()}
    assert found == {"outer": (1, 5.0), "inner": (1, 2.0)}
    assert stopwatch.elapsed_s == 15.0


def test_an_action_inside_itself_counts_twice_and_its_time_once(clock):
    stopwatch = Stopwatch(clock)
    with stopwatch.measure("a"):
        clock.now_s += 1.0
        with stopwatch.measure("a"):
            clock.now_s += 1.0
    [action] = stopwatch.actions()
    assert (action.num_calls, action.total_s) == (2, 2.0)


def test_actions_may_end_in_another_order_than_they_began(clock):
    stopwatch = Stopwatch(clock)
    stopwatch.start("a")
    stopwatch.start("b")
    stopwatch.stop("a")
    clock.now_s += 3.0
    stopwatch.stop("b")
    assert {action.name: action.total_s for action in stopwatch.actions()} == {"a": 0.0, "b": 3.0}


def test_a_running_action_has_its_time_so_far(clock):
    stopwatch = Stopwatch(clock)
    stopwatch.start("a")
    clock.now_s += 2.0
    [action] = stopwatch.actions()
    assert (action.num_calls, action.total_s) == (0, 2.0)


def test_stopping_what_was_not_started_is_an_error(clock):
    with pytest.raises(ValueError, match="'a', which was never started"):
        Stopwatch(clock).stop("a")


def test_time_items_measures_getting_items_but_not_using_them(clock):
    def items():
        for item in range(3):
            clock.now_s += 1.0
            yield item

    stopwatch, seen = Stopwatch(clock), []
    for item in stopwatch.time_items("fetch", items()):
        clock.now_s += 10.0
        seen.append(item)
    [action] = stopwatch.actions()
    assert (seen, action.total_s) == ([0, 1, 2], 3.0)


def test_an_exception_ends_an_action(clock):
    stopwatch = Stopwatch(clock)
    with pytest.raises(KeyError), stopwatch.measure("a"):
        raise KeyError
    clock.now_s += 5.0
    [action] = stopwatch.actions()
    assert (action.num_calls, action.total_s) == (1, 0.0)
