"""Where Tune's controller would end more than it has to."""

import pickle

from ray.exceptions import ActorDiedError, OutOfMemoryError

from raylit.driver.failures import reason_of_death
from raylit.tune.controller import _death


def test_what_rays_memory_monitor_has_killed_is_as_dead_to_tune_as_what_has_crashed():
    text = (
        "2 worker(s) were killed due to the node running low on memory. Memory on the node was 7.18GB used / 23GB limit"
    )
    death = pickle.loads(pickle.dumps(_death(OutOfMemoryError(text))))
    assert isinstance(death, ActorDiedError)
    assert reason_of_death(death, None).startswith(
        "killed by Ray's memory monitor, as its host ran out of memory (7.18"
    )
    mistake = ValueError("odd")
    assert _death(mistake) is mistake
