"""Private names of Ray Tune, tested with the real Ray."""

import types

import pytest
from ray.tune.execution import class_cache
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator

from raylit.compat.ray_tune import has_metric, list_trials, set_trial_variables
from raylit.errors import RaylitError


def test_trials_are_those_behind_the_results():
    results = types.SimpleNamespace(_experiment_analysis=types.SimpleNamespace(trials=("a", "b")))
    assert list_trials(results) == ["a", "b"]
    with pytest.raises(RaylitError, match=r"ResultGrid\._experiment_analysis, which is private to ray"):
        list_trials(types.SimpleNamespace())


def test_variables_of_trials_are_raylit_s_and_tune_s_where_it_has_some_to_hand_on(monkeypatch):
    names, defaults = class_cache.ENV_VARS_TO_PROPAGATE, dict(class_cache.DEFAULT_ENV_VARS)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with set_trial_variables({"A": "1"}, is_pooled=False):
        assert (set(), {"A": "1"}) == (class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS)
    monkeypatch.setenv(sorted(names)[0], "x")
    with set_trial_variables({"A": "1"}, is_pooled=False):
        assert (names, {**defaults, "A": "1"}) == (class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS)
    with set_trial_variables({}, is_pooled=True):
        assert (set(), {}) == (class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS)
    assert (names, defaults) == (class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS)


def test_without_the_private_names_tune_s_variables_stay(monkeypatch):
    monkeypatch.delattr(class_cache, "ENV_VARS_TO_PROPAGATE")
    with set_trial_variables({}, is_pooled=True):
        assert class_cache.DEFAULT_ENV_VARS
    with pytest.raises(AttributeError), set_trial_variables({"A": "1"}, is_pooled=True):
        pass


def test_schedulers_and_searchers_say_whether_they_were_given_a_metric():
    assert has_metric(AsyncHyperBandScheduler(metric="loss", mode="min"))
    assert not has_metric(AsyncHyperBandScheduler())
    assert not has_metric(BasicVariantGenerator())
