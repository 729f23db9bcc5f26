"""Warm workers: groups that outlive a run, for the next one that asks for the same. Driver."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator

import ray

from raylit.driver import cluster
from raylit.driver.actors import ActorGroup
from raylit.driver.handover import Handover, PartsHandover
from raylit.driver.shared import Parcel, pickle_job
from raylit.errors import WorkerDied
from raylit.messages import Command, Report
from raylit.plan import Plan, Workers
from raylit.process_settings import variables_for_new_processes
from raylit.worker.context import Job

_MAX_IDLE_WORKERS = 8
"""Beyond these, the group that has waited longest goes; the newest always stays."""


class WarmGroup:
    """A run's loan of an ActorGroup."""

    is_in_driver = False

    def __init__(self, plan: Plan, job: Job, *, on_connected: Callable[[], None]) -> None:
        parcel = pickle_job(job)
        cluster.connect()
        on_connected()
        self._keep_s = plan.workers.keep_s
        self._group: ActorGroup | None = None
        try:
            self._take_up(plan, parcel)
        except BaseException:
            self.release(is_kept=False)
            raise

    def _take_up(self, plan: Plan, parcel: Parcel) -> None:
        """Idle workers that have died meanwhile, or hold code that has changed, make way for others."""
        is_ready = False
        while not is_ready:
            self._group, is_new = _pool.borrow(plan.workers)
            try:
                self._group.assign(plan, parcel, environment_before=_pool.environment_before())
            except WorkerDied:
                if is_new:
                    raise
            is_ready = self._group.is_usable or is_new
            if not is_ready:
                self.release()

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        assert self._group is not None
        yield from self._group.run(command)

    @property
    def is_at_rest(self) -> bool:
        return self._group is not None and self._group.is_at_rest

    def sees(self, place: str) -> bool:
        assert self._group is not None
        return self._group.sees(place)

    def holder(self, *, is_in_parts: bool) -> Handover | PartsHandover:
        assert self._group is not None
        return self._group.holder(is_in_parts=is_in_parts)

    def brake(self) -> None:
        if self._group is not None:
            self._group.brake()

    def unbrake(self) -> None:
        if self._group is not None:
            self._group.unbrake()

    def release(self, *, is_kept: bool = True) -> None:
        group, self._group = self._group, None
        if group is not None:
            _pool.give_back(group, keep_s=self._keep_s if is_kept else 0.0)


class _Pool:
    """The idle groups of this process, each with a timer that ends it."""

    def __init__(self) -> None:
        self._idle: list[tuple[Workers, ActorGroup, threading.Timer]] = []
        self._lock = threading.Lock()
        self._variable_names: set[str] = set()
        """Of the environment of this process at all its runs: what has gone since then, a worker may still have."""

    def environment_before(self) -> dict[str, str]:
        """What the workers began with and what an earlier run had, as far as this process knows."""
        before = {**dict.fromkeys(self._variable_names, ""), **cluster.environment_of_workers()}
        self._variable_names |= os.environ.keys()
        return before

    def borrow(self, workers: Workers) -> tuple[ActorGroup, bool]:
        """An idle group of these workers, else a new one, and whether it is new; idle ones make room for it where they
        must."""
        cluster.connect()
        variables = variables_for_new_processes(cluster.environment_of_workers(), fixed=cluster.fixed_variables())
        with self._lock:
            for entry in self._idle:
                is_like_new = entry[0] == workers and entry[1].variables == variables
                if is_like_new and entry[1].is_within_reach():
                    self._idle.remove(entry)
                    entry[2].cancel()
                    return entry[1], False
        if not cluster.is_embedded():
            # On a shared cluster idle workers may hold the very resources that the new ones need.
            self.clear()
        return ActorGroup(workers, variables=variables), True

    def give_back(self, group: ActorGroup, *, keep_s: float | None) -> None:
        """Keep a group whose workers are as good as new; end any other."""
        if keep_s is None:
            # An actor whose last handle has gone lives on as long as its workers do.
            keep_s = 300.0 if cluster.is_embedded() and not cluster.is_in_worker() else 30.0
        if keep_s > 0 and group.is_usable and ray.is_initialized():
            try:
                group.dismiss()
            except Exception as error:
                # The run itself is over and has ended well; only its workers cannot be used again.
                warnings.warn(f"the workers are replaced, as the run's end failed in them: {error}", stacklevel=2)
        else:
            group.is_usable = False
        if not group.is_usable:
            group.end()
            return
        timer = threading.Timer(keep_s, self._expire, [group])
        timer.daemon = True
        with self._lock:
            self._idle.append((group.workers, group, timer))
            surplus = []
            while len(self._idle) > 1 and sum(entry[0].num_workers for entry in self._idle) > _MAX_IDLE_WORKERS:
                surplus.append(self._idle.pop(0))
        timer.start()
        self._end(surplus)

    def clear(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        self._end(idle)

    def _expire(self, group: ActorGroup) -> None:
        with self._lock:
            expired = [entry for entry in self._idle if entry[1] is group]
            self._idle = [entry for entry in self._idle if entry[1] is not group]
        self._end(expired)

    def _end(self, entries: list[tuple[Workers, ActorGroup, threading.Timer]]) -> None:
        for _, group, timer in entries:
            timer.cancel()
            if ray.is_initialized():
                group.end()


_pool = _Pool()


def clear() -> None:
    """End the idle workers."""
    _pool.clear()


def shutdown() -> None:
    """End the idle workers and the embedded node; a cluster of the user's is left alone."""
    _pool.clear()
    cluster.shutdown()
