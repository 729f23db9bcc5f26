"""Lookup of the sessions of Ray Train and Tune, with the real Ray; whole runs are in tests/driver."""

import threading
import types

import pytest
from ray.train._internal import session as sessions
from ray.train.v2._internal.execution import context, train_fn_utils

from raylit.compat import ray_train
from raylit.errors import RaylitError


def test_outside_of_functions_of_ray_there_is_none():
    assert ray_train.find_function_session() is None
    assert ray_train.find_train_functions() is None


def test_the_session_of_the_process_is_found(monkeypatch):
    session = object()
    monkeypatch.setattr(sessions, "_session", session)
    assert ray_train.find_function_session() is session


def test_train_s_functions_and_reports_are_found(monkeypatch):
    functions = train_fn_utils.LocalTrainFnUtils("experiment")
    monkeypatch.setattr(train_fn_utils, "_train_fn_utils", functions)
    assert ray_train.find_train_functions() is functions
    assert ray_train.count_train_reports() == 0
    monkeypatch.setattr(context, "_train_context", types.SimpleNamespace(report_call_index=3))
    assert ray_train.count_train_reports() == 3


def test_the_config_is_that_of_the_trainable_whose_function_the_thread_runs():
    class Trainable:
        def __init__(self):
            self.config = {"lr": 0.1}

        def start(self):
            return threading.Thread(target=lambda: self.config)

    thread = Trainable().start()
    assert ray_train.read_trial_config(types.SimpleNamespace(training_thread=thread)) == {"lr": 0.1}
    other = threading.Thread(target=lambda: None)
    assert ray_train.read_trial_config(types.SimpleNamespace(training_thread=other)) == {}
    with pytest.raises(RaylitError, match=r"_target, which is private to ray.*install ray==2\.60"):
        ray_train.read_trial_config(types.SimpleNamespace(training_thread=object()))
