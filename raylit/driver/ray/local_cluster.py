"""The connection to a Ray cluster, or a local node that is started and ended with this process."""

import atexit
import contextlib
import fcntl
import glob
import logging
import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.runtime_context import get_runtime_context

from raylit.compat.ray_core import listen_on_loopback, reload_settings, shut_down_at_once
from raylit.errors import ConfigError, ResourcesError
from raylit.protocol.process_settings import ProcessSettings, initial_environment

MARK = "RAYLIT_EMBEDDED_NODE"
"""In the environment of the embedded node's processes, with the node's own directory as its value."""

PREFIX = "rl-"
"""How the name of a node's directory begins."""
SESSIONS = "raylit.sessions"
"""In the node's directory: the sessions of the node's processes, a number in each line."""

_LOCK = "raylit.lock"
"""In the node's directory, held by the janitor for as long as it lives."""
_ABANDONED_S = 60.0
"""The least age of a directory that is nobody's: a young one may be about to be locked."""
_BY_THEMSELVES_S = 3.0
"""For what is not Ray's: multiprocessing's resource tracker still has the blocks of the dead to remove."""
_ALL_ENDED_S = 10.0
_PERIOD_S = 0.05


class NodeReaper:
    """The driver's end of it. Linux only: elsewhere there is no /proc to find the processes by."""

    def __init__(self, directory: str) -> None:
        """`directory` is removed with all that is in it once no process of the node is left."""
        lock = os.open(os.path.join(directory, _LOCK), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), directory],
            stdin=subprocess.PIPE,
            pass_fds=[lock],
            # A Ctrl-C in the terminal, or a signal to the driver's group, is not for it.
            start_new_session=True,
            cwd="/",
        )
        os.close(lock)

    def finish(self) -> None:
        """Have it done now; returns when it is."""
        assert self._process.stdin is not None
        # A word, not the pipe's end: a fork of the driver may have the pipe as well.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_BY_THEMSELVES_S + _ALL_ENDED_S)


def _main(driver: int, directory: str) -> None:
    session = os.getsid(driver) if os.getppid() == driver else 0
    _remove_abandoned(os.path.dirname(directory))
    _wait_for_end_of(driver)
    started_s = time.monotonic()
    while (waited_s := time.monotonic() - started_s) < _ALL_ENDED_S:
        found = list(_processes(directory, {session, *_recorded_sessions(directory)}))
        for pid, is_ray in found:
            if is_ray or waited_s > _BY_THEMSELVES_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if not found:
            break
        time.sleep(_PERIOD_S)
    shutil.rmtree(directory, ignore_errors=True)


def _recorded_sessions(directory: str) -> list[int]:
    try:
        with open(os.path.join(directory, SESSIONS)) as lines:
            return [int(line) for line in lines]
    except OSError:  # the node has not come that far
        return []


def _remove_abandoned(parent: str) -> None:
    """Directories of nodes that were killed together with their janitors, as job managers and containers do it.

    The directory for temporary files is everybody's: only what is named as a node's directory is, and belongs to this
    user, is looked at.
    """
    for path in glob.glob(os.path.join(glob.escape(parent), f"{PREFIX}*", _LOCK)):
        with contextlib.suppress(OSError):
            if not _is_own(os.path.dirname(path), stat.S_IFDIR) or not _is_own(path, stat.S_IFREG):
                continue
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock.fileno()).st_mtime > _ABANDONED_S:
                    shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def _is_own(path: str, kind: int) -> bool:
    """This user's, and a directory or file itself, not a link to one."""
    found = os.lstat(path)
    return stat.S_IFMT(found.st_mode) == kind and found.st_uid == os.geteuid()


def _wait_for_end_of(driver: int) -> None:
    """Until it asks, through the standard input, or is gone, however that came about."""
    try:
        pidfd = os.pidfd_open(driver)
    except OSError:  # not allowed here, or gone already
        pidfd = None
    watched = [sys.stdin.fileno()] if pidfd is None else [sys.stdin.fileno(), pidfd]
    while os.getppid() == driver:
        if select.select(watched, [], [], 1.0 if pidfd is None else None)[0]:
            return


def _processes(directory: str, sessions: set[int]) -> Iterator[tuple[int, bool]]:
    """Living processes of the node, and whether they are Ray's. Daemons that somebody has started there, with sessions
    other than the node's, are left to themselves."""
    mark = f"{MARK}={directory}\0".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environ, open(f"/proc/{name}/cmdline", "rb") as cmdline:
                is_marked, command = mark in environ.read() + b"\0", cmdline.read()
            is_ray = command.startswith(b"ray::") or directory.encode() in command
            # Ray's agents write their titles over their environment, but have their logs open.
            is_of_node = is_marked or (is_ray and _has_open(name, directory))
            if is_of_node and command and (is_ray or os.getsid(int(name)) in sessions):
                yield int(name), is_ray
        except OSError:  # it has just ended, or is another user's
            continue


def _has_open(process: str, directory: str) -> bool:
    """A file below the directory."""
    place = f"/proc/{process}/fd"
    return any(os.readlink(f"{place}/{name}").startswith(directory + os.sep) for name in os.listdir(place))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])


class _EmbeddedNode:
    """The local Ray node that raylit has started in this process, if it has."""

    def __init__(self) -> None:
        self._pid = 0
        self._address = ""
        self._janitor: NodeReaper | None = None
        self._variables: dict[str, str | None] = {}
        self.environment: dict[str, str] = {}
        """What its processes begin with."""
        self._starting_thread: int | None = None
        """The thread that starts the node's processes now."""
        self._sessions_path = ""
        if sys.platform == "linux":
            os.register_at_fork(after_in_child=self._begin_session)

    def start(self) -> None:
        self.stop()  # of an earlier one, which a ray.shutdown of the user's has ended, some may be left
        parent = _parent_directory()
        # Ray's ports are open to the network. Its own start would write a token file, which makes a later `ray start`
        # demand tokens; a token in the environment protects this node as well and leaves nothing behind.
        # A user's choice is kept.
        if "RAY_AUTH_MODE" not in os.environ:
            self._set("RAY_AUTH_MODE", "token")
            self._set("RAY_AUTH_TOKEN", secrets.token_hex(32))
        for name, value in _DEFAULTS.items():
            if name not in os.environ:
                self._set(name, value)
        reload_settings()
        # Of its own, so that nothing in it can be somebody else's.
        directory = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        mark = os.environ.get(MARK)
        os.environ[MARK] = directory
        self._pid = os.getpid()
        self._sessions_path = os.path.join(directory, SESSIONS)
        try:
            if sys.platform == "linux":
                self._janitor = NodeReaper(directory)
            self._starting_thread = threading.get_ident()
            with listen_on_loopback():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                    # Ray opens its directory to all users (mode 0777). The one above it has mode 0700.
                    _temp_dir=os.path.join(directory, _RAY_DIRECTORY),
                )
        finally:
            self._starting_thread = None
            # The node's processes have it now; others that this process may start are not of the node.
            _restore(MARK, mark)
        self._address = _address()
        self.environment = dict(os.environ)
        # Registered later than Ray's own, so it comes first.
        atexit.register(self.stop)

    @property
    def is_connected(self) -> bool:
        """This process is connected to it."""
        return self._pid == os.getpid() and ray.is_initialized() and _address() == self._address

    def stop(self) -> None:
        """End it and all that is left of it."""
        if self._pid != os.getpid():  # a fork of the driver: the node is not its own
            return
        janitor, self._janitor = self._janitor, None
        if self.is_connected:
            if janitor is None:
                ray.shutdown()
            else:
                shut_down_at_once()
        self._pid = 0
        if janitor is not None:
            janitor.finish()
        for name, before in self._variables.items():
            _restore(name, before)
        self._variables.clear()
        reload_settings()
        atexit.unregister(self.stop)

    def _begin_session(self) -> None:
        """Called in every fork of this process: put the node's processes into sessions of their own.

        A signal to the driver's process group (`timeout`, a scheduler, a terminal's Ctrl-C or hang-up) would otherwise
        end Ray's head before the driver has saved. The thread that calls `ray.init` forks the node's processes.
        """
        if self._starting_thread == threading.get_ident():
            os.setsid()
            sessions = os.open(self._sessions_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            os.write(sessions, b"%d\n" % os.getpid())
            os.close(sessions)

    def _set(self, name: str, value: str) -> None:
        self._variables[name] = os.environ.get(name)
        os.environ[name] = value


_DEFAULTS = {
    # Ray lowers its workers' priority by 15, which starves them beside any other work.
    "RAY_worker_niceness": "0",
    # Without it, an actor that asks for no GPU sees all of them, and Ray warns about the default at every start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The interpreter draws a hash seed at its start, and a set of strings has the order of its hashes: a split made of
    # one would be another on each worker, and in a resumed run.
    "PYTHONHASHSEED": "0",
    # Ray's head keeps a record of every actor call, for `ray list tasks` and the timeline: 3.5 KB each, so that the
    # pings of a long run alone add up to 25 MB an hour.
    "RAY_task_events_report_interval_ms": "0",
}

_RAY_DIRECTORY = "r"
_MAX_PARENT_CHARS = 107 - len(
    f"/{PREFIX}01234567/{_RAY_DIRECTORY}/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
)

_node = _EmbeddedNode()


def connect() -> None:
    """Make sure that this process is a Ray driver."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        _start_node()


def _start_node() -> None:
    """The embedded one; once more where it did not come up, as on a busy machine. ResourcesError: nor then."""
    for is_last in (False, True):
        try:
            _node.start()
            return
        except Exception as error:
            _node.stop()  # which ends what there is of it
            if not _is_failed_start(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if is_last:
                raise ResourcesError(
                    f"Ray's node on this machine did not start, twice: {reason} Its processes get too little time, "
                    "memory or disk: end other work, have RAY_TMPDIR name a directory on another disk, or start Ray by "
                    "hand (ray start --head) and set RAY_ADDRESS=auto; num_workers=0 trains without Ray"
                ) from error
        sys.stderr.write(f"raylit: Ray's node on this machine did not start ({reason}): once more\n")
        sys.stderr.flush()


def _is_failed_start(error: Exception) -> bool:
    """Not a wrong setting. Ray raises a plain Exception when its raylet does not register within 30 s."""
    return type(error) is Exception or isinstance(error, (RuntimeError, ConnectionError, TimeoutError, RayError))


def is_embedded() -> bool:
    """The node is raylit's own: nobody else waits for its resources. Inside a placement group there, room is scarce."""
    if not ray.is_initialized() or ray.util.get_current_placement_group() is not None:
        return False
    if is_in_worker():
        return MARK in os.environ
    return _node.is_connected


def is_in_worker() -> bool:
    """This process runs a task or an actor of Ray's."""
    return ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def session() -> tuple[str, ...] | None:
    """Tells this connection to Ray from any other, also to the same cluster; None: there is none. What Ray has given
    out belongs to one of them: actors, placement groups, object references."""
    if not ray.is_initialized():
        return None
    # That of `ray` itself connects by itself, which in another thread would undo a ray.shutdown of the user's.
    context = get_runtime_context()
    return context.gcs_address, context.get_node_id(), context.get_job_id()


def environment_of_workers() -> dict[str, str]:
    """The variables that worker processes begin with, as far as this process knows."""
    return _node.environment if _node.is_connected else initial_environment()


def runtime_env() -> dict[str, Any]:
    """What the user has asked Ray for, for all processes of this job or for those of this task."""
    return dict(ray.get_runtime_context().runtime_env)


def settings_for_workers() -> ProcessSettings:
    """This process's. Where Ray gives the workers a directory of their own, they stay there."""
    settings = ProcessSettings.current()
    return replace(settings, directory=None) if "working_dir" in runtime_env() else settings


def fixed_variables() -> frozenset[str]:
    """Variables that workers have from Ray, whatever this process has."""
    names = set(runtime_env().get("env_vars") or ())
    # Ray sets it in tasks and actors, by the CPUs that each has asked for.
    return frozenset(names | {"OMP_NUM_THREADS"} if is_in_worker() else names)


def shutdown() -> None:
    """End the embedded node, if raylit has started one."""
    _node.stop()


def _address() -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def _parent_directory() -> str:
    """The directory below which the node gets one of its own: RAY_TMPDIR, else that for temporary files.

    The paths of the node's sockets may have 107 characters in all. ConfigError: RAY_TMPDIR is too long for that, or
    cannot be made.
    """
    given = os.environ.get("RAY_TMPDIR")
    if not given:
        return tempfile.gettempdir() if len(tempfile.gettempdir()) <= _MAX_PARENT_CHARS else "/tmp"
    given = os.path.abspath(given)
    if len(os.fsencode(given)) > _MAX_PARENT_CHARS:
        raise ConfigError(
            f"RAY_TMPDIR={given}: the path has {len(os.fsencode(given))} characters, of which {_MAX_PARENT_CHARS} are "
            "possible, as Ray's sockets lie below it and their paths may have 107 in all: use a shorter one"
        )
    try:
        os.makedirs(given, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"RAY_TMPDIR={given}: Ray's files cannot be put there: {error}") from error
    return given
