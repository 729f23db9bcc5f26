"""Cases in which Tune's own controller would end more than needed."""

import pickle

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from raylit.compat import ray_tune_controller
from raylit.compat.ray_tune_controller import _to_actor_death, replace_controller
from raylit.driver.ray.failures import describe_death
from raylit.errors import RaylitError


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
    tune_run, before = ray_tune_controller.tune_run, ray_tune_controller.TuneController
    assert tune_run.TuneController is before
    with replace_controller(is_reusable_after=lambda exception: exception is None):
        assert issubclass(tune_run.TuneController, before)
        assert tune_run.TuneController is not before
    assert tune_run.TuneController is before


def test_a_version_of_ray_without_what_is_changed_is_an_error(monkeypatch):
    monkeypatch.delattr(ray_tune_controller.TuneController, "_schedule_trial_pause")
    context = replace_controller(is_reusable_after=lambda exception: False)
    with pytest.raises(RaylitError, match=r"TuneController\._schedule_trial_pause, which is private to ray"):
        context.__enter__()
