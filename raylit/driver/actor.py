"""WorkerActor: the Ray actor around a Worker; control calls are answered while a step runs. Worker process."""

import asyncio
import os
import queue
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import cloudpickle
import ray
import torch.distributed as dist

from raylit.accelerators import build_accelerator
from raylit.driver.packing import packed, unpacked
from raylit.driver.rendezvous import Meeting
from raylit.messages import Command, CommandDone, Failed, Report, Ticked
from raylit.plan import Plan
from raylit.worker.context import WorkerContext
from raylit.worker.worker import Worker

_COALESCE_S = 0.05
"""Reports that nobody waits for travel together: more messages a second than this would slow the steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """Where an actor has come to run."""

    node_id: str
    ip: str
    host: str
    gpu_ids: tuple[str, ...]
    pid: int
    num_cores: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What makes an actor a rank of a run."""

    plan: Plan
    context: WorkerContext
    job: bytes
    """cloudpickle of the Job."""
    meeting: Meeting | None
    own_ip: str


class WorkerActor:
    """Runs commands in one thread of its own; what the thread reports is streamed to the driver."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outbox: list[Report] = []
        self._has_mail = asyncio.Event()
        self._is_urgent = asyncio.Event()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._context = WorkerContext()
        self._thread = threading.Thread(target=self._work, name="raylit-worker", daemon=True)
        self._thread.start()

    async def whereabouts(self) -> Whereabouts:
        runtime = ray.get_runtime_context()
        return Whereabouts(
            node_id=runtime.get_node_id(),
            ip=ray.util.get_node_ip_address(),
            host=socket.gethostname(),
            gpu_ids=tuple(str(gpu) for gpu in runtime.get_accelerator_ids().get("GPU", [])),
            pid=os.getpid(),
            num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        )

    async def assign(self, assignment: Assignment) -> None:
        """Become a rank; done when a CommandDone comes through `reports`."""
        self._context = assignment.context
        self._inbox.put(lambda: self._take_up(assignment))

    async def submit(self, command: Command) -> None:
        """Carry a command out; done when a CommandDone comes through `reports`."""
        self._inbox.put(lambda: self._carry_out(command))

    async def reports(self) -> AsyncIterator[list[Report]]:
        """Everything that the thread reports, from the first to the last, in batches. One reader."""
        while True:
            await self._has_mail.wait()
            if not self._is_urgent.is_set():
                try:
                    await asyncio.wait_for(self._is_urgent.wait(), timeout=_COALESCE_S)
                except asyncio.TimeoutError:
                    pass
            reports, self._outbox = self._outbox, []
            self._has_mail.clear()
            self._is_urgent.clear()
            yield [packed(report) for report in reports]

    async def stop(self) -> None:
        """End the thread and the group. Returns once that is done, so that the process can be ended."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    # In the thread

    def _work(self) -> None:
        while (task := self._inbox.get()) is not None:
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - a user's SystemExit must reach the driver too
                self._report(_failure(error, self._context))
            else:
                self._report(CommandDone(rank=self._context.rank))
        self._worker = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _take_up(self, assignment: Assignment) -> None:
        plan, context = assignment.plan, assignment.context
        os.environ["LOCAL_RANK"], os.environ["RANK"] = str(context.local_rank), str(context.rank)
        os.environ["WORLD_SIZE"] = str(context.world_size)
        accelerator = build_accelerator(plan.workers.accelerator)
        accelerator.set_up(num_threads=context.num_threads)
        job = cloudpickle.loads(assignment.job)
        if assignment.meeting is not None:
            assignment.meeting.join(
                rank=context.rank,
                world_size=context.world_size,
                backend=accelerator.collective_backend,
                own_ip=assignment.own_ip,
            )
        self._worker = Worker(plan=plan, context=context, job=job, is_in_driver=False)

    def _carry_out(self, command: Command) -> None:
        assert self._worker is not None
        for report in self._worker.run(unpacked(command)):
            self._report(report)

    def _report(self, report: Report) -> None:
        self._loop.call_soon_threadsafe(self._deliver, report)

    # In the event loop

    def _deliver(self, report: Report) -> None:
        if isinstance(report, Ticked) and self._outbox and isinstance(self._outbox[-1], Ticked):
            self._outbox[-1] = report
        else:
            self._outbox.append(report)
        self._has_mail.set()
        if isinstance(report, (CommandDone, Failed)):
            self._is_urgent.set()


def _failure(error: BaseException, context: WorkerContext) -> Failed:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    pickled: bytes | None
    try:
        pickled = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:  # noqa: BLE001 - whatever a user's exception does when pickled
        pickled = None
    return Failed(rank=context.rank, host=context.host, traceback=text, error=pickled)
