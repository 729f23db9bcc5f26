"""InlineGroup: the one worker in the driver's own process, without Ray. Driver."""

from collections.abc import Iterator

from raylit.messages import Command, Report
from raylit.plan import Plan
from raylit.worker.context import Job, WorkerContext
from raylit.worker.worker import Worker


class InlineGroup:
    is_in_driver = True

    def __init__(self, plan: Plan, job: Job) -> None:
        self._worker = Worker(plan=plan, context=WorkerContext(), job=job, is_in_driver=True)

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        for report in self._worker.run(command):
            yield 0, report

    def release(self) -> None: ...
