"""ActorGroup: the workers as Ray actors in one placement group. Driver."""

import os
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from raylit.driver import cluster
from raylit.driver.actor import Assignment, Whereabouts, WorkerActor
from raylit.driver.failures import raise_failures
from raylit.driver.packing import packed, unpacked
from raylit.driver.placement import Placement
from raylit.driver.rendezvous import Rendezvous
from raylit.errors import ModuleError, WorkerDied
from raylit.messages import Command, CommandDone, Failed, Report
from raylit.plan import Plan
from raylit.worker.context import Job, WorkerContext

_STOP_S = 5.0
"""For a worker to end by itself before it is killed."""
_TOGETHER_S = 0.5
"""Ranks that fail on the same line do so within this time and are one error."""


class ActorGroup:
    is_in_driver = False

    def __init__(self, plan: Plan, job: Job) -> None:
        pickled = _pickled(job)
        cluster.connect()
        self._plan = plan
        self._actors: list[Any] = []
        self._streams: list[Any] = []
        self._contexts: list[WorkerContext] = []
        self._placement: Placement | None = Placement(plan.workers)
        try:
            self._spawn()
            self._assign(ray.put(pickled))
        except BaseException:
            self.end()
            raise

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        # A checkpoint in the command is stored once and shared by the workers of a host.
        reference = ray.put(packed(command))
        for actor in self._actors:
            actor.submit.remote(reference)
        yield from self._until_done()

    def end(self) -> None:
        actors, self._actors = self._actors, []
        self._streams = []
        farewells = [actor.stop.remote() for actor in actors]
        if farewells:
            ray.wait(farewells, num_returns=len(farewells), timeout=_STOP_S)
        self._kill(actors)
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    def _spawn(self) -> None:
        assert self._placement is not None
        actor_class = ray.remote(WorkerActor)
        actors = [
            actor_class.options(max_concurrency=20, **self._placement.options(index)).remote()
            for index in range(self._plan.workers.num_workers)
        ]
        self._actors = actors
        try:
            places = ray.get([actor.whereabouts.remote() for actor in actors], timeout=self._plan.workers.start_timeout_s)
        except GetTimeoutError as error:
            raise WorkerDied(rank=-1, host="unknown", reason="it did not start in time") from error
        except RayActorError as error:
            raise WorkerDied(rank=-1, host="unknown", reason=f"it did not start: {error}") from error
        order = _rank_order(places)
        self._actors = [actors[index] for index in order]
        self._places = [places[index] for index in order]
        self._contexts = _contexts(self._places)

    def _assign(self, job: Any) -> None:
        meeting = None
        if len(self._actors) > 1:
            self._rendezvous = Rendezvous(host=ray.util.get_node_ip_address())
            meeting = self._rendezvous.next_meeting()
        self._streams = [actor.reports.options(num_returns="streaming").remote() for actor in self._actors]
        for actor, context, place in zip(self._actors, self._contexts, self._places, strict=True):
            actor.assign.remote(
                Assignment(plan=self._plan, context=context, job=job, meeting=meeting, own_ip=place.ip)
            )
        for _ in self._until_done():
            pass

    def _until_done(self) -> Iterator[tuple[int, Report]]:
        """Reports of all workers until each has said that it is through."""
        waiting = set(range(len(self._actors)))
        while waiting:
            for rank, report in self._received(timeout_s=1.0):
                if isinstance(report, Failed):
                    self._fail(report)
                elif isinstance(report, CommandDone):
                    waiting.discard(rank)
                else:
                    yield rank, report

    def _received(self, *, timeout_s: float) -> Iterator[tuple[int, Report]]:
        """What has arrived, waiting for the first of it at most `timeout_s`."""
        ready, _ = ray.wait(self._streams, num_returns=1, timeout=timeout_s, fetch_local=False)
        for stream in ready:
            rank = self._streams.index(stream)
            try:
                reports = ray.get(next(stream))
            except (RayActorError, StopIteration) as error:
                raise self._death(rank, error) from error
            for report in reports:
                yield rank, unpacked(report)

    def _death(self, rank: int, error: BaseException) -> WorkerDied:
        return WorkerDied(rank=rank, host=self._contexts[rank].host, reason=_reason(error))

    def _fail(self, first: Failed) -> None:
        """Raise the user's exception, with those of other ranks that fail at the same time."""
        failures = {first.rank: first}
        deadline = time.monotonic() + _TOGETHER_S
        try:
            while len(failures) < len(self._actors) and (left_s := deadline - time.monotonic()) > 0:
                for rank, report in self._received(timeout_s=left_s):
                    if isinstance(report, Failed):
                        failures[rank] = report
        except WorkerDied:
            pass
        # The others may wait in a collective for ever: there is nothing to say goodbye to.
        self._kill(self._actors)
        raise_failures(list(failures.values()), num_workers=len(self._contexts))

    def _kill(self, actors: list[Any]) -> None:
        for actor in actors:
            try:
                ray.kill(actor)
            except RayError:
                continue


def _pickled(job: Job) -> bytes:
    try:
        return cloudpickle.dumps(job)
    except Exception as error:
        raise ModuleError(
            f"the module, data or callbacks cannot travel to the workers: {error}. Make what cannot be pickled (open "
            "files, locks, connections) in setup(), which runs in every worker, or use num_workers=0"
        ) from error


def _rank_order(places: list[Whereabouts]) -> list[int]:
    """Indices by host, the driver's first, then by GPU: neighbours in rank are neighbours in the machine."""
    own = ray.get_runtime_context().get_node_id()
    return sorted(
        range(len(places)),
        key=lambda i: (places[i].node_id != own, places[i].ip, places[i].node_id, places[i].gpu_ids, i),
    )


def _contexts(places: list[Whereabouts]) -> list[WorkerContext]:
    nodes = list(dict.fromkeys(place.node_id for place in places))
    contexts = []
    for rank, place in enumerate(places):
        on_node = [other for other, candidate in enumerate(places) if candidate.node_id == place.node_id]
        contexts.append(
            WorkerContext(
                rank=rank,
                local_rank=on_node.index(rank),
                node_rank=nodes.index(place.node_id),
                world_size=len(places),
                local_world_size=len(on_node),
                num_nodes=len(nodes),
                host=place.host,
                num_threads=_num_threads(place, len(on_node)),
            )
        )
    return contexts


def _num_threads(place: Whereabouts, local_world_size: int) -> int:
    """CPU threads for torch: what the user has set, else the host's cores shared by its workers.

    Ray sets OMP_NUM_THREADS in the workers to the CPUs they asked for, so only the driver's counts as the user's word.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, place.num_cores // local_world_size)


def _reason(error: BaseException) -> str:
    if isinstance(error, ActorUnavailableError):
        return "it cannot be reached"
    if isinstance(error, ActorDiedError):
        return " ".join(str(error).split())
    return f"its stream of reports ended ({error or type(error).__name__})"
