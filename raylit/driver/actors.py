"""ActorGroup: the workers as Ray actors in one placement group. Driver."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from raylit.accelerators import build_accelerator
from raylit.driver.actor import Assignment, Whereabouts, WorkerActor
from raylit.driver.failures import raise_failures
from raylit.driver.packing import packed, unpacked
from raylit.driver.placement import Placement
from raylit.driver.rendezvous import Rendezvous
from raylit.errors import ModuleError, ResourcesError, WorkerDied
from raylit.messages import Command, CommandDone, Failed, Mail, Report
from raylit.plan import Plan, Workers
from raylit.worker.context import Job, WorkerContext

_STOP_S = 5.0
"""For a worker to end by itself before it is killed."""
_TOGETHER_S = 0.5
"""Ranks that fail on the same line do so within this time and are one error."""


class ActorGroup:
    """Actors that have formed a group and take up one run after the other."""

    is_in_driver = False

    def __init__(self, workers: Workers) -> None:
        """Spawn the actors and let them meet. ResourcesError, WorkerDied: that did not work."""
        self.workers = workers
        self._actors: list[Any] = []
        self._streams: list[Any] = []
        self._calls: list[Any] = []
        """What was asked of actors without waiting; it says nothing unless it fails to arrive."""
        self._contexts: list[WorkerContext] = []
        self._placement: Placement | None = Placement(workers)
        self._leftovers: list[str] = []
        self.is_usable = True
        """Every worker is alive and at the end of its last command."""
        try:
            self._spawn()
            self._form()
        except BaseException:
            self.end()
            raise

    def assign(self, plan: Plan, pickled_job: bytes) -> None:
        """Make the workers ready for the commands of a run. The user's objects travel once, not once per worker.

        `is_usable` is False afterwards where a worker still holds code that has changed: take a new group then.
        """
        reference = ray.put(pickled_job)
        assignment = Assignment(plan=plan, import_path=tuple(os.path.abspath(path) for path in sys.path))
        self._ask([actor.assign.remote(assignment, reference) for actor in self._actors])
        self.is_usable = self.is_usable and not self._leftovers

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        # A checkpoint in the command is stored once and shared by the workers of a host.
        reference = ray.put(packed(command))
        self._calls = [actor.submit.remote(reference) for actor in self._actors]
        yield from self._until_done()

    def dismiss(self) -> None:
        """End the run in the workers. `is_usable` tells whether nothing of it is left in any of them."""
        self._ask([actor.dismiss.remote() for actor in self._actors])
        self.is_usable = self.is_usable and not self._leftovers

    def end(self) -> None:
        """End the processes and free what they hold. May be called more than once."""
        self.is_usable = False
        actors, self._actors = self._actors, []
        self._streams = []
        with contextlib.suppress(RayError):
            farewells = [actor.stop.remote() for actor in actors]
            if farewells:
                ray.wait(farewells, num_returns=len(farewells), timeout=_STOP_S)
        self._kill(actors)
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    def _spawn(self) -> None:
        assert self._placement is not None
        actor_class: Any = ray.remote(WorkerActor)
        actors = [
            actor_class.options(max_concurrency=20, **self._placement.options(index)).remote()
            for index in range(self.workers.num_workers)
        ]
        self._actors = actors
        try:
            places = ray.get([actor.whereabouts.remote() for actor in actors], timeout=self.workers.start_timeout_s)
        except GetTimeoutError as error:
            raise ResourcesError(
                f"the workers were placed but did not start within start_timeout_s={self.workers.start_timeout_s:g}"
            ) from error
        except RayActorError as error:
            raise ResourcesError(f"a worker's process could not start: {_reason(error)}") from error
        order = _rank_order(places)
        self._actors = [actors[index] for index in order]
        self._contexts = _contexts([places[index] for index in order])

    def _form(self) -> None:
        """Give every actor its rank and let them form the process group."""
        meeting = None
        if len(self._actors) > 1:
            self._rendezvous = Rendezvous(host=ray.util.get_node_ip_address())
            meeting = self._rendezvous.next_meeting()
        self._streams = [actor.reports.options(num_returns="streaming").remote() for actor in self._actors]
        backend = build_accelerator(self.workers.accelerator).collective_backend
        self._ask(
            [
                actor.join.remote(context, meeting, backend)
                for actor, context in zip(self._actors, self._contexts, strict=True)
            ]
        )

    def _ask(self, calls: list[Any]) -> None:
        """Wait until every actor's thread has done what these calls have put before it."""
        self._calls = calls
        for _ in self._until_done():
            raise AssertionError("only a command reports")

    def _until_done(self) -> Iterator[tuple[int, Report]]:
        """Reports of all workers until each has said that it is through."""
        waiting = set(range(len(self._actors)))
        self._leftovers = []
        is_usable, self.is_usable = self.is_usable, False
        while waiting:
            for rank, report in self._received(timeout_s=1.0):
                if isinstance(report, Failed):
                    self._fail(report)
                elif isinstance(report, CommandDone):
                    waiting.discard(rank)
                    self._leftovers += report.leftovers
                else:
                    yield rank, report
        self.is_usable = is_usable

    def _received(self, *, timeout_s: float) -> Iterator[tuple[int, Mail]]:
        """What has arrived, waiting for the first of it at most `timeout_s`."""
        ready: list[Any]
        ready, _ = ray.wait([*self._calls, *self._streams], num_returns=1, timeout=timeout_s, fetch_local=False)
        for call in [call for call in self._calls if call in ready]:
            self._calls.remove(call)
            ready.remove(call)
            with contextlib.suppress(RayActorError):  # the stream tells of a death
                ray.get(call)
        for stream in ready:
            rank = self._streams.index(stream)
            try:
                reports: list[Mail] = ray.get(next(stream))
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


def pickle_job(job: Job) -> bytes:
    """The user's objects as one. ModuleError: they cannot travel."""
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
                host_ip=place.ip,
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
