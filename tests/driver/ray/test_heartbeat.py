"""The heartbeat finds an actor that has fallen silent, and pings a bounded number of actors at a time."""

import asyncio
import time

import pytest
import ray

from raylit.driver.ray import heartbeat, local_cluster
from raylit.driver.ray.heartbeat import Heartbeat

NUM_ACTORS = 200


def define_actors():
    """Return a class that answers pings and one that does not; local ones, as the workers cannot import this module."""

    class Answering:
        def __init__(self):
            self.num_pings = 0

        async def ping(self):
            self.num_pings += 1

        async def count_pings(self):
            return self.num_pings

    class Silent:
        async def ping(self):
            await asyncio.sleep(1000)

    return Answering, Silent


@pytest.fixture(autouse=True)
def short_period(monkeypatch):
    monkeypatch.setattr(heartbeat, "_PERIOD_S", 0.05)


@pytest.fixture(scope="module")
def actors():
    """One actor that answers and one that does not; each stands for many ranks."""
    local_cluster.connect()
    actors = [ray.remote(kind).options(num_cpus=0, max_concurrency=500).remote() for kind in define_actors()]
    ray.get(actors[0].ping.remote(), timeout=60)
    yield actors
    for actor in actors:
        ray.kill(actor)


def test_a_check_pings_as_many_actors_however_many_there_are(actors):
    answering, _ = actors
    before = ray.get(answering.count_pings.remote(), timeout=60)
    checked = Heartbeat([answering] * NUM_ACTORS, limit_s=60.0)
    for num_checks in (1, 2, 3):
        time.sleep(0.1)
        assert checked.find_silent_rank() is None
        assert ray.get(answering.count_pings.remote(), timeout=60) == before + 64 * num_checks
    time.sleep(0.1)
    checked.find_silent_rank()
    time.sleep(0.1)
    checked.find_silent_rank()
    # The turns go on from the last rank to the first.
    assert ray.get(answering.count_pings.remote(), timeout=60) > before + NUM_ACTORS


@pytest.mark.parametrize("rank", [0, 70, NUM_ACTORS - 1])
def test_a_silent_actor_is_found_whichever_turn_it_has(rank, actors):
    answering, silent = actors
    handles = [answering] * NUM_ACTORS
    handles[rank] = silent
    checked = Heartbeat(handles, limit_s=1.0)
    deadline = time.monotonic() + 60
    while (found := checked.find_silent_rank()) is None and time.monotonic() < deadline:
        time.sleep(0.06)
    assert found == (rank, 1.0)
