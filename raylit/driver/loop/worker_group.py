"""Groups of workers as the driver's loop sees them: Ray actors, or this process. Driver."""

from collections.abc import Callable, Iterator
from typing import Protocol

from raylit.checkpoint.pending import PendingCheckpoint
from raylit.config.plan import Plan
from raylit.driver.loop.checkpoint_queue import CheckpointWriter
from raylit.protocol.messages import Command, Report
from raylit.protocol.process_settings import TorchSettings
from raylit.worker.job import Job, WorkerContext
from raylit.worker.loops.stop_barrier import StopBarrier
from raylit.worker.worker import Worker


class InlineGroup:
    is_in_driver = True

    def __init__(self, plan: Plan, job: Job) -> None:
        self.is_idle = True
        self._is_stop_armed = False
        self._stop_barrier = StopBarrier()
        self._settings = TorchSettings.current()
        self._worker = Worker(
            plan=plan, context=WorkerContext(), job=job, is_in_driver=True, stop_barrier=self._stop_barrier
        )

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        self.is_idle = False
        self._stop_barrier.reset()
        if self._is_stop_armed:
            self.arm_stop()
        for report in self._worker.run(command):
            yield 0, report
        self.is_idle = True

    def can_read(self, path: str) -> bool:
        return True

    def checkpoint_writer(self, *, is_in_parts: bool) -> PendingCheckpoint:
        assert not is_in_parts, "one worker has nothing to share"
        return self._worker.pending_checkpoint

    def arm_stop(self) -> None:
        # This runs in the loop's own thread, between two of its instructions: no other worker has to wait.
        self._is_stop_armed = True
        self._stop_barrier.release(self._stop_barrier.num_done + 1)

    def disarm_stop(self) -> None:
        self._is_stop_armed = False

    def release(self, *, is_kept: bool = True) -> None:
        self._worker.abandon()
        self._settings.apply()


class WorkerGroup(Protocol):
    """Group of workers that all run the same commands, one after the other."""

    is_in_driver: bool
    """True if the workers' objects are the driver's own."""

    @property
    def is_idle(self) -> bool:
        """True if every worker has finished its last command and can run another."""
        ...

    def can_read(self, path: str) -> bool:
        """Return True if every worker can read the file at a path or URL at which the driver finds one."""
        ...

    def checkpoint_writer(self, *, is_in_parts: bool) -> CheckpointWriter:
        """Return the writer of the checkpoint that the last Save command left pending.

        With `is_in_parts` it has a shard on each worker.
        """
        ...

    def arm_stop(self) -> None:
        """Make the command under way, and any later one, end its loop after the current step or batch.

        Returns at once; it is called in a signal handler.
        """
        ...

    def disarm_stop(self) -> None:
        """Let later commands run to their own ends again."""
        ...

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        """Run the command on every worker; yield (rank, report) as they arrive, until all have finished.

        Raises a hook's exception, or WorkerDied for a lost worker. Either leaves the group unusable.
        """
        ...

    def release(self, *, is_kept: bool = True) -> None:
        """Release the workers, however the run has ended; may be called more than once.

        With `is_kept`, healthy workers may stay in the pool for another run.
        """
        ...


def build_group(plan: Plan, job: Job, *, on_connected: Callable[[], None]) -> WorkerGroup:
    """Create the workers that the plan asks for, ready for commands; call `on_connected` once Ray is connected."""
    if plan.workers.num_workers == 0:
        return InlineGroup(plan, job)
    # Importing Ray takes half a second, which a run without it does not spend.
    from raylit.driver.ray.worker_pool import acquire_group

    return acquire_group(plan, job, on_connected=on_connected)
