"""Private names of Ray Tune, tested with the real Ray, and cases in which its own controller ends too much."""

import pickle
import types

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.tune.execution import class_cache
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator

from raylit.compat import ray_tune
from raylit.compat.ray_tune import _to_actor_death, has_metric, list_trials, replace_controller, set_trial_variables
from raylit.driver.ray.failures import describe_death
from raylit.errors import RaylitError


def test_trials_are_those_behind_the_results():
    results = types.SimpleNamespace(_experiment_analysis=types.SimpleNamespace(trials=("a", "b")))
    assert list_trials(results) == ["a", "b"]
    with pytest.raises(RaylitError, match=r"ResultGrid\._experiment_analysis, a private name that ray"):
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


def test_what_rays_memory_monitor_has_killed_is_as_dead_to_tune_as_what_has_crashed():
    text = (
        "2 worker(s) were killed due to the node running low on memory. Memory on the node was 7.18GB used / 23GB limit"
    )
    death = pickle.loads(pickle.dumps(_to_actor_death(OutOfMemoryError(text))))
    assert isinstance(death, ActorDiedError)
    assert describe_death(death, None).startswith("killed by Ray's memory monitor, as its host ran out of memory (7.18")
    mistake = ValueError("odd")
    assert _to_actor_death(mistake) is mistake


def test_the_controller_is_another_one_within_the_context_only():
    tune_run, before = ray_tune.tune_run, ray_tune.TuneController
    assert tune_run.TuneController is before
    with replace_controller(is_reusable_after=lambda exception: exception is None):
        assert issubclass(tune_run.TuneController, before)
        assert tune_run.TuneController is not before
    assert tune_run.TuneController is before


def test_a_version_of_ray_without_what_is_changed_is_an_error(monkeypatch):
    monkeypatch.delattr(ray_tune.TuneController, "_schedule_trial_pause")
    context = replace_controller(is_reusable_after=lambda exception: False)
    with pytest.raises(RaylitError, match=r"TuneController\._schedule_trial_pause, a private name that ray"):
        context.__enter__()
