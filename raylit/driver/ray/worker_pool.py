"""Warm workers: groups that outlive a run, for the next one that asks for the same. Driver."""

import atexit
import contextlib
import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from raylit.compat.ray_core import list_waiting_demands
from raylit.config.plan import Plan, Workers
from raylit.driver.ray import local_cluster
from raylit.driver.ray.actor_group import ActorGroup
from raylit.driver.ray.checkpoint_transfer import CheckpointTransfer, PartTransfer
from raylit.driver.ray.serialization import SerializedJob, pickle_job
from raylit.errors import WorkerDied
from raylit.protocol.messages import Command, Report
from raylit.protocol.process_settings import variables_for_new_processes
from raylit.worker.job import Job

_MAX_IDLE_WORKERS = 8
"""Beyond these, the group that has waited longest goes; the newest always stays."""
_LOOK_S = 1.0
"""Between two looks at what the cluster waits for."""


class PooledGroup:
    """A run's loan of an ActorGroup."""

    is_in_driver = False

    def __init__(self, plan: Plan, job: Job, *, on_connected: Callable[[], None]) -> None:
        parcel = pickle_job(job)
        local_cluster.connect()
        on_connected()
        self._keep_s = plan.workers.keep_s
        self._group: ActorGroup | None = None
        try:
            self._take_up(plan, parcel)
        except BaseException:
            self.release(is_kept=False)
            raise

    def _take_up(self, plan: Plan, parcel: SerializedJob) -> None:
        """Idle workers that have died or fallen silent meanwhile, or hold code that has changed, make way for
        others."""
        is_ready = False
        while not is_ready:
            self._group, is_new = _pool.borrow(plan.workers)
            try:
                if not is_new:
                    self._group.check_awake()
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
    def is_idle(self) -> bool:
        return self._group is not None and self._group.is_idle

    def can_read(self, place: str) -> bool:
        assert self._group is not None
        return self._group.can_read(place)

    def checkpoint_writer(self, *, is_in_parts: bool) -> CheckpointTransfer | PartTransfer:
        assert self._group is not None
        return self._group.checkpoint_writer(is_in_parts=is_in_parts)

    def arm_stop(self) -> None:
        if self._group is not None:
            self._group.arm_stop()

    def disarm_stop(self) -> None:
        if self._group is not None:
            self._group.disarm_stop()

    def release(self, *, is_kept: bool = True) -> None:
        group, self._group = self._group, None
        if group is not None:
            _pool.give_back(group, keep_s=self._keep_s if is_kept else 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Idle:
    """A group that waits for its next run."""

    group: ActorGroup
    ends_at_s: float

    def is_over(self) -> bool:
        return self.ends_at_s <= time.monotonic() or not self.group.is_of_this_session


_STOP_WATCHING_S = 5.0
"""For a look at the cluster that is under way."""


class _Pool:
    """The idle groups of this process. A thread ends them when their time is over, or somebody wants their room."""

    def __init__(self) -> None:
        self._idle: list[_Idle] = []
        """The one that has waited longest first."""
        self._lock = threading.Lock()
        self._has_changed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._is_ending = False
        self._variable_names: set[str] = set()
        """Of the environment of this process at all its runs: what has gone since then, a worker may still have."""

    def environment_before(self) -> dict[str, str]:
        """What the workers began with and what an earlier run had, as far as this process knows."""
        before = {**dict.fromkeys(self._variable_names, ""), **local_cluster.environment_of_workers()}
        self._variable_names |= os.environ.keys()
        return before

    def borrow(self, workers: Workers) -> tuple[ActorGroup, bool]:
        """An idle group of these workers, else a new one, and whether it is new; idle ones make room for it where they
        must."""
        local_cluster.connect()
        variables = variables_for_new_processes(
            local_cluster.environment_of_workers(), fixed=local_cluster.fixed_variables()
        )
        self._end(self._taken(_Idle.is_over))
        with self._lock:
            for idle in self._idle:
                group = idle.group
                if group.workers == workers and group.variables == variables and group.is_reusable():
                    self._idle.remove(idle)
                    return group, False
        if not local_cluster.is_embedded():
            # On a shared cluster idle workers may hold the very resources that the new ones need.
            self.clear()
        return ActorGroup(workers, variables=variables, make_room=self._end_oldest), True

    def give_back(self, group: ActorGroup, *, keep_s: float | None) -> None:
        """Keep a group whose workers are as good as new; end any other."""
        if keep_s is None:
            # An actor whose last handle has gone lives on as long as its workers do.
            keep_s = 300.0 if local_cluster.is_embedded() and not local_cluster.is_in_worker() else 30.0
        if keep_s > 0 and group.is_usable and group.is_of_this_session:
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
        with self._lock:
            self._idle.append(_Idle(group=group, ends_at_s=time.monotonic() + keep_s))
            surplus = []
            while len(self._idle) > 1 and self._num_workers() > _MAX_IDLE_WORKERS:
                surplus.append(self._idle.pop(0))
            if self._watcher is None or not self._watcher.is_alive():
                self._is_ending = False
                self._watcher = threading.Thread(target=self._watch, name="raylit-idle-workers", daemon=True)
                self._watcher.start()
                # Registered later than what ends Ray at exit, so it comes first.
                atexit.unregister(self.stop_watching)
                atexit.register(self.stop_watching)
        self._has_changed.set()
        self._end(surplus)

    def clear(self) -> None:
        self._end(self._taken(lambda _: True))

    def stop_watching(self) -> None:
        """End the thread before Ray is shut down: a call into Ray after that ends the whole process."""
        with self._lock:
            watcher, self._is_ending = self._watcher, True
        self._has_changed.set()
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(timeout=_STOP_WATCHING_S)

    def _watch(self) -> None:
        """Until no group is left."""
        was_wanted = False
        while True:
            with self._lock:
                if not self._idle or self._is_ending:
                    self._watcher = None
                    return
                left_s = min(idle.ends_at_s for idle in self._idle) - time.monotonic()
            self._has_changed.wait(timeout=max(0.0, min(left_s, _LOOK_S)))
            is_new = self._has_changed.is_set()
            self._has_changed.clear()
            if self._is_ending:
                continue
            # The user may end or change the Ray session at any moment: whatever that breaks here has ended the workers.
            with contextlib.suppress(Exception):
                self._end(self._taken(_Idle.is_over))
                if not is_new and left_s > _LOOK_S:
                    # Twice, as every demand waits for a moment.
                    is_wanted = self._is_room_wanted()
                    was_wanted = is_wanted and not (was_wanted and self._end_oldest())

    def _is_room_wanted(self) -> bool:
        """Something waits, of whomever, for resources of a kind that an idle group holds."""
        with self._lock:
            held = {name for idle in self._idle for name in idle.group.resources}
        return bool(held) and any(held & demand.keys() for demand in list_waiting_demands())

    def _num_workers(self) -> int:
        return sum(idle.group.workers.num_workers for idle in self._idle)

    def _end_oldest(self) -> bool:
        """Have the group that has waited longest make room. False: there is none."""
        with self._lock:
            oldest, self._idle = self._idle[:1], self._idle[1:]
        self._end(oldest)
        return bool(oldest)

    def _taken(self, is_meant: Callable[[_Idle], bool]) -> list[_Idle]:
        """Out of the pool."""
        with self._lock:
            taken = [idle for idle in self._idle if is_meant(idle)]
            self._idle = [idle for idle in self._idle if idle not in taken]
        return taken

    def _end(self, taken: list[_Idle]) -> None:
        for idle in taken:
            idle.group.end()


_pool = _Pool()


def clear() -> None:
    """End the idle workers."""
    _pool.clear()


def shutdown() -> None:
    """End the idle workers and the embedded node; a cluster of the user's is left alone."""
    _pool.stop_watching()
    _pool.clear()
    local_cluster.shutdown()
