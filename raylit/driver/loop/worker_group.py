"""The workers of a run as the driver's loop sees them: Ray actors, or this process."""

from collections.abc import Callable, Iterator
from typing import Protocol

from raylit.checkpoint.pending import PendingCheckpoint
from raylit.config.plan import Plan
from raylit.driver.loop.checkpoint_queue import CheckpointHolder
from raylit.protocol.messages import Command, Report
from raylit.protocol.process_settings import TorchSettings
from raylit.worker.job import Job, WorkerContext
from raylit.worker.loops.stop_barrier import StopBarrier
from raylit.worker.worker import Worker


class InlineGroup:
    is_in_driver = True

    def __init__(self, plan: Plan, job: Job) -> None:
        self.is_idle = True
        self._is_braking = False
        self._brake = StopBarrier()
        self._settings = TorchSettings.current()
        self._worker = Worker(plan=plan, context=WorkerContext(), job=job, is_in_driver=True, brake=self._brake)

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        self.is_idle = False
        self._brake.reset()
        if self._is_braking:
            self.arm_stop()
        for report in self._worker.run(command):
            yield 0, report
        self.is_idle = True

    def can_read(self, place: str) -> bool:
        return True

    def holder(self, *, is_in_parts: bool) -> PendingCheckpoint:
        assert not is_in_parts, "one worker has nothing to share"
        return self._worker.held

    def arm_stop(self) -> None:
        # In the thread of the loop itself, between two of its instructions: nobody needs to be held.
        self._is_braking = True
        self._brake.release(self._brake.num_done + 1)

    def disarm_stop(self) -> None:
        self._is_braking = False

    def release(self, *, is_kept: bool = True) -> None:
        self._worker.abandon()
        self._settings.apply()


class WorkerGroup(Protocol):
    """Every worker carries out the same commands, one after the other."""

    is_in_driver: bool
    """The workers' objects are the driver's own."""

    @property
    def is_idle(self) -> bool:
        """Every worker is through with its last command and can take another."""
        ...

    def can_read(self, place: str) -> bool:
        """Every worker finds a file at the path or URL that the driver has found there."""
        ...

    def holder(self, *, is_in_parts: bool) -> CheckpointHolder:
        """Of what the last Save command has left to be written, which may be a part on each worker."""
        ...

    def arm_stop(self) -> None:
        """Have the command under way, and any later one, end its loop after the step or batch that has begun.

        Returns at once; called in a signal handler.
        """
        ...

    def disarm_stop(self) -> None:
        """Let later commands run to their own ends again."""
        ...

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        """Have every worker carry the command out; yields (rank, report) as they come, until all are through.

        A hook's exception is raised here; a lost worker is a WorkerDied. Either leaves the group unusable.
        """
        ...

    def release(self, *, is_kept: bool = True) -> None:
        """Let go of the workers, however the run has ended. May be called more than once.

        `is_kept`: good workers may wait for another run.
        """
        ...


def build_group(plan: Plan, job: Job, *, on_connected: Callable[[], None]) -> WorkerGroup:
    """The workers that the plan asks for, ready for commands. `on_connected` is called once Ray is there."""
    if plan.workers.num_workers == 0:
        return InlineGroup(plan, job)
    # Ray takes half a second to import, which a run without it need not pay.
    from raylit.driver.ray.worker_pool import PooledGroup

    return PooledGroup(plan, job, on_connected=on_connected)
