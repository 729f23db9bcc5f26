"""WorkerGroup: the workers as the coordinator sees them. Driver."""

from collections.abc import Iterator
from typing import Protocol

from raylit.driver.inline import InlineGroup
from raylit.messages import Command, Report
from raylit.plan import Plan
from raylit.worker.context import Job


class WorkerGroup(Protocol):
    """Every worker carries out the same commands, one after the other."""

    is_in_driver: bool
    """The workers' objects are the driver's own."""

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        """Have every worker carry the command out; yields (rank, report) as they come, until all are through.

        A hook's exception is raised here; a lost worker is a WorkerDied. Either leaves the group unusable.
        """
        ...

    def release(self) -> None:
        """Let go of the workers, however the run has ended. May be called more than once."""
        ...


def build_group(plan: Plan, job: Job) -> WorkerGroup:
    """The workers that the plan asks for, ready for commands."""
    if plan.workers.num_workers == 0:
        return InlineGroup(plan, job)
    # Ray takes half a second to import, which a run without it need not pay.
    from raylit.driver.warm import WarmGroup

    return WarmGroup(plan, job)
