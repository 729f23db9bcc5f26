"""The Ray actor that runs one worker: a training thread, and the messages it sends to the driver."""

import asyncio
import contextlib
import faulthandler
import os
import queue
import socket
import sys
import threading
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from raylit.accelerators import Accelerator, CPUAccelerator
from raylit.checkpoint import files
from raylit.checkpoint.pending import PendingCheckpoint, PendingPart
from raylit.driver.ray.failures import explain_failure
from raylit.driver.ray.rendezvous import RendezvousInfo
from raylit.driver.ray.serialization import SerializedJob, pack, unpack, unpickle_job, unpickle_plan
from raylit.errors import CheckpointError
from raylit.protocol.messages import ActorMessage, Command, CommandDone, Failed, Part, Ticked, Weights
from raylit.protocol.process_settings import ProcessSettings, take_over_variables
from raylit.worker.data.script_objects import ScriptModule
from raylit.worker.data.shared_memory import SharedMemory
from raylit.worker.job import WorkerContext
from raylit.worker.loops.stop_barrier import StopBarrier
from raylit.worker.process.process_reset import ProcessState
from raylit.worker.process.stdout_capture import StdoutCapture
from raylit.worker.worker import Worker

_COALESCE_S = 0.1
"""Reports that nobody waits for travel together: each batch of them takes the interpreter away from the steps."""


class Outbox:
    """Wakes the loop once for all that gathers until it comes to fetch it, not once for each report."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._reports: list[ActorMessage] = []
        self._has_mail = asyncio.Event()
        self._is_urgent = asyncio.Event()

    # In any thread

    def put(self, report: ActorMessage) -> None:
        with self._lock:
            is_first = not self._reports
            if not is_first and isinstance(report, Ticked) and isinstance(self._reports[-1], Ticked):
                self._reports[-1] = report
                return
            self._reports.append(report)
        if isinstance(report, (CommandDone, Failed, Weights)):
            self._call(self._is_urgent)
        if is_first:
            self._call(self._has_mail)

    def announce(self) -> None:
        """There is something to fetch beside the reports."""
        self._call(self._has_mail)

    # In the loop

    async def fetched(self) -> list[ActorMessage]:
        """What has gathered a little after the first of it; at once where somebody waits."""
        await self._has_mail.wait()
        if not self._is_urgent.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_urgent.wait(), timeout=_COALESCE_S)
        self._has_mail.clear()
        self._is_urgent.clear()
        with self._lock:
            reports, self._reports = self._reports, []
        return reports

    def _call(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(event.set)


Held = Literal["checkpoint", "part"]
"""What a process holds to be written: rank 0 the whole, or all but the parts; each rank its part."""

_AHEAD = 2
"""Pieces of the weights on their way to the driver: what they need of this host's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorInfo:
    """Where an actor has come to run."""

    node_id: str
    worker_id: str
    ip: str
    host: str
    gpu_ids: tuple[str, ...]
    pid: int
    num_cores: int
    log_path: str = ""
    """Where the process's stderr goes, on its host; what comes from C is there only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A run, as a worker takes it up beside the user's objects, and what the driver's process is like."""

    plan: bytes
    """Pickled, for the user's modules that it may refer to are found only by the import path."""
    import_path: tuple[str, ...]
    """The driver's sys.path: the user's modules are found where the worker's host has them, too."""
    prefix: str
    """The sys.prefix of a driver whose modules come in the same order in its workers; else empty."""
    files: dict[str, str]
    """Of the driver's modules that are not installed, by name; empty where the workers may have others."""
    settings: ProcessSettings
    variables: dict[str, str | None]
    """Of the environment; None for those that are to be removed."""


def _log_path() -> str:
    try:
        return os.readlink("/proc/self/fd/2")
    except OSError:
        return ""


class WorkerActor:
    """Carries out what it is asked for in one thread of its own, and streams to the driver what that thread reports;
    a CommandDone or Failed ends each request."""

    def __init__(self) -> None:
        self._outbox = Outbox(asyncio.get_running_loop())
        self._inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._accelerator: Accelerator = CPUAccelerator()
        """Of the run, once there has been one."""
        self._shared: SharedMemory | None = None
        self._script: ScriptModule | None = None
        self._brake = StopBarrier()
        self._num_commands = 0
        self._room = threading.Semaphore(_AHEAD)
        self._context = WorkerContext()
        faulthandler.enable(all_threads=True)  # a library ends the process in a thread of its own
        self._output = StdoutCapture(on_lines=self._outbox.announce)
        self._thread = threading.Thread(target=self._work, name="raylit-worker", daemon=True)
        self._thread.start()

    async def whereabouts(self) -> ActorInfo:
        runtime = ray.get_runtime_context()
        return ActorInfo(
            node_id=runtime.get_node_id(),
            worker_id=runtime.get_worker_id(),
            ip=ray.util.get_node_ip_address(),
            host=socket.gethostname(),
            gpu_ids=tuple(str(gpu) for gpu in runtime.get_accelerator_ids().get("GPU", [])),
            pid=os.getpid(),
            log_path=_log_path(),
            num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        )

    async def join(self, context: WorkerContext, meeting: RendezvousInfo | None, backend: str) -> None:
        """Become a rank and meet the others."""
        self._context = context
        self._inbox.put((self._join, meeting, backend))

    async def assign(self, assignment: Assignment, job: SerializedJob) -> None:
        """Take a run up, whose Job comes pickled; what this process is too old for comes with the CommandDone."""
        self._inbox.put((self._take_up, assignment, job))

    async def dismiss(self) -> None:
        """Let go of the run; what is left of it comes with the CommandDone."""
        self._inbox.put((self._let_go,))

    async def submit(self, command: Command, number: int) -> None:
        """Carry a command out, the `number`th of this group."""
        self._brake.reset()  # here, not in the thread: a hold that comes next must not be undone
        self._num_commands = number
        self._inbox.put((self._carry_out, command))

    async def ping(self) -> None:
        """A sign of life, also while a step runs."""

    async def hold(self, number: int) -> int:
        """Have the loop of the `number`th command wait at its next border; returns the one it will not pass."""
        while self._num_commands < number:  # a command comes through the object store, later than a call like this
            await asyncio.sleep(0.01)
        return self._brake.hold()

    async def go_on(self, limit: int) -> None:
        """Let a held loop run up to a border."""
        self._brake.release(limit)

    async def make_room(self) -> None:
        """The driver has a piece of the weights in its own memory: another may follow."""
        self._room.release()

    async def can_read(self, place: str) -> bool:
        """A file, or an object, is there for this host."""
        try:
            return await asyncio.to_thread(files.exists, place)
        except CheckpointError:
            return False

    async def complete_held(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """See HeldCheckpoint.complete; so the next one. Beside the training thread."""
        parts = unpack(others, is_copying=True), unpack(callbacks, is_copying=True)
        await asyncio.to_thread(self._held("checkpoint").complete, *parts)

    async def add_parts(self, parts: list[Part], subdirectory: str) -> bytes:
        held = self._held("checkpoint")
        return await asyncio.to_thread(held.add_parts, parts, subdirectory=subdirectory)

    async def fill_draft(self, what: Held, draft: str) -> bool:
        """See HeldCheckpoint.fill; so the next ones."""
        return await asyncio.to_thread(self._held(what).fill, draft)

    async def write_held(self, what: Held, url: str) -> bool:
        """Always True."""
        await asyncio.to_thread(self._held(what).write, url)
        return True

    async def begin_pieces(self, what: Held) -> None:
        await asyncio.to_thread(self._held(what).begin_pieces)

    async def next_piece(self, what: Held) -> NDArray[np.uint8]:
        return await asyncio.to_thread(self._held(what).next_piece)

    async def describe_part(self) -> Part:
        """See PendingPart.describe."""
        return await asyncio.to_thread(self._held("part").describe)

    async def release_held(self, what: Held) -> None:
        if self._worker is not None:  # else it has gone with its run
            self._held(what).release()

    @overload
    def _held(self, what: Literal["checkpoint"]) -> PendingCheckpoint: ...

    @overload
    def _held(self, what: Literal["part"]) -> PendingPart: ...

    def _held(self, what: Held) -> PendingCheckpoint | PendingPart:
        assert self._worker is not None
        return self._worker.held if what == "checkpoint" else self._worker.held_part

    async def reports(self) -> AsyncIterator[list[ActorMessage]]:
        """Everything that the thread reports, from the first to the last, in batches. One reader."""
        while True:
            reports = await self._outbox.fetched()
            if (printed := self._output.take()) is not None:
                reports.insert(0, printed)
            if reports:
                yield [pack(report) for report in reports]

    async def stop(self) -> None:
        """End the thread and the group. Returns once that is done, so that the process can be ended."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    # In the thread

    def _work(self) -> None:
        while (task := self._inbox.get()) is not None:
            # A tuple, not a closure, whose frame would stand above every step of the user's.
            function, *arguments = task
            try:
                leftovers = function(*arguments) or ()
            except BaseException as error:  # a user's SystemExit must reach the driver too
                self._output.finish_lines()
                self._outbox.put(explain_failure(error, self._context))
            else:
                self._output.finish_lines()
                self._outbox.put(CommandDone(rank=self._context.rank, leftovers=leftovers))
        self._worker = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _join(self, meeting: RendezvousInfo | None, backend: str) -> None:
        context = self._context
        os.environ["LOCAL_RANK"], os.environ["RANK"] = str(context.local_rank), str(context.rank)
        os.environ["WORLD_SIZE"] = str(context.world_size)
        if meeting is not None:
            meeting.join(rank=context.rank, world_size=context.world_size, backend=backend, own_ip=context.host_ip)
        if context.num_threads is not None:
            torch.set_num_threads(context.num_threads)
        self._process = ProcessState()

    def _take_up(self, assignment: Assignment, parcel: SerializedJob) -> tuple[str, ...]:
        if changed := self._process.changed_modules(assignment.files):
            return changed
        take_over_variables(assignment.variables)
        assignment.settings.apply()
        given = assignment.import_path
        if assignment.prefix == sys.prefix:
            sys.path[:] = [*given, *(path for path in sys.path if path not in given)]
        else:
            sys.path.extend(path for path in given if path not in sys.path)
        job, self._shared = unpickle_job(parcel)
        assignment.settings.apply_warning_filters()  # what has been imported may have added some of its own
        self._script = ScriptModule(job.script_objects)
        self._module = weakref.ref(job.module)
        plan = unpickle_plan(assignment.plan)
        self._accelerator = plan.workers.accelerator
        self._worker = Worker(
            plan=plan,
            context=self._context,
            job=job,
            is_in_driver=False,
            brake=self._brake,
            forward=self._outbox.put,
        )
        return ()

    def _let_go(self) -> tuple[str, ...]:
        if self._worker is not None:
            self._worker.abandon()
        self._worker = None
        shared, self._shared = self._shared, None
        if self._script is not None:
            self._script.restore()
            self._script = None
        leftovers = self._process.restore(self._module, self._accelerator)
        return leftovers if shared is None else (*leftovers, *shared.release())

    def _carry_out(self, command: Command) -> None:
        assert self._worker is not None
        for report in self._worker.run(unpack(command, is_copying=True)):
            if isinstance(report, Weights):
                self._room.acquire()
            self._outbox.put(report)
