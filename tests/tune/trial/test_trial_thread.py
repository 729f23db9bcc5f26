"""A training in a thread that waits at each report for a command."""

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


def test_training_waits_at_each_report_until_next_is_called():
    events = []
    handover = TrialThread(counting(events))
    assert events == []
    assert handover.next() == TrainingReport(metrics={"number": 0})
    assert events == ["train 0"]
    assert handover.next() == TrainingReport(metrics={"number": 1})
    assert events == ["train 0", "train 1"]


def test_the_end_has_the_result_of_the_training_function():
    handover = TrialThread(counting([], num_reports=1))
    handover.next()
    assert handover.next() == TrainingEnd(metrics={"total": 1})
    handover.end()


def test_a_save_runs_in_the_trainings_thread_while_it_waits():
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


def test_a_failed_save_raises_in_the_caller_and_training_continues():
    def save(path):
        raise OSError("disk full")

    def train(handover):
        handover.report({}, save=save)

    handover = TrialThread(train)
    handover.next()
    with pytest.raises(OSError, match="disk full"):
        handover.save("a")
    assert handover.next() == TrainingEnd()


def test_a_stop_lets_the_training_function_return():
    events = []
    handover = TrialThread(counting(events))
    handover.next()
    handover.end()
    handover.end()
    assert events == ["train 0", "told to stop", "end"]


def test_a_training_that_reports_after_a_stop_is_aborted():
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


def test_an_error_of_the_training_is_part_of_its_end():
    def train(handover):
        raise SystemExit(3)

    ended = TrialThread(train).next()
    assert isinstance(ended.error, SystemExit)


def test_ending_a_thread_that_was_not_started_does_nothing():
    events = []
    TrialThread(counting(events)).end()
    assert events == []
