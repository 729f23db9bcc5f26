"""What the driver does for each message of its workers, counted: it is not to grow with the square of their number."""

import asyncio
import time
from collections import Counter

import pytest
import ray

from raylit.config import Workers
from raylit.driver.ray import actor_group, local_cluster
from raylit.driver.ray.actor import ActorInfo
from raylit.driver.ray.actor_group import ActorGroup
from raylit.protocol.messages import CommandDone, Ticked, Train

NUM_WORKERS = 128
NUM_TICKS = 40


def define_many_ranks():
    """Return the class of the actor: a local one, as the workers cannot import this module."""

    class ManyRanks:
        """Actor that answers for all ranks, each of whose methods takes the rank first."""

        def __init__(self):
            self.queues = [asyncio.Queue() for _ in range(NUM_WORKERS)]

        async def get_info(self, rank):
            node_id = ray.get_runtime_context().get_node_id()
            ip = ray.util.get_node_ip_address()
            return ActorInfo(node_id=node_id, worker_id=f"{rank:056x}", ip=ip, host="h", gpu_ids=(), pid=1, num_cores=1)

        async def reports(self, rank):
            while True:
                yield [await self.queues[rank].get()]

        async def join(self, rank, *_):
            self.queues[rank].put_nowait(CommandDone(rank=rank))

        async def submit(self, rank, command, number):
            """Let rank 0 report progress, and then all ranks end the command."""
            if rank == 0:
                for tick in range(NUM_TICKS):
                    self.queues[0].put_nowait(Ticked(batch=tick))
                    await asyncio.sleep(0.02)
                for other in range(NUM_WORKERS):
                    self.queues[other].put_nowait(CommandDone(rank=other))

        async def ping(self, rank): ...
        async def stop(self, rank): ...

    return ManyRanks


class Rank:
    """Handle of one rank of the actor."""

    def __init__(self, actor, rank):
        self.actor, self.rank = actor, rank

    def __getattr__(self, name):
        return RankMethod(getattr(self.actor, name), self.rank)


class RankMethod:
    def __init__(self, method, rank):
        self.method, self.rank = method, rank

    def options(self, **options):
        return RankMethod(self.method.options(**options), self.rank)

    def remote(self, *arguments):
        return self.method.remote(self.rank, *arguments)


class ManyRanksGroup(ActorGroup):
    def create_actors(self, placement):
        self.actor = ray.remote(define_many_ranks()).options(num_cpus=0, max_concurrency=2000).remote()
        return [Rank(self.actor, rank) for rank in range(self.workers.num_workers)]

    def kill_actors(self, actors):
        ray.kill(self.actor)


@pytest.fixture
def waits(monkeypatch):
    """Count the waits for all workers; each begins late, so that what was sent before it has arrived."""
    counts, wait = Counter(), ray.wait

    def count_wait(refs, **arguments):
        if len(refs) >= NUM_WORKERS:
            counts["all"] += 1
            time.sleep(0.1)
        return wait(refs, **arguments)

    monkeypatch.setattr(ray, "wait", count_wait)
    return counts


def test_waits_for_many_workers_grow_neither_with_their_number_nor_with_rank_0s_reports(waits, monkeypatch):
    monkeypatch.setattr(actor_group, "_WAKE_S", 20.0)
    local_cluster.connect()
    workers = Workers(num_workers=NUM_WORKERS, resources_per_worker={"memory": 0})
    group = ManyRanksGroup(workers, variables={})
    try:
        assert waits["all"] < NUM_WORKERS / 2, "to join"
        waits.clear()
        reports = [*group.run(Train(until_batch=1, until_step=1))]
        assert [report.batch for _, report in reports] == [*range(NUM_TICKS)]
        assert waits["all"] < NUM_TICKS / 2, "to train"
    finally:
        group.end()
