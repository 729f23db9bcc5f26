"""InlineGroup: the one worker in the driver's own process, without Ray. Driver."""

from collections.abc import Iterator

from raylit.checkpoint.held import HeldCheckpoint
from raylit.messages import Command, Report
from raylit.plan import Plan
from raylit.torch_settings import TorchSettings
from raylit.worker.brake import Brake
from raylit.worker.context import Job, WorkerContext
from raylit.worker.worker import Worker


class InlineGroup:
    is_in_driver = True

    def __init__(self, plan: Plan, job: Job) -> None:
        self.is_at_rest = True
        self._is_braking = False
        self._brake = Brake()
        self._settings = TorchSettings.current()
        self._worker = Worker(plan=plan, context=WorkerContext(), job=job, is_in_driver=True, brake=self._brake)

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        self.is_at_rest = False
        self._brake.reset()
        if self._is_braking:
            self.brake()
        for report in self._worker.run(command):
            yield 0, report
        self.is_at_rest = True

    def sees(self, place: str) -> bool:
        return True

    def holder(self, *, is_in_parts: bool) -> HeldCheckpoint:
        assert not is_in_parts, "one worker has nothing to share"
        return self._worker.held

    def brake(self) -> None:
        # In the thread of the loop itself, between two of its instructions: nobody needs to be held.
        self._is_braking = True
        self._brake.release(self._brake.num_done + 1)

    def unbrake(self) -> None:
        self._is_braking = False

    def release(self, *, is_kept: bool = True) -> None:
        self._worker.abandon()
        self._settings.apply()
