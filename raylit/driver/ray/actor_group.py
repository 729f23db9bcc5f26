"""ActorGroup: the workers as Ray actors in one placement group. Driver."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError

from raylit.compat import ray_core
from raylit.config.plan import Plan, Workers
from raylit.driver.ray import local_cluster
from raylit.driver.ray.actor import ActorInfo, Assignment, WorkerActor
from raylit.driver.ray.checkpoint_transfer import CheckpointTransfer, PartTransfer
from raylit.driver.ray.failures import (
    DEATHS,
    ProcessEnd,
    call_in,
    is_at_one_line,
    last_words,
    raise_failures,
    reason_of_death,
)
from raylit.driver.ray.heartbeat import Heartbeat
from raylit.driver.ray.placement import Placement
from raylit.driver.ray.rendezvous import Rendezvous
from raylit.driver.ray.resource_request import CapacityWait
from raylit.driver.ray.serialization import SerializedJob, pack, pickle_plan, unpack
from raylit.driver.ray.worker_output import WorkerOutput
from raylit.errors import ResourcesError, WorkerDied, is_traceback_full
from raylit.protocol.messages import (
    ActorMessage,
    Command,
    CommandDone,
    Evaluate,
    Failed,
    LogCall,
    Predict,
    Printed,
    Report,
    Start,
    Train,
    Weights,
)
from raylit.protocol.process_settings import files_of_user_modules, variables_for_live_processes
from raylit.worker.job import WorkerContext

_STOP_S = 5.0
"""For a worker to end by itself before it is killed."""
_WAKE_S = 0.5
"""Between two looks at what does not arrive by itself: silence, a wish to stop."""
_SEEING_S = 30.0
"""For a store to say whether something is there."""
_AWAKE_S = 10.0
"""For idle workers to answer, where ping_timeout_s has no limit: nothing of the user's keeps them busy."""
_STARTING_S = 30.0
"""Before a line says that workers have not started yet: an ordinary start needs none, also on a busy machine."""
_LOOPS = (Train, Evaluate, Predict)
_TOGETHER_S = 0.5
"""Ranks that fail on the same line do so within this time and are one error."""
_OUTSIDE = "no line of the user's own, as when gradients are reduced"
_BLAME_S = 5.0
"""For the cause to arrive, when the first to fail is a collective whose peer has gone."""


class ActorGroup:
    """Actors that have formed a group and take up one run after the other."""

    is_in_driver = False

    def __init__(
        self, workers: Workers, *, variables: Mapping[str, str], make_room: Callable[[], bool] = lambda: False
    ) -> None:
        """Spawn the actors and let them meet. ResourcesError, WorkerDied: that did not work.

        `variables`: of the environment, with which their processes are to begin beside those of the node. `make_room`:
        see Placement.
        """
        self.workers = workers
        self.variables = dict(variables)
        self._is_on_own_host = False
        """All of them run on the driver's."""
        self._actors: list[Any] = []
        self._streams: list[Any] = []
        self._calls: list[Any] = []
        """What was asked of actors without waiting; it says nothing unless it fails to arrive."""
        self._contexts: list[WorkerContext] = []
        self._ends: list[ProcessEnd | None] = []
        self._printouts = WorkerOutput(num_workers=workers.num_workers)
        self._session = local_cluster.session()
        self._placement: Placement | None = Placement(workers, make_room=make_room)
        self.resources = self._placement.resources
        """What each worker takes away from others."""
        self._leftovers: list[str] = []
        self.is_usable = True
        """Every worker is alive and as good as new."""
        self.is_idle = True
        """Every worker is alive and at the end of its last command."""
        self._num_commands = 0
        self._failures: dict[int, Failed] = {}
        """By rank, of the command that fails."""
        self._is_braking = False
        try:
            self._spawn()
            self._form()
        except BaseException:
            self.end()
            raise

    def assign(self, plan: Plan, parcel: SerializedJob, *, environment_before: Mapping[str, str]) -> None:
        """Make the workers ready for the commands of a run, and their processes like this one. The user's objects
        travel once, not once per worker.

        `is_usable` is False afterwards where a worker still holds code that has changed: take a new group then.
        `environment_before`: what workers may have of this process's earlier variables.
        """
        reference = _stored(parcel, f"the module and its data of {parcel.num_bytes / 2**30:.1f} GB")
        assignment = self._assignment(plan, environment_before)
        self._is_braking = False
        # Unpickling may hold the interpreter for long.
        self._ask(
            [actor.assign.remote(assignment, reference) for actor in self._actors],
            limit_s=self.workers.start_ping_timeout_s,
        )
        self.is_usable = self.is_usable and not self._leftovers

    def _assignment(self, plan: Plan, environment_before: Mapping[str, str]) -> Assignment:
        # Another host has its own modules, and the workers where Ray gives them packages or a directory.
        has_own_modules = not self._is_on_own_host or bool(local_cluster.runtime_env().keys() - {"env_vars"})
        return Assignment(
            plan=pickle_plan(plan),
            import_path=tuple(os.path.abspath(path) for path in sys.path),
            prefix="" if has_own_modules else sys.prefix,
            files={} if has_own_modules else files_of_user_modules(sys.modules),
            settings=local_cluster.settings_for_workers(),
            # On several hosts each has its own, but what this program has changed counts everywhere.
            variables=variables_for_live_processes(
                environment_before, is_whole=self._is_on_own_host, fixed=local_cluster.fixed_variables()
            ),
        )

    @property
    def is_of_this_session(self) -> bool:
        """This process is still connected to Ray as it was when it made them; else they are gone."""
        return self._session is not None and self._session == local_cluster.session()

    def check_awake(self) -> None:
        """Of workers that do nothing, a sign of life is due soon. WorkerDied: one has gone, or fallen silent."""
        pings = [actor.ping.remote() for actor in self._actors]
        watch = self._watch(limit_s=self.workers.ping_timeout_s or _AWAKE_S)
        late = pings
        while late:
            _, late = ray.wait(late, num_returns=len(late), timeout=_WAKE_S)
            if (silent := watch.silent_rank()) is not None:
                self.is_usable = self.is_idle = False
                raise self._silence(*silent)
        for rank, ping in enumerate(pings):
            try:
                ray.get(ping)
            except DEATHS as error:
                self.is_usable = False
                raise self._death(rank, error) from error

    def is_reusable(self) -> bool:
        """Its resources are those that this process would be given now."""
        return self._placement is not None and self._placement.is_reusable()

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        # A checkpoint in the command is stored once and shared by the workers of a host.
        reference = _stored(pack(command), "a checkpoint")
        self._num_commands += 1
        self._calls = [actor.submit.remote(reference, self._num_commands) for actor in self._actors]
        # What a start prepares may hold the interpreter for long: data sets unpickled, kernels compiled.
        is_start = isinstance(command, Start)
        limit_s = self.workers.start_ping_timeout_s if is_start else self.workers.ping_timeout_s
        yield from self._until_done(self._watch(limit_s=limit_s), is_braked=isinstance(command, _LOOPS))

    def can_read(self, place: str) -> bool:
        """Where one does not answer, for its death or its silence, the next command says so."""
        try:
            return all(ray.get([actor.can_read.remote(place) for actor in self._actors], timeout=_SEEING_S))
        except (GetTimeoutError, *DEATHS):
            return False

    def checkpoint_writer(self, *, is_in_parts: bool) -> CheckpointTransfer | PartTransfer:
        limit_s = self.workers.ping_timeout_s
        if is_in_parts:
            return PartTransfer(self._actors, ping_timeout_s=limit_s)
        return CheckpointTransfer(self._actors[0], ping_timeout_s=limit_s)

    def arm_stop(self) -> None:
        self._is_braking = True  # seen as soon as the wait for reports wakes up

    def disarm_stop(self) -> None:
        self._is_braking = False

    def dismiss(self) -> None:
        """End the run in the workers. `is_usable` tells whether nothing of it is left in any of them."""
        self._ask([actor.dismiss.remote() for actor in self._actors], limit_s=self.workers.ping_timeout_s)
        self.is_usable = self.is_usable and not self._leftovers

    def end(self) -> None:
        """End the processes and free what they hold. May be called more than once."""
        self.is_usable = False
        actors, self._actors = self._actors, []
        self._streams = []
        if not self.is_of_this_session:
            self._calls, self._placement = [], None
            return
        with contextlib.suppress(RayError):
            # Busy ones may wait in a collective for ever: there is nothing to say goodbye to.
            farewells = [actor.stop.remote() for actor in actors if self.is_idle]
            if farewells:
                ray.wait(farewells, num_returns=len(farewells), timeout=_STOP_S)
        placement, self._placement = self._placement, None
        if self.is_of_this_session:  # a thread that ends idle workers may have waited meanwhile
            self._kill(actors)
            if placement is not None:
                placement.remove()

    def _spawn(self) -> None:
        assert self._placement is not None
        actor_class: Any = ray.remote(WorkerActor)
        # Ray starts processes for these, where others come from those that it has ready.
        environment = {"runtime_env": {"env_vars": self.variables}} if self.variables else {}
        actors = [
            actor_class.options(max_concurrency=20, **environment, **self._placement.options(index)).remote()
            for index in range(self.workers.num_workers)
        ]
        self._actors = actors
        places = self._started([actor.whereabouts.remote() for actor in actors])
        order = _rank_order(places)
        self._actors = [actors[index] for index in order]
        self._contexts = _contexts([places[index] for index in order])
        ray_core.hide_worker_deaths([place.worker_id for place in places])
        own = ray.get_runtime_context().get_node_id()
        self._is_on_own_host = all(place.node_id == own for place in places)
        self._log_paths = [places[index].log_path if places[index].node_id == own else "" for index in order]
        self._ends = [
            ProcessEnd(place.pid, log_path=place.log_path) if place.node_id == own else None
            for place in map(places.__getitem__, order)
        ]

    def _started(self, calls: list[Any]) -> list[ActorInfo]:
        """Where they have come to run, once all of them do. ResourcesError: not in time, or not at all."""
        waiting = CapacityWait(timeout_s=self.workers.start_timeout_s, first_line_s=_STARTING_S)
        while True:
            started, late = ray.wait(calls, num_returns=len(calls), timeout=waiting.slice_s)
            try:
                places: list[ActorInfo] = ray.get(started)
            except DEATHS as error:
                raise ResourcesError(f"a worker's process could not start: {reason_of_death(error, None)}") from error
            if not late:
                return places
            missing = f"{len(late)} of {len(calls)} workers"
            if waiting.is_over:
                raise ResourcesError(
                    f"{missing} were placed but did not start within start_timeout_s={self.workers.start_timeout_s:g}: "
                    "ask for fewer, end other work on their hosts, or wait longer"
                )
            if waiting.is_line_due:
                waiting.say(f"the processes of {missing}, which start")

    def _form(self) -> None:
        """Give every actor its rank and let them form the process group."""
        meeting = None
        if len(self._actors) > 1:
            self._rendezvous = Rendezvous(
                driver_ip=ray.util.get_node_ip_address(), worker_ips=[context.host_ip for context in self._contexts]
            )
            meeting = self._rendezvous.next_meeting()
        self._streams = [actor.reports.options(num_returns="streaming").remote() for actor in self._actors]
        backend = self.workers.accelerator.collective_backend
        self._ask(
            [
                actor.join.remote(context, meeting, backend)
                for actor, context in zip(self._actors, self._contexts, strict=True)
            ],
            limit_s=self.workers.start_ping_timeout_s,
        )

    def _ask(self, calls: list[Any], *, limit_s: float) -> None:
        """Wait until every actor's thread has done what these calls have put before it. WorkerDied: one has gone, or
        been silent for `limit_s`."""
        self._calls = calls
        for _ in self._until_done(self._watch(limit_s=limit_s)):
            raise AssertionError("only a command reports")

    def _watch(self, *, limit_s: float) -> Heartbeat:
        def is_stopped(rank: int) -> bool:
            end = self._ends[rank]
            return end is not None and end.is_stopped

        return Heartbeat(
            self._actors, limit_s=limit_s, stopped_limit_s=self.workers.ping_timeout_s, is_stopped=is_stopped
        )

    def _until_done(self, watch: Heartbeat, *, is_braked: bool = False) -> Iterator[tuple[int, Report]]:
        """Reports of all workers until each has said that it is through."""
        waiting = set(range(len(self._actors)))
        for end in self._ends:
            if end is not None:
                end.note_start()
        self._leftovers = []
        self._failures = {}
        is_usable, self.is_usable = self.is_usable, False
        self.is_idle = False
        while waiting:
            if (silent := watch.silent_rank()) is not None:
                raise self._silence(*silent)
            if is_braked and self._is_braking:
                is_braked = False
                self._brake()
            for rank, report in self._received(timeout_s=_WAKE_S):
                if isinstance(report, Failed):
                    yield from self._fail(report, was_usable=is_usable)
                elif isinstance(report, CommandDone):
                    waiting.discard(rank)
                    self._leftovers += report.leftovers
                else:
                    yield rank, report
                    if isinstance(report, Weights):
                        self._calls.append(self._actors[rank].make_room.remote())
        self._printouts.show_due(is_end=True)
        self.is_usable = is_usable
        self.is_idle = True

    def _brake(self) -> None:
        """Let the loops of all ranks end at the furthest border that any of them will reach."""
        holds = [actor.hold.remote(self._num_commands) for actor in self._actors]
        limit_s = self.workers.ping_timeout_s or None
        try:
            limit = max(ray.get(holds, timeout=limit_s))
            calls = [actor.go_on.remote(limit) for actor in self._actors]
            self._calls += calls  # one that has fallen silent since then is found out by the watch
        except GetTimeoutError as error:
            answered, _ = ray.wait(holds, num_returns=len(holds), timeout=0)
            rank = next(rank for rank, hold in enumerate(holds) if hold not in answered)
            raise self._silence(rank, self.workers.ping_timeout_s) from error
        except DEATHS:
            return  # the stream tells of a death

    def _received(self, *, timeout_s: float) -> Iterator[tuple[int, Report | CommandDone | Failed]]:
        """What has arrived, waiting for the first of it at most `timeout_s`."""
        ready: list[Any]
        ready, _ = ray.wait([*self._calls, *self._streams], num_returns=1, timeout=timeout_s, fetch_local=False)
        for call in [call for call in self._calls if call in ready]:
            self._calls.remove(call)
            ready.remove(call)
            with contextlib.suppress(*DEATHS):  # the stream tells of a death
                ray.get(call)
        for stream in ready:
            rank = self._streams.index(stream)
            try:
                reports: list[ActorMessage] = ray.get(next(stream))
            except (*DEATHS, StopIteration) as error:
                raise self._death(rank, error) from (error if is_traceback_full() else None)
            for report in reports:
                if isinstance(report, Printed):
                    self._printouts.take_in(rank, report)
                else:
                    yield rank, unpack(report)
        self._printouts.show_due()

    def _silence(self, rank: int, limit_s: float) -> WorkerDied:
        return WorkerDied(
            rank=rank,
            host=self._contexts[rank].host,
            reason=(
                f"it has not answered for {limit_s:g} s: its process is stopped or hangs, or its host is lost. If it "
                "was only busy in code that holds Python's lock, raise ping_timeout_s (0: wait for ever)"
            ),
        )

    def _death(self, rank: int, error: BaseException) -> WorkerDied:
        self._printouts.show_due(is_end=True)
        end = self._ends[rank]
        reason = reason_of_death(error, None if end is None else end.describe())
        if said := last_words(self._log_paths[rank]):
            reason += said + self._calls_of_others(rank)
        return WorkerDied(rank=rank, host=self._contexts[rank].host, reason=reason)

    def _calls_of_others(self, dead_rank: int) -> str:
        """Where the ranks stand that waited for one which gloo has ended."""
        known = {dead_rank, *self._failures}
        streams = {stream: rank for rank, stream in enumerate(self._streams) if rank not in known}
        failures = list(self._failures.values())
        deadline = time.monotonic() + _BLAME_S
        while streams and (left_s := deadline - time.monotonic()) > 0:
            ready: list[Any] = ray.wait(list(streams), num_returns=1, timeout=left_s, fetch_local=False)[0]
            for stream in ready:
                try:
                    reports = [unpack(report) for report in ray.get(next(stream)) if not isinstance(report, Printed)]
                except (*DEATHS, StopIteration):
                    del streams[stream]
                    continue
                for failed in [report for report in reports if isinstance(report, Failed)]:
                    failures.append(failed)
                    streams.pop(stream, None)
        failures.sort(key=lambda failed: failed.rank)
        calls = [call_in(failed.traceback, is_last_innermost=True) or _OUTSIDE for failed in failures]
        return "".join(f"; rank {failed.rank} at {call}" for failed, call in zip(failures, calls, strict=True))

    def _fail(self, first: Failed, *, was_usable: bool) -> Iterator[tuple[int, Report]]:
        """Raise the user's exception, with those of other ranks that fail at the same time; or WorkerDied, where the
        exceptions only follow from that. Yields what hooks have logged until then."""
        failures = self._failures = {first.rank: first}
        death: WorkerDied | None = None
        started = time.monotonic()
        try:
            while len(failures) < len(self._actors):
                grace_s = _BLAME_S if all(it.is_consequence for it in failures.values()) else _TOGETHER_S
                left_s = started + grace_s - time.monotonic()
                if left_s <= 0:
                    break
                for rank, report in self._received(timeout_s=min(left_s, _TOGETHER_S)):
                    if isinstance(report, Failed):
                        failures[rank] = report
                    elif isinstance(report, LogCall):
                        yield rank, report
        except WorkerDied as error:
            death = error
        self._printouts.show_due(is_end=True)
        if death is not None and all(it.is_consequence for it in failures.values()):
            raise death
        if len(failures) == len(self._actors) and is_at_one_line(list(failures.values())) and first.is_harmless:
            self.is_usable, self.is_idle = was_usable, True
        raise_failures(list(failures.values()), num_workers=len(self._contexts))

    def _kill(self, actors: list[Any]) -> None:
        for actor in actors:
            try:
                ray.kill(actor)
            except RayError:
                continue


def _stored(value: Any, what: str) -> Any:
    """In Ray's object store. ResourcesError: there is no room."""
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise ResourcesError(
            f"no room for {what}: Ray's object store is full, and so is the disk that it could go to instead. Free "
            "disk space there (RAY_TMPDIR says where it is), give Ray a larger store (ray start --object-store-memory, "
            "ray.init(object_store_memory=...)), or make the data in setup(), which every worker runs"
        ) from error


def _rank_order(places: list[ActorInfo]) -> list[int]:
    """Indices by host, the driver's first, then by GPU: neighbours in rank are neighbours in the machine."""
    own = ray.get_runtime_context().get_node_id()
    return sorted(
        range(len(places)),
        key=lambda i: (places[i].node_id != own, places[i].ip, places[i].node_id, places[i].gpu_ids, i),
    )


def _contexts(places: list[ActorInfo]) -> list[WorkerContext]:
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


def _num_threads(place: ActorInfo, local_world_size: int) -> int:
    """CPU threads for torch: what the user has set, else the host's cores shared by its workers.

    Ray sets OMP_NUM_THREADS in the workers to the CPUs they asked for, so only the driver's counts as the user's word.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, place.num_cores // local_world_size)
