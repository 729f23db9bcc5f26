"""The Ray actor of one worker: a training thread, and the messages that it sends to the driver. Worker."""

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
from raylit.driver.ray.serialization import SerializedJob, unpickle_job, unpickle_plan
from raylit.driver.ray.worker_metrics import WorkerMetrics
from raylit.errors import CheckpointError
from raylit.protocol.messages import (
    ActorMessage,
    Command,
    CommandDone,
    Failed,
    Measured,
    Part,
    Ticked,
    Weights,
    copy_tensors,
    unpack,
)
from raylit.protocol.process_settings import ProcessSettings, take_over_variables
from raylit.worker.data.script_objects import ScriptModule
from raylit.worker.data.shared_memory import SharedMemory
from raylit.worker.job import StopBarrier, WorkerContext
from raylit.worker.process.process_reset import ProcessState
from raylit.worker.process.stdout_capture import StdoutCapture
from raylit.worker.worker import Worker

_COALESCE_S = 0.1
"""Reports that no code waits for are sent together: sending each batch of them interrupts the training steps."""


class Outbox:
    """Messages to the driver; wakes the event loop once for all messages until they are fetched, not once for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._reports: list[ActorMessage] = []
        self._has_messages = asyncio.Event()
        self._is_urgent = asyncio.Event()

    # Callable from any thread

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
            self._call(self._has_messages)

    def wake_reader(self) -> None:
        """Wake the reader, as there is something to send other than reports."""
        self._call(self._has_messages)

    # Only in the event loop

    async def fetch(self) -> list[ActorMessage]:
        """Return the messages that gathered shortly after the first one, or at once if an urgent one has arrived."""
        await self._has_messages.wait()
        if not self._is_urgent.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_urgent.wait(), timeout=_COALESCE_S)
        self._has_messages.clear()
        self._is_urgent.clear()
        with self._lock:
            reports, self._reports = self._reports, []
        return reports

    def _call(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(event.set)


PendingKind = Literal["checkpoint", "part"]
"""Kind of pending file in a process: rank 0's "checkpoint" (all of it, or all but the shards), or a rank's "part"."""

_MAX_CHUNKS_IN_FLIGHT = 2
"""Chunks of the weights that may be in flight to the driver, which bounds their use of this host's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorInfo:
    """Node, process and hardware of a running actor."""

    node_id: str
    worker_id: str
    ip: str
    host: str
    gpu_ids: tuple[str, ...]
    pid: int
    num_cores: int
    log_path: str = ""
    """The file on its host that the process's stderr goes to; the output of C code is only there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Settings of a run for a worker: everything but the user's objects, and the state of the driver's process."""

    plan: bytes
    """Pickled, as the user's modules that it refers to are only found with the import path."""
    import_path: tuple[str, ...]
    """The driver's sys.path: the user's modules are found if the worker's host has them, too."""
    prefix: str
    """The sys.prefix of a driver whose modules workers find in the same order; otherwise empty."""
    files: dict[str, str]
    """Files of the driver's modules that are not installed, by name; empty if the workers may have other versions."""
    settings: ProcessSettings
    variables: dict[str, str | None]
    """Variables of the environment; None for those to remove."""


def _read_log_path() -> str:
    try:
        return os.readlink("/proc/self/fd/2")
    except OSError:
        return ""


class WorkerActor:
    """Ray actor that runs its requests in a thread of its own and streams the thread's reports to the driver.

    A CommandDone or Failed ends each request.
    """

    def __init__(self) -> None:
        self._outbox = Outbox(asyncio.get_running_loop())
        self._inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._accelerator: Accelerator = CPUAccelerator()
        """Accelerator of the run, once there has been one."""
        self._shared: SharedMemory | None = None
        self._script: ScriptModule | None = None
        self._stop_barrier = StopBarrier()
        self._num_commands = 0
        self._chunk_slots = threading.Semaphore(_MAX_CHUNKS_IN_FLIGHT)
        self._context = WorkerContext()
        self._metrics = WorkerMetrics()
        faulthandler.enable(all_threads=True)  # for libraries that end the process in a thread of their own
        self._output = StdoutCapture(on_lines=self._outbox.wake_reader)
        self._thread = threading.Thread(target=self._run_thread, name="raylit-worker", daemon=True)
        self._thread.start()

    async def get_info(self) -> ActorInfo:
        runtime = ray.get_runtime_context()
        return ActorInfo(
            node_id=runtime.get_node_id(),
            worker_id=runtime.get_worker_id(),
            ip=ray.util.get_node_ip_address(),
            host=socket.gethostname(),
            gpu_ids=tuple(str(gpu) for gpu in runtime.get_accelerator_ids().get("GPU", [])),
            pid=os.getpid(),
            log_path=_read_log_path(),
            num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        )

    async def join(self, context: WorkerContext, rendezvous: RendezvousInfo | None, backend: str) -> None:
        """Set this worker's rank and form the process group."""
        self._context = context
        self._inbox.put((self._join, rendezvous, backend))

    async def assign(self, assignment: Assignment, job: SerializedJob) -> None:
        """Prepare for a run.

        The CommandDone lists modules that have changed since this process imported them.
        """
        self._inbox.put((self._begin_run, assignment, job))

    async def end_run(self) -> None:
        """Release the run; the CommandDone lists what is left of it."""
        self._inbox.put((self._finish_run,))

    async def submit(self, command: Command, number: int) -> None:
        """Run a command, the `number`th of this group."""
        self._stop_barrier.reset()  # here, not in the thread: a pause that comes next must not be undone
        self._num_commands = number
        self._inbox.put((self._run_command, command))

    async def ping(self) -> None:
        """Answer the driver's heartbeat, also while a step runs."""
        self._metrics.refresh()

    async def pause_loop(self, number: int) -> int:
        """Pause the loop of the `number`th command at its next batch border; return that border."""
        while self._num_commands < number:  # a command passes through the object store, later than this call
            await asyncio.sleep(0.01)
        return self._stop_barrier.hold()

    async def continue_until(self, limit: int) -> None:
        """Let a paused loop run up to a batch border."""
        self._stop_barrier.release(limit)

    async def release_chunk_slot(self) -> None:
        """Let the next chunk of the weights be sent, as the driver has copied one to its own memory."""
        self._chunk_slots.release()

    async def can_read(self, path: str) -> bool:
        """Return True if this host can read a file or an object there."""
        try:
            return await asyncio.to_thread(files.exists, path)
        except CheckpointError:
            return False

    async def complete_checkpoint(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """Complete rank 0's pending checkpoint, outside the training thread. See `PendingCheckpoint.complete`."""
        parts = copy_tensors(unpack(others)), copy_tensors(unpack(callbacks))
        await asyncio.to_thread(self._pending("checkpoint").complete, *parts)

    async def add_parts(self, parts: list[Part], subdirectory: str) -> bytes:
        pending = self._pending("checkpoint")
        return await asyncio.to_thread(pending.add_parts, parts, subdirectory=subdirectory)

    async def fill_draft(self, kind: PendingKind, draft: str) -> bool:
        """Write the pending file into the driver's empty file. See `PendingFile.fill`."""
        return await asyncio.to_thread(self._pending(kind).fill, draft)

    async def write_pending(self, kind: PendingKind, url: str) -> bool:
        """Write the pending file to a URL. Always returns True."""
        await asyncio.to_thread(self._pending(kind).write, url)
        return True

    async def begin_pieces(self, kind: PendingKind) -> None:
        await asyncio.to_thread(self._pending(kind).begin_pieces)

    async def next_piece(self, kind: PendingKind) -> NDArray[np.uint8]:
        return await asyncio.to_thread(self._pending(kind).next_piece)

    async def describe_part(self) -> Part:
        """Return the description of this rank's pending part."""
        return await asyncio.to_thread(self._pending("part").describe)

    async def release_pending(self, kind: PendingKind) -> None:
        if self._worker is not None:  # otherwise it was released with its run
            self._pending(kind).release()

    @overload
    def _pending(self, kind: Literal["checkpoint"]) -> PendingCheckpoint: ...

    @overload
    def _pending(self, kind: Literal["part"]) -> PendingPart: ...

    def _pending(self, kind: PendingKind) -> PendingCheckpoint | PendingPart:
        assert self._worker is not None
        return self._worker.pending_checkpoint if kind == "checkpoint" else self._worker.pending_part

    async def reports(self) -> AsyncIterator[list[ActorMessage]]:
        """Yield all messages of the thread in batches, from the first to the last. There is one reader."""
        while True:
            reports = await self._outbox.fetch()
            if (output := self._output.take()) is not None:
                reports.insert(0, output)
            if reports:
                yield reports

    async def stop(self) -> None:
        """End the thread and the process group; returns once that is done, so that the process can be ended."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    # Runs in the thread

    def _run_thread(self) -> None:
        while (task := self._inbox.get()) is not None:
            # A tuple, not a closure, whose frame would appear above every step of the user's.
            function, *arguments = task
            try:
                leftovers = function(*arguments) or ()
            except BaseException as error:  # a user's SystemExit must reach the driver, too
                self._output.finish_lines()
                self._outbox.put(explain_failure(error, self._context))
            else:
                self._output.finish_lines()
                self._outbox.put(CommandDone(rank=self._context.rank, leftovers=leftovers))
        self._worker = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _join(self, rendezvous: RendezvousInfo | None, backend: str) -> None:
        context = self._context
        os.environ["LOCAL_RANK"], os.environ["RANK"] = str(context.local_rank), str(context.rank)
        os.environ["WORLD_SIZE"] = str(context.world_size)
        if rendezvous is not None:
            rendezvous.join(rank=context.rank, world_size=context.world_size, backend=backend, own_ip=context.host_ip)
        if context.num_threads is not None:
            torch.set_num_threads(context.num_threads)
        self._process = ProcessState()

    def _begin_run(self, assignment: Assignment, serialized_job: SerializedJob) -> tuple[str, ...]:
        if changed_modules := self._process.changed_modules(assignment.files):
            return changed_modules
        take_over_variables(assignment.variables)
        assignment.settings.apply()
        import_path = assignment.import_path
        if assignment.prefix == sys.prefix:
            sys.path[:] = [*import_path, *(path for path in sys.path if path not in import_path)]
        else:
            sys.path.extend(path for path in import_path if path not in sys.path)
        job, self._shared = unpickle_job(serialized_job)
        assignment.settings.apply_warning_filters()  # imported modules may have added filters of their own
        self._script = ScriptModule(job.script_objects)
        self._module = weakref.ref(job.module)
        plan = unpickle_plan(assignment.plan)
        self._accelerator = plan.workers.accelerator
        self._worker = Worker(
            plan=plan,
            context=self._context,
            job=job,
            is_in_driver=False,
            stop_barrier=self._stop_barrier,
            forward=self._outbox.put,
        )
        self._metrics.begin_run(
            rank=self._context.rank,
            node=self._context.host,
            log_dir=job.log_dir,
            accelerator=self._accelerator,
        )
        return ()

    def _finish_run(self) -> tuple[str, ...]:
        self._metrics.end_run()
        if self._worker is not None:
            self._worker.abandon()
        self._worker = None
        shared, self._shared = self._shared, None
        if self._script is not None:
            self._script.restore()
            self._script = None
        leftovers = self._process.restore(self._module, self._accelerator)
        return leftovers if shared is None else (*leftovers, *shared.release())

    def _run_command(self, command: Command) -> None:
        assert self._worker is not None
        with self._metrics.measure(command):
            for report in self._worker.run(copy_tensors(command)):
                if isinstance(report, Measured):
                    self._metrics.record_interval(report)
                    if self._context.rank > 0 or len(report.ranks) == 1:
                        continue  # the driver compares ranks, and needs the numbers once
                if isinstance(report, Weights):
                    self._chunk_slots.acquire()
                self._outbox.put(report)
