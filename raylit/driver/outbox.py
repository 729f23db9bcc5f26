"""Outbox: reports on their way from an actor's training thread to its event loop. Worker process."""

import asyncio
import contextlib
import threading

from raylit.messages import CommandDone, Failed, Mail, Ticked, Weights

_COALESCE_S = 0.1
"""Reports that nobody waits for travel together: each batch of them takes the interpreter away from the steps."""


class Outbox:
    """Wakes the loop once for all that gathers until it comes to fetch it, not once for each report."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._reports: list[Mail] = []
        self._has_mail = asyncio.Event()
        self._is_urgent = asyncio.Event()

    # In any thread

    def put(self, report: Mail) -> None:
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

    async def fetched(self) -> list[Mail]:
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
