"""WorkerGroup: the workers as the coordinator sees them. Driver."""

from collections.abc import Callable, Iterator
from typing import Protocol

from raylit.driver.inline import InlineGroup
from raylit.driver.saves import Holder
from raylit.messages import Command, Report
from raylit.plan import Plan
from raylit.worker.context import Job


class WorkerGroup(Protocol):
    """Every worker carries out the same commands, one after the other."""

    is_in_driver: bool
    """The workers' objects are the driver's own."""

    @property
    def is_at_rest(self) -> bool:
        """Every worker is through with its last command and can take another."""
        ...

    def sees(self, place: str) -> bool:
        """Every worker finds a file at the path or URL that the driver has found there."""
        ...

    def holder(self, *, is_in_parts: bool) -> Holder:
        """Of what the last Save command has left to be written, which may be a part on each worker."""
        ...

    def brake(self) -> None:
        """Have the command under way, and any later one, end its loop after the step or batch that has begun.

        Returns at once; called in a signal handler.
        """
        ...

    def unbrake(self) -> None:
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
    from raylit.driver.warm import WarmGroup

    return WarmGroup(plan, job, on_connected=on_connected)
