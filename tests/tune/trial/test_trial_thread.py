"""A training in a thread that stands still at each report until it is told to go on."""

import threading

import pytest

from raylit.tune.trial.trial_thread import TrainingAborted, TrainingEnd, TrainingReport, TrialThread


def counting(events, *, num_reports=3):
    def train(handover):
        for number in range(num_reports):
            events.append(f"train {number}")
            if not handover.report({"number": number}, save=lambda path: events.append(f"save {path}")):
                events.append("told to stop")
                break
        events.append("end")
        return {"total": num_reports}

    return train


def test_training_stands_still_until_the_next_report_is_asked_for():
    events = []
    handover = TrialThread(counting(events))
    assert events == []
    assert handover.next() == TrainingReport(metrics={"number": 0})
    assert events == ["train 0"]
    assert handover.next() == TrainingReport(metrics={"number": 1})
    assert events == ["train 0", "train 1"]


def test_it_ends_with_what_the_training_returned():
    handover = TrialThread(counting([], num_reports=1))
    handover.next()
    assert handover.next() == TrainingEnd(metrics={"total": 1})
    handover.end()


def test_a_save_happens_in_the_trainings_thread_while_it_stands():
    events, threads = [], []

    def train(handover):
        handover.report({}, save=lambda path: threads.append(threading.current_thread()))
        events.append("on")

    handover = TrialThread(train)
    handover.next()
    handover.save("a")
    handover.save("b")
    assert [thread.name for thread in threads] == ["raylit-trial"] * 2
    assert events == []
    handover.end()


def test_a_failed_save_is_the_savers_error_and_training_goes_on():
    def save(path):
        raise OSError("disk full")

    def train(handover):
        handover.report({}, save=save)

    handover = TrialThread(train)
    handover.next()
    with pytest.raises(OSError, match="disk full"):
        handover.save("a")
    assert handover.next() == TrainingEnd()


def test_a_stop_lets_the_training_end_by_itself():
    events = []
    handover = TrialThread(counting(events))
    handover.next()
    handover.end()
    handover.end()
    assert events == ["train 0", "told to stop", "end"]


def test_a_training_that_does_not_stop_is_cut():
    events = []

    def train(handover):
        try:
            while True:
                handover.report({}, save=print)
        except TrainingAborted:
            events.append("cut")
            raise

    handover = TrialThread(train)
    handover.next()
    handover.end()
    assert events == ["cut"]


def test_an_error_comes_with_the_end():
    def train(handover):
        raise SystemExit(3)

    ended = TrialThread(train).next()
    assert isinstance(ended.error, SystemExit)


def test_one_that_has_not_begun_needs_no_end():
    events = []
    TrialThread(counting(events)).end()
    assert events == []
