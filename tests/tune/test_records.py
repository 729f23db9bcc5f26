"""Trials as they ended, and the best of them."""

import math

from raylit.tune.records import TrialRecord, find_best_trial


def trial(name, *values):
    return TrialRecord(id=name, config={}, status="finished", history=tuple({"loss": value} for value in values))


def test_the_best_trial_has_the_best_report_of_any_epoch():
    trials = [trial("a", 3.0, 2.0, 5.0), trial("b", 2.5, 2.4), trial("c")]
    assert trials[0].best("loss", "min") == 2.0
    assert trials[0].best("loss", "max") == 5.0
    assert trials[2].best("loss", "min") is None
    assert find_best_trial(trials, "loss", "min").id == "a"


def test_a_value_that_is_no_number_is_never_the_best():
    trials = [trial("a", math.nan, None, "x", True), trial("b", math.inf, 7)]
    assert find_best_trial(trials, "loss", "min").best("loss", "min") == 7
    assert find_best_trial(trials[:1], "loss", "min") is None


def test_the_first_of_equal_trials_is_the_best():
    assert find_best_trial([trial("a", 1.0), trial("b", 1.0)], "loss", "max").id == "a"
