"""The workers as Ray actors in one placement group. Driver."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError

from raylit.compat import ray_core
from raylit.config import Plan, Workers
from raylit.driver.loop.goodput import Goodput
from raylit.driver.ray import local_cluster
from raylit.driver.ray.actor import ActorInfo, Assignment, WorkerActor
from raylit.driver.ray.checkpoint_transfer import CheckpointTransfer, PartTransfer
from raylit.driver.ray.failures import (
    DEATH_ERRORS,
    ProcessEnd,
    describe_death,
    describe_gloo_error,
    find_user_line,
    is_at_one_line,
    raise_failures,
)
from raylit.driver.ray.heartbeat import Heartbeat
from raylit.driver.ray.placement import CapacityWait, Placement
from raylit.driver.ray.rendezvous import Rendezvous
from raylit.driver.ray.serialization import SerializedJob, pickle_plan
from raylit.driver.ray.tpu_slice import SlicePlacement, wait_for_exits
from raylit.driver.ray.worker_metrics import GoodputMetrics
from raylit.driver.ray.worker_output import WorkerOutput
from raylit.errors import ConfigError, ResourcesError, WorkerDied, is_traceback_full
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
"""Time for a worker to end by itself before it is killed."""
_WAKE_S = 0.5
"""Interval between checks for what does not arrive as a message: a silent worker, a requested stop."""
_CAN_READ_TIMEOUT_S = 30.0
"""Time for a store to say whether a file is there."""
_IDLE_ANSWER_S = 10.0
"""Time for idle workers to answer, if ping_timeout_s has no limit: no user code keeps them busy."""
_FIRST_LINE_S = 30.0
"""Time before a line says that workers have not started yet: an ordinary start takes less, also on a busy machine."""
_LOOPS = (Train, Evaluate, Predict)
_MAX_WATCHED = 64
"""Up to this number of workers the streams of all are waited for while a loop runs; a wait for 64 takes 0.2 ms."""
_SAME_TIME_S = 0.5
"""Ranks that fail on the same line within this time are reported as one error."""
_NO_USER_LINE = "no line of the user's own, as when gradients are reduced"
_CAUSE_S = 5.0
"""Time for the cause to arrive, if the first failure is a collective whose peer has gone."""


class ActorGroup:
    """Group of actors that have formed a process group and run one job after the other."""

    is_in_driver = False

    def __init__(
        self, workers: Workers, *, variables: Mapping[str, str], free_resources: Callable[[], bool] = lambda: False
    ) -> None:
        """Start the actors and form their process group.

        Args:
            workers: Number, resources and placement of the workers.
            variables: Environment variables with which their processes start, in addition to those of the node.
            free_resources: See `Placement`.

        Raises:
            ResourcesError: The cluster does not have the resources, or the workers did not start in time.
            WorkerDied: A worker died or did not answer.
        """
        self.workers = workers
        self.variables = dict(variables)
        self._is_on_own_host = False
        """True if all of them run on the driver's host."""
        self._actors: list[Any] = []
        self._streams: list[Any] = []
        self._calls: list[Any] = []
        """Calls that nothing waits for; their results are only looked at for errors."""
        self._contexts: list[WorkerContext] = []
        self._processes: list[tuple[str, int]] = []
        """Node id and process id of each actor."""
        self._ends: list[ProcessEnd | None] = []
        self._output = WorkerOutput(num_workers=workers.num_workers)
        self._session = local_cluster.session()
        self._placement: Placement | SlicePlacement | None = _place_workers(workers, free_resources=free_resources)
        self.resources = self._placement.resources
        """Resources that each worker takes from the cluster."""
        self._leftovers: list[str] = []
        self.is_usable = True
        """Every worker is alive and holds nothing of an earlier run."""
        self.is_idle = True
        """Every worker is alive and has finished its last command."""
        self._num_commands = 0
        self._failures: dict[int, Failed] = {}
        """Failures by rank, of the command that fails."""
        self._goodput_metrics = GoodputMetrics()
        self._is_stop_armed = False
        self._is_loop_running = False
        """True while rank 0 runs a loop, in which it reports for all."""
        self._next_look_s = 0.0
        """Time at which the streams of the other ranks are looked at next, while a loop runs."""
        self._on_release: Callable[[ActorGroup, bool], None] | None = None
        """Set while the group works for a run."""
        try:
            self._start_actors()
            self._form_process_group()
        except BaseException:
            self.end()
            raise

    def assign(
        self,
        plan: Plan,
        serialized_job: SerializedJob,
        *,
        log_dir: str,
        environment_before: Mapping[str, str],
        on_release: Callable[["ActorGroup", bool], None],
    ) -> None:
        """Make the workers ready for the commands of a run, and their processes' settings equal to this one's.

        The user's objects are sent once, not once per worker. `is_usable` is False afterwards if a worker still has
        code that has changed: use a new group then.

        Args:
            plan: The run's configuration.
            serialized_job: The user's objects.
            log_dir: The run's log directory, which names it in metrics.
            environment_before: Variables of this process at earlier runs, which workers may still have.
            on_release: Takes the group over when the run releases it, with `is_kept` of `release`.
        """
        self._on_release = on_release
        self._goodput_metrics.begin_run(log_dir)
        reference = _put_in_store(
            serialized_job, f"the module and its data of {serialized_job.num_bytes / 2**30:.1f} GB"
        )
        # Stored, too: Ray would pickle it once for each actor.
        assignment = _put_in_store(self._build_assignment(plan, environment_before), "the settings of the run")
        self._is_stop_armed = False
        # Unpickling may hold the GIL for long.
        self._wait_for_calls(
            [actor.assign.remote(assignment, reference) for actor in self._actors],
            limit_s=self.workers.start_ping_timeout_s,
        )
        self.is_usable = self.is_usable and not self._leftovers

    def _build_assignment(self, plan: Plan, environment_before: Mapping[str, str]) -> Assignment:
        # Another host has its own modules, and so do workers to which Ray gives packages or a directory.
        has_own_modules = not self._is_on_own_host or bool(local_cluster.runtime_env().keys() - {"env_vars"})
        return Assignment(
            plan=pickle_plan(plan),
            import_path=tuple(os.path.abspath(path) for path in sys.path),
            prefix="" if has_own_modules else sys.prefix,
            files={} if has_own_modules else files_of_user_modules(sys.modules),
            settings=local_cluster.settings_for_workers(),
            # On several hosts each has its own variables, but what this program has changed applies everywhere.
            variables=variables_for_live_processes(
                environment_before, is_whole=self._is_on_own_host, fixed=local_cluster.fixed_variables()
            ),
        )

    @property
    def is_of_this_session(self) -> bool:
        """True if this process is still connected to Ray as it was when the actors started; otherwise they are gone."""
        return self._session is not None and self._session == local_cluster.session()

    def check_awake(self) -> None:
        """Check that idle workers answer soon. WorkerDied: one has died or does not answer."""
        pings = [actor.ping.remote() for actor in self._actors]
        heartbeat = self._start_heartbeat(limit_s=self.workers.ping_timeout_s or _IDLE_ANSWER_S)
        late = pings
        while late:
            _, late = ray.wait(late, num_returns=len(late), timeout=_WAKE_S)
            if (silent := heartbeat.find_silent_rank()) is not None:
                self.is_usable = self.is_idle = False
                raise self._build_silence_error(*silent)
        for rank, ping in enumerate(pings):
            try:
                ray.get(ping)
            except DEATH_ERRORS as error:
                self.is_usable = False
                raise self._build_death_error(rank, error) from error

    def is_reusable(self) -> bool:
        """Return True if the group's resources are those that this process would be given now."""
        return self._placement is not None and self._placement.is_reusable()

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        # A checkpoint in the command is stored once and shared by the workers of a host.
        reference = _put_in_store(command, "a checkpoint")
        self._num_commands += 1
        self._calls = [actor.submit.remote(reference, self._num_commands) for actor in self._actors]
        # A start may hold the GIL for long: data sets are unpickled, kernels compiled.
        is_start = isinstance(command, Start)
        limit_s = self.workers.start_ping_timeout_s if is_start else self.workers.ping_timeout_s
        yield from self._collect_reports(
            self._start_heartbeat(limit_s=limit_s), is_stoppable=isinstance(command, _LOOPS)
        )

    def can_read(self, path: str) -> bool:
        """Return True if every worker can read the path; if one does not answer, the next command reports why."""
        try:
            return all(ray.get([actor.can_read.remote(path) for actor in self._actors], timeout=_CAN_READ_TIMEOUT_S))
        except (GetTimeoutError, *DEATH_ERRORS):
            return False

    def record_goodput(self, goodput: Goodput) -> None:
        self._goodput_metrics.count(goodput.to_dict())

    def checkpoint_writer(self, *, is_in_parts: bool) -> CheckpointTransfer | PartTransfer:
        limit_s = self.workers.ping_timeout_s
        if is_in_parts:
            return PartTransfer(self._actors, ping_timeout_s=limit_s)
        return CheckpointTransfer(self._actors[0], ping_timeout_s=limit_s)

    def arm_stop(self) -> None:
        self._is_stop_armed = True  # read as soon as the wait for reports wakes up

    def disarm_stop(self) -> None:
        self._is_stop_armed = False

    def release(self, *, is_kept: bool = True) -> None:
        """Give the group back to its owner, the worker pool. May be called more than once."""
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release(self, is_kept)

    def end_run(self) -> None:
        """End the run in the workers; `is_usable` is False afterwards if something of it is left in one of them."""
        self._wait_for_calls([actor.end_run.remote() for actor in self._actors], limit_s=self.workers.ping_timeout_s)
        self.is_usable = self.is_usable and not self._leftovers

    def end(self) -> None:
        """End the processes and free their resources. May be called more than once."""
        self.is_usable = False
        actors, self._actors = self._actors, []
        self._streams = []
        if not self.is_of_this_session:
            self._calls, self._placement = [], None
            return
        with contextlib.suppress(RayError):
            # Busy ones may wait in a collective for ever: only idle ones can stop by themselves.
            stop_calls = [actor.stop.remote() for actor in actors if self.is_idle]
            if stop_calls:
                ray.wait(stop_calls, num_returns=len(stop_calls), timeout=_STOP_S)
        placement, self._placement = self._placement, None
        if self.is_of_this_session:  # a thread that ends idle workers may have waited above
            self.kill_actors(actors)
            if self.workers.accelerator.is_on_tpu:
                wait_for_exits(self._processes)
            if placement is not None:
                placement.remove()

    def _start_actors(self) -> None:
        assert self._placement is not None
        actors = self._actors = self.create_actors(self._placement)
        infos = self._wait_for_start([actor.get_info.remote() for actor in actors])
        self._processes = [(info.node_id, info.pid) for info in infos]
        own = ray.get_runtime_context().get_node_id()
        is_in_rank_order = self._placement.is_in_rank_order
        rank_order = [*range(len(infos))] if is_in_rank_order else order_by_host_and_gpu(infos, own_node=own)
        self._actors = [actors[index] for index in rank_order]
        self._contexts = _build_contexts([infos[index] for index in rank_order])
        ray_core.hide_worker_deaths([info.worker_id for info in infos])
        self._is_on_own_host = all(info.node_id == own for info in infos)
        self._log_paths = [infos[index].log_path if infos[index].node_id == own else "" for index in rank_order]
        self._ends = [
            ProcessEnd(info.pid, log_path=info.log_path) if info.node_id == own else None
            for info in map(infos.__getitem__, rank_order)
        ]

    def create_actors(self, placement: Placement | SlicePlacement) -> list[Any]:
        """Create the actors without waiting for their processes; a subclass may create others with their methods."""
        actor_class: Any = ray.remote(WorkerActor)
        actors = []
        for index in range(self.workers.num_workers):
            options = placement.options(index)
            if variables := {**self.variables, **placement.variables(index)}:
                # Ray starts a new process for it, instead of using a prestarted one.
                options["runtime_env"] = {"env_vars": variables}
            actors.append(actor_class.options(max_concurrency=20, **options).remote())
        return actors

    def _wait_for_start(self, calls: list[Any]) -> list[ActorInfo]:
        """Wait for all actors and return where they run. ResourcesError: they did not start, or not in time."""
        capacity_wait = CapacityWait(timeout_s=self.workers.start_timeout_s, first_line_s=_FIRST_LINE_S)
        while True:
            started, late = ray.wait(calls, num_returns=len(calls), timeout=capacity_wait.slice_s)
            try:
                infos: list[ActorInfo] = ray.get(started)
            except DEATH_ERRORS as error:
                raise ResourcesError(f"a worker's process could not start: {describe_death(error, None)}") from error
            if not late:
                return infos
            missing = f"{len(late)} of {len(calls)} workers"
            if capacity_wait.is_over:
                raise ResourcesError(
                    f"{missing} were placed but did not start within start_timeout_s={self.workers.start_timeout_s:g}: "
                    "ask for fewer, end other work on their hosts, or wait longer"
                )
            if capacity_wait.is_line_due:
                capacity_wait.say(f"the processes of {missing}, which start")

    def _form_process_group(self) -> None:
        """Give every actor its rank and form the process group."""
        rendezvous = None
        if len(self._actors) > 1:
            self._rendezvous = Rendezvous(
                driver_ip=ray.util.get_node_ip_address(), worker_ips=[context.host_ip for context in self._contexts]
            )
            rendezvous = self._rendezvous.next_info()
        self._streams = [actor.reports.options(num_returns="streaming").remote() for actor in self._actors]
        backend = self.workers.accelerator.collective_backend
        self._wait_for_calls(
            [
                actor.join.remote(context, rendezvous, backend)
                for actor, context in zip(self._actors, self._contexts, strict=True)
            ],
            limit_s=self.workers.start_ping_timeout_s,
        )

    def _wait_for_calls(self, calls: list[Any], *, limit_s: float) -> None:
        """Wait until every actor's thread has finished these calls.

        Raises:
            WorkerDied: An actor has died or has not answered for `limit_s`.
        """
        self._calls = calls
        for _ in self._collect_reports(self._start_heartbeat(limit_s=limit_s)):
            raise AssertionError("only a command reports")

    def _start_heartbeat(self, *, limit_s: float) -> Heartbeat:
        def is_stopped(rank: int) -> bool:
            end = self._ends[rank]
            return end is not None and end.is_stopped

        return Heartbeat(
            self._actors, limit_s=limit_s, stopped_limit_s=self.workers.ping_timeout_s, is_stopped=is_stopped
        )

    def _collect_reports(self, heartbeat: Heartbeat, *, is_stoppable: bool = False) -> Iterator[tuple[int, Report]]:
        """Yield the reports of all workers until each has finished."""
        unfinished = set(range(len(self._actors)))
        for end in self._ends:
            if end is not None:
                end.note_start()
        self._leftovers = []
        self._failures = {}
        is_usable, self.is_usable = self.is_usable, False
        self.is_idle = False
        self._is_loop_running = is_stoppable
        while unfinished:
            if (silent := heartbeat.find_silent_rank()) is not None:
                raise self._build_silence_error(*silent)
            if is_stoppable and self._is_stop_armed:
                is_stoppable = False
                self._stop_loops()
            for rank, report in self._receive(timeout_s=_WAKE_S):
                if isinstance(report, Failed):
                    yield from self._raise_failures(report, was_usable=is_usable)
                elif isinstance(report, CommandDone):
                    unfinished.discard(rank)
                    self._is_loop_running = self._is_loop_running and rank != 0
                    self._leftovers += report.leftovers
                else:
                    yield rank, report
                    if isinstance(report, Weights):
                        self._calls.append(self._actors[rank].release_chunk_slot.remote())
        self._output.print_due(is_end=True)
        self.is_usable = is_usable
        self.is_idle = True

    def _stop_loops(self) -> None:
        """Let the loops of all ranks end at the furthest batch border that any of them will reach."""
        pauses = [actor.pause_loop.remote(self._num_commands) for actor in self._actors]
        limit_s = self.workers.ping_timeout_s or None
        try:
            limit = max(ray.get(pauses, timeout=limit_s))
            calls = [actor.continue_until.remote(limit) for actor in self._actors]
            self._calls += calls  # the heartbeat finds one that stops answering now
        except GetTimeoutError as error:
            answered, _ = ray.wait(pauses, num_returns=len(pauses), timeout=0)
            rank = next(rank for rank, pause in enumerate(pauses) if pause not in answered)
            raise self._build_silence_error(rank, self.workers.ping_timeout_s) from error
        except DEATH_ERRORS:
            return  # the stream reports a death

    def _receive(self, *, timeout_s: float) -> Iterator[tuple[int, Report | CommandDone | Failed]]:
        """Yield the messages that have arrived, waiting for the first at most `timeout_s`."""
        ready = set(self._wait_for_messages(timeout_s=timeout_s))
        finished_calls = [call for call in self._calls if call in ready]
        if finished_calls:
            self._calls = [call for call in self._calls if call not in ready]
            _check_calls(finished_calls)
        for rank, stream in enumerate(self._streams):
            if stream not in ready:
                continue
            try:
                reports: list[ActorMessage] = ray.get(next(stream))
            except (*DEATH_ERRORS, StopIteration) as error:
                raise self._build_death_error(rank, error) from (error if is_traceback_full() else None)
            for report in reports:
                if isinstance(report, Printed):
                    self._output.add(rank, report)
                else:
                    yield rank, report
        self._output.print_due()

    def _wait_for_messages(self, *, timeout_s: float) -> list[Any]:
        """Wait until a call has ended or a stream has an item; return all of which that is true.

        Ray's wait looks at every worker, so one wait for each message would take a time that is quadratic in their
        number, and one for each tick of a loop too long. While a loop runs, rank 0 reports alone: with many workers the
        others, of which one may fail or die, are looked at only now and then.
        """
        pending = [*self._calls, *self._streams]
        if is_rank_0_first := self._is_loop_running and len(self._streams) > _MAX_WATCHED:
            remaining_s = self._next_look_s - time.monotonic()
            if remaining_s > 0:
                return ray.wait(self._streams[:1], timeout=min(timeout_s, remaining_s), fetch_local=False)[0]
            self._next_look_s = time.monotonic() + _WAKE_S
        first: list[Any] = ray.wait(
            pending, num_returns=1, timeout=0 if is_rank_0_first else timeout_s, fetch_local=False
        )[0]
        return first and ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)[0]

    def _build_silence_error(self, rank: int, limit_s: float) -> WorkerDied:
        return WorkerDied(
            rank=rank,
            host=self._contexts[rank].host,
            reason=(
                f"it has not answered for {limit_s:g} s: its process is stopped or hangs, or its host is lost. If it "
                "was only busy in code that holds Python's lock, raise ping_timeout_s (0: wait for ever)"
            ),
        )

    def _build_death_error(self, rank: int, error: BaseException) -> WorkerDied:
        self._output.print_due(is_end=True)
        end = self._ends[rank]
        reason = describe_death(error, None if end is None else end.describe())
        if gloo_error := describe_gloo_error(self._log_paths[rank]):
            reason += gloo_error + self._describe_waiting_ranks(rank)
        return WorkerDied(rank=rank, host=self._contexts[rank].host, reason=reason)

    def _describe_waiting_ranks(self, dead_rank: int) -> str:
        """Describe where the ranks stand that waited for one that gloo has ended."""
        known_ranks = {dead_rank, *self._failures}
        streams = {stream: rank for rank, stream in enumerate(self._streams) if rank not in known_ranks}
        failures = list(self._failures.values())
        deadline = time.monotonic() + _CAUSE_S
        while streams and (remaining_s := deadline - time.monotonic()) > 0:
            ready: list[Any] = ray.wait(list(streams), num_returns=1, timeout=remaining_s, fetch_local=False)[0]
            for stream in ready:
                try:
                    reports: list[ActorMessage] = ray.get(next(stream))
                except (*DEATH_ERRORS, StopIteration):
                    del streams[stream]
                    continue
                for failed in [report for report in reports if isinstance(report, Failed)]:
                    failures.append(failed)
                    streams.pop(stream, None)
        failures.sort(key=lambda failed: failed.rank)
        calls = [find_user_line(failed.traceback, is_last_innermost=True) or _NO_USER_LINE for failed in failures]
        return "".join(f"; rank {failed.rank} at {call}" for failed, call in zip(failures, calls, strict=True))

    def _raise_failures(self, first: Failed, *, was_usable: bool) -> Iterator[tuple[int, Report]]:
        """Raise the user's exception with those of other ranks that fail at the same time.

        Raises WorkerDied instead if the exceptions only follow from a death. Yields what hooks log until then.
        """
        self._is_loop_running = False
        failures = self._failures = {first.rank: first}
        death: WorkerDied | None = None
        started = time.monotonic()
        try:
            while len(failures) < len(self._actors):
                wait_s = _CAUSE_S if all(it.is_consequence for it in failures.values()) else _SAME_TIME_S
                remaining_s = started + wait_s - time.monotonic()
                if remaining_s <= 0:
                    break
                for rank, report in self._receive(timeout_s=min(remaining_s, _SAME_TIME_S)):
                    if isinstance(report, Failed):
                        failures[rank] = report
                    elif isinstance(report, LogCall):
                        yield rank, report
        except WorkerDied as error:
            death = error
        self._output.print_due(is_end=True)
        if death is not None and all(it.is_consequence for it in failures.values()):
            raise death
        if len(failures) == len(self._actors) and is_at_one_line(list(failures.values())) and first.is_harmless:
            self.is_usable, self.is_idle = was_usable, True
        raise_failures(list(failures.values()), num_workers=len(self._contexts))

    def kill_actors(self, actors: list[Any]) -> None:
        """End the processes of actors that `create_actors` has created, without waiting."""
        for actor in actors:
            try:
                ray.kill(actor)
            except RayError:
                continue


def _place_workers(workers: Workers, *, free_resources: Callable[[], bool]) -> Placement | SlicePlacement:
    """Reserve resources for the workers, or use those of the task, actor or trial that this process runs in.

    Raises:
        ConfigError: Several TPU workers would have to use the resources of a task, an actor or a trial.
    """
    if ray.util.get_current_placement_group() is None and workers.slices is not None:
        return SlicePlacement(workers, free_resources=free_resources)
    if workers.slices is not None and workers.num_workers > 1:
        raise ConfigError(
            f"{workers.num_workers} workers on TPU slices inside a Ray task, actor or trial with a placement group: "
            "its bundles need not be on one slice. Run the Trainer in the driver, or use one worker"
        )
    return Placement(workers, free_resources=free_resources)


def _put_in_store(value: Any, what: str) -> Any:
    """Put a value into Ray's object store. ResourcesError: the store is full."""
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise ResourcesError(
            f"no room for {what}: Ray's object store is full, and so is the disk that it could go to instead. Free "
            "disk space there (RAY_TMPDIR says where it is), give Ray a larger store (ray start --object-store-memory, "
            "ray.init(object_store_memory=...)), or make the data in setup(), which every worker runs"
        ) from error


def _check_calls(calls: list[Any]) -> None:
    """Raise the error of a call that has ended, but not of one whose actor has died: the stream reports that."""
    try:
        ray.get(calls)
    except DEATH_ERRORS:
        for call in calls:
            with contextlib.suppress(*DEATH_ERRORS):
                ray.get(call)


def order_by_host_and_gpu(infos: Sequence[ActorInfo], *, own_node: str) -> list[int]:
    """Return the actors' indices by host, the driver's first, then by GPU: neighbouring ranks share hardware."""

    def build_key(index: int) -> tuple[Any, ...]:
        info = infos[index]
        gpus = [_split_numbers(gpu) for gpu in info.gpu_ids]
        return info.node_id != own_node, _split_numbers(info.ip), info.node_id, gpus, index

    return sorted(range(len(infos)), key=build_key)


def _split_numbers(text: str) -> list[str | int]:
    """Split into words and numbers, in turn, so that 9 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", text)]


def _build_contexts(infos: list[ActorInfo]) -> list[WorkerContext]:
    ranks_by_node: dict[str, list[int]] = {}
    contexts = []
    for rank, info in enumerate(infos):
        ranks_by_node.setdefault(info.node_id, []).append(rank)
    for node_rank, ranks in enumerate(ranks_by_node.values()):
        for local_rank, rank in enumerate(ranks):
            info = infos[rank]
            contexts.append(
                WorkerContext(
                    rank=rank,
                    local_rank=local_rank,
                    node_rank=node_rank,
                    world_size=len(infos),
                    local_world_size=len(ranks),
                    num_nodes=len(ranks_by_node),
                    host=info.host,
                    num_threads=_choose_num_threads(info, len(ranks)),
                    host_ip=info.ip,
                )
            )
    return sorted(contexts, key=lambda context: context.rank)


def _choose_num_threads(info: ActorInfo, local_world_size: int) -> int:
    """Return the CPU threads for torch: the user's setting, or the host's cores shared by its workers.

    Ray sets OMP_NUM_THREADS in the workers to the CPUs they asked for, so only the driver's value is the user's.
    """
    user_setting = os.environ.get("OMP_NUM_THREADS", "")
    return int(user_setting) if user_setting.isdigit() else max(1, info.num_cores // local_world_size)
