"""Pool of idle worker groups that the next run with the same request takes over. Driver."""

import atexit
import contextlib
import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable

import ray

from raylit.compat.ray_core import list_pending_requests
from raylit.config import Plan, Workers
from raylit.driver.ray import local_cluster
from raylit.driver.ray.actor_group import ActorGroup
from raylit.driver.ray.serialization import pickle_job
from raylit.errors import WorkerDied
from raylit.protocol.process_settings import variables_for_new_processes
from raylit.worker.job import Job

_MAX_IDLE_WORKERS = 8
"""Above this number of workers, the group that has been idle longest is ended; the newest always stays."""
_POLL_S = 1.0
"""Interval between checks of what the cluster waits for."""
_STOP_TIMEOUT_S = 5.0
"""Time for a check of the cluster that is under way."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _IdleGroup:
    """Idle group in the pool."""

    group: ActorGroup
    ends_at_s: float

    def is_expired(self) -> bool:
        return self.ends_at_s <= time.monotonic() or not self.group.is_of_this_session


class _Pool:
    """Pool of this process; a thread ends idle groups at their time limit, or when others need their resources."""

    def __init__(self) -> None:
        self._idle: list[_IdleGroup] = []
        """The longest idle one comes first."""
        self._lock = threading.Lock()
        self._has_changed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._is_ending = False
        self._variable_names: set[str] = set()
        """Environment variables of this process at all its runs: workers may still have removed ones."""

    def read_earlier_environment(self) -> dict[str, str]:
        """Return the variables that workers started with or had in an earlier run, as far as this process knows."""
        before = {**dict.fromkeys(self._variable_names, ""), **local_cluster.environment_of_workers()}
        self._variable_names |= os.environ.keys()
        return before

    def acquire(self, workers: Workers) -> tuple[ActorGroup, bool]:
        """Return an idle group of these workers, or a new one, and whether it is new.

        Idle groups are ended if a new one needs their resources.
        """
        local_cluster.connect()
        variables = variables_for_new_processes(
            local_cluster.environment_of_workers(), fixed=local_cluster.fixed_variables()
        )
        self._end_groups(self._remove_idle(_IdleGroup.is_expired))
        with self._lock:
            for idle in self._idle:
                group = idle.group
                if group.workers == workers and group.variables == variables and group.is_reusable():
                    self._idle.remove(idle)
                    return group, False
        if not local_cluster.is_embedded():
            # On a shared cluster idle workers may hold the resources that the new ones need.
            self.clear()
        return ActorGroup(workers, variables=variables, free_resources=self._end_oldest), True

    def return_group(self, group: ActorGroup, is_kept: bool) -> None:
        """Keep a group whose workers are reusable, unless `is_kept` is False; end any other."""
        keep_s = group.workers.keep_s if is_kept else 0.0
        if keep_s is None:
            # An actor whose last handle has gone lives on as long as its workers do.
            keep_s = 300.0 if local_cluster.is_embedded() and not local_cluster.is_in_worker() else 30.0
        if keep_s > 0 and group.is_usable and group.is_of_this_session:
            try:
                group.end_run()
            except Exception as error:
                # The run itself has ended well; only its workers cannot be used again.
                warnings.warn(f"the workers are replaced, as the run's end failed in them: {error}", stacklevel=2)
        else:
            group.is_usable = False
        if not group.is_usable:
            group.end()
            return
        with self._lock:
            self._idle.append(_IdleGroup(group=group, ends_at_s=time.monotonic() + keep_s))
            surplus = []
            while len(self._idle) > 1 and self._count_workers() > _MAX_IDLE_WORKERS:
                surplus.append(self._idle.pop(0))
            if self._watcher is None or not self._watcher.is_alive():
                self._is_ending = False
                self._watcher = threading.Thread(
                    target=self._watch_idle_groups, name="raylit-idle-workers", daemon=True
                )
                self._watcher.start()
                # Registered later than what ends Ray at exit, so that it runs first.
                atexit.unregister(self.stop_watching)
                atexit.register(self.stop_watching)
        self._has_changed.set()
        self._end_groups(surplus)

    def clear(self) -> None:
        self._end_groups(self._remove_idle(lambda _: True))

    def stop_watching(self) -> None:
        """End the thread before Ray is shut down: a call into Ray after that ends the whole process."""
        with self._lock:
            watcher, self._is_ending = self._watcher, True
        self._has_changed.set()
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(timeout=_STOP_TIMEOUT_S)

    def _watch_idle_groups(self) -> None:
        """End expired groups, and others whose resources are requested, until no group is left."""
        was_requested = False
        while True:
            with self._lock:
                if not self._idle or self._is_ending:
                    self._watcher = None
                    return
                remaining_s = min(idle.ends_at_s for idle in self._idle) - time.monotonic()
            self._has_changed.wait(timeout=max(0.0, min(remaining_s, _POLL_S)))
            is_new = self._has_changed.is_set()
            self._has_changed.clear()
            if self._is_ending:
                continue
            if not ray.is_initialized():
                # A ray.shutdown of the user's may be under way, in which Ray ends the process (exit code 1) if another
                # thread drops references to its objects. The next `acquire` ends the groups.
                with self._lock:
                    self._watcher = None
                return
            # The user may end or change the Ray session at any moment; an error here means that the workers are gone.
            with contextlib.suppress(Exception):
                self._end_groups(self._remove_idle(_IdleGroup.is_expired))
                if not is_new and remaining_s > _POLL_S:
                    # Two checks in a row, as every request is pending for a moment.
                    is_requested = self._are_resources_requested()
                    was_requested = is_requested and not (was_requested and self._end_oldest())

    def _are_resources_requested(self) -> bool:
        """Return True if any request in the cluster waits for a kind of resource that an idle group holds."""
        with self._lock:
            held_names = {name for idle in self._idle for name in idle.group.resources}
        return bool(held_names) and any(held_names & request.keys() for request in list_pending_requests())

    def _count_workers(self) -> int:
        return sum(idle.group.workers.num_workers for idle in self._idle)

    def _end_oldest(self) -> bool:
        """End the group that has been idle longest; return False if there is none."""
        with self._lock:
            oldest, self._idle = self._idle[:1], self._idle[1:]
        self._end_groups(oldest)
        return bool(oldest)

    def _remove_idle(self, matches: Callable[[_IdleGroup], bool]) -> list[_IdleGroup]:
        """Remove matching groups from the pool and return them."""
        with self._lock:
            removed = [idle for idle in self._idle if matches(idle)]
            self._idle = [idle for idle in self._idle if idle not in removed]
        return removed

    def _end_groups(self, groups: list[_IdleGroup]) -> None:
        for idle in groups:
            idle.group.end()


_pool = _Pool()


def acquire_group(plan: Plan, job: Job, *, on_connected: Callable[[], None]) -> ActorGroup:
    """Return a group with the run assigned to it; its `release` returns it to the pool.

    Idle workers that have died, or whose code has changed, are replaced. `on_connected` is called once Ray is
    connected.
    """
    serialized_job = pickle_job(job)
    local_cluster.connect()
    on_connected()
    while True:
        group, is_new = _pool.acquire(plan.workers)
        try:
            if not is_new:
                group.check_awake()
            environment = _pool.read_earlier_environment()
            group.assign(
                plan,
                serialized_job,
                log_dir=job.log_dir,
                environment_before=environment,
                on_release=_pool.return_group,
            )
        except WorkerDied:
            _pool.return_group(group, is_kept=False)
            if is_new:
                raise
        except BaseException:
            _pool.return_group(group, is_kept=False)
            raise
        else:
            if group.is_usable or is_new:
                return group
            group.release()


def clear() -> None:
    """End the idle workers."""
    _pool.clear()


def shutdown() -> None:
    """End the idle workers and the embedded node; a cluster of the user's is left alone."""
    _pool.stop_watching()
    _pool.clear()
    local_cluster.shutdown()
