"""Connection to a Ray cluster, or to a local node that is started and ended with this process. Driver."""

import atexit
import logging
import os
import platform
import secrets
import socket
import sys
import tempfile
import threading
import time
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.runtime_context import get_runtime_context

from raylit.compat.ray_core import (
    find_version_mismatch,
    listen_on_loopback,
    reload_settings,
    resolve_address,
    shut_down_at_once,
)
from raylit.driver.ray.node_reaper import MARK, PREFIX, SESSIONS, NodeReaper
from raylit.errors import ConfigError, ResourcesError
from raylit.protocol.process_settings import ProcessSettings, initial_environment

_ANSWER_S = 5.0
"""Time for the head of the cluster at RAY_ADDRESS to answer."""
_RETRY_S = 0.5
_ADDRESS_ADVICE = (
    "Start the cluster (ray start --head), let RAY_ADDRESS be HOST:PORT of its head (port 6379, unless it was given "
    "another one) or auto on a host of the cluster, open that port between this host and the head, or unset "
    "RAY_ADDRESS to train on this machine alone"
)


def connect() -> None:
    """Make sure that this process is a Ray driver.

    Raises:
        ConfigError: Nothing answers at RAY_ADDRESS, or the cluster there has another version of Ray or Python.
        ResourcesError: Without RAY_ADDRESS: the node on this machine did not start.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        # Ray itself would try for over a minute where nothing answers, and then end the process.
        _check_cluster(address)
        ray.init(logging_level=logging.WARNING)
    else:
        _start_node()


def is_embedded() -> bool:
    """Return True if the node is raylit's own, so that no other program waits for its resources.

    Inside a placement group on such a node it returns False: resources are scarce there.
    """
    if not ray.is_initialized() or ray.util.get_current_placement_group() is not None:
        return False
    if is_in_worker():
        return MARK in os.environ
    return _node.is_connected


def is_in_worker() -> bool:
    """Return True if this process runs a Ray task or actor."""
    return ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def session() -> tuple[str, ...] | None:
    """Return a key of this connection to Ray, or None without one.

    It differs from that of any other connection, also to the same cluster. Actors, placement groups and object
    references belong to one connection.
    """
    if not ray.is_initialized():
        return None
    # The function of `ray` itself connects if needed, which in another thread would undo a ray.shutdown of the user's.
    context = get_runtime_context()
    return context.gcs_address, context.get_node_id(), context.get_job_id()


def environment_of_workers() -> dict[str, str]:
    """Return the variables with which worker processes start, as far as this process knows."""
    return _node.environment if _node.is_connected else initial_environment()


def runtime_env() -> dict[str, Any]:
    """Return the runtime_env that the user has given Ray for this job, or for this task."""
    return dict(ray.get_runtime_context().runtime_env)


def settings_for_workers() -> ProcessSettings:
    """Return this process's settings; workers to which Ray gives a directory of their own keep it."""
    settings = ProcessSettings.current()
    return replace(settings, directory=None) if "working_dir" in runtime_env() else settings


def fixed_variables() -> frozenset[str]:
    """Return the names of variables that workers have from Ray, whatever this process has."""
    names = set(runtime_env().get("env_vars") or ())
    # Ray sets it in tasks and actors, from the CPUs that each has requested.
    return frozenset(names | {"OMP_NUM_THREADS"} if is_in_worker() else names)


def shutdown() -> None:
    """End the embedded node, if raylit has started one."""
    _node.stop()


def _check_cluster(address: str) -> None:
    """Check that the cluster at RAY_ADDRESS answers and has this process's versions; it takes 7 s at most.

    Raises:
        ConfigError: It does not answer, or has other versions.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ConfigError(
            f"RAY_ADDRESS={address} is the address of a dashboard, which `ray job submit` takes: a training needs that "
            "of the cluster's head, as HOST:6379, or auto on a host of the cluster"
        )
    if address == "local" or scheme not in ("", "ray"):
        return
    try:
        place = resolve_address(address) if not scheme else rest.partition("/")[0]
    except (ValueError, OSError) as error:
        raise ConfigError(f"RAY_ADDRESS={address}: Ray cannot read this address: {error}. {_ADDRESS_ADVICE}") from error
    if place is None:
        raise ConfigError(f"RAY_ADDRESS={address}: there is no Ray node on this host. {_ADDRESS_ADVICE}")
    if (reason := _find_connection_fault(place)) is not None:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray head answers at {place} ({reason}, for {_ANSWER_S:g} s). {_ADDRESS_ADVICE}"
        )
    if not scheme:
        _check_versions(address, place)


def _check_versions(address: str, place: str) -> None:
    try:
        mismatch = find_version_mismatch(place)
    except (RuntimeError, RayError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: what answers at {place} refuses the connection: {error}. A cluster with tokens "
            f"needs its RAY_AUTH_TOKEN here; a much older Ray has another protocol. {_ADDRESS_ADVICE}"
        ) from error
    if mismatch is not None:
        cluster_ray, cluster_python = mismatch
        raise ConfigError(
            f"RAY_ADDRESS={address}: the cluster at {place} runs Ray {cluster_ray} and Python {cluster_python}, this "
            f"process Ray {ray.__version__} and Python {platform.python_version()} ({sys.executable}). They must be "
            f"the same: install here what the cluster has (Python {cluster_python}, pip install 'ray=={cluster_ray}'), "
            "or start the cluster with what is here, for example from one container image"
        )


def _find_connection_fault(place: str) -> str | None:
    """Return why nothing of Ray's answers at HOST:PORT, or None if it does; a head that just starts is waited for."""
    host, _, port = place.rpartition(":")
    if not port.isdigit():
        return "the address has no port"
    deadline = time.monotonic() + _ANSWER_S
    while True:
        remaining_s = max(0.1, deadline - time.monotonic())
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=remaining_s) as connection:
                return None if _is_grpc(connection) else "something other than Ray listens there"
        except OSError as error:
            if time.monotonic() + _RETRY_S >= deadline:
                return error.strerror or str(error) or type(error).__name__
        time.sleep(_RETRY_S)


def _is_grpc(connection: socket.socket) -> bool:
    """Return True if an HTTP/2 server answers, as gRPC's are: its first frame must have the type SETTINGS."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return True
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    return connection.recv(9)[3:4] == b"\4"


def _start_node() -> None:
    """Start the embedded node, with one retry, as a start may fail on a busy machine.

    Raises:
        ResourcesError: The second start failed as well.
    """
    for is_last in (False, True):
        try:
            _node.start()
            return
        except Exception as error:
            _node.stop()  # ends what has started
            if not _is_start_failure(error):
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


def _is_start_failure(error: Exception) -> bool:
    """Return True if the node failed to start, False for a wrong setting.

    Ray raises a plain Exception when its raylet does not register within 30 s.
    """
    return type(error) is Exception or isinstance(error, (RuntimeError, ConnectionError, TimeoutError, RayError))


class _EmbeddedNode:
    """The local Ray node that raylit has started in this process, if any."""

    def __init__(self) -> None:
        self._pid = 0
        self._address = ""
        self._reaper: NodeReaper | None = None
        self._variables: dict[str, str | None] = {}
        self.environment: dict[str, str] = {}
        """The environment with which its processes start."""
        self._starting_thread: int | None = None
        """The thread that is starting the node's processes."""
        self._sessions_path = ""
        if sys.platform == "linux":
            os.register_at_fork(after_in_child=self._begin_session)

    def start(self) -> None:
        self.stop()  # of an earlier node, ended by a ray.shutdown of the user's, some parts may be left
        parent = _choose_parent_directory()
        # Ray's ports are open to the network. Its own start would write a token file, which makes a later `ray start`
        # require tokens; a token in the environment protects this node as well and leaves nothing behind. A user's
        # choice is kept.
        if "RAY_AUTH_MODE" not in os.environ:
            self._set_variable("RAY_AUTH_MODE", "token")
            self._set_variable("RAY_AUTH_TOKEN", secrets.token_hex(32))
        for name, value in _DEFAULTS.items():
            if name not in os.environ:
                self._set_variable(name, value)
        reload_settings()
        # A new directory, so that no other user's files can be in it.
        directory = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        mark = os.environ.get(MARK)
        os.environ[MARK] = directory
        self._pid = os.getpid()
        self._sessions_path = os.path.join(directory, SESSIONS)
        try:
            if sys.platform == "linux":
                self._reaper = NodeReaper(directory)
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
            # The node's processes have it now; later processes of this program are not the node's.
            _restore_variable(MARK, mark)
        self._address = _read_address()
        self.environment = dict(os.environ)
        # Registered later than Ray's own handler, so that it runs first.
        atexit.register(self.stop)

    @property
    def is_connected(self) -> bool:
        """True if this process is connected to the node."""
        return self._pid == os.getpid() and ray.is_initialized() and _read_address() == self._address

    def stop(self) -> None:
        """End the node and remove all that is left of it."""
        if self._pid != os.getpid():  # a fork of the driver: the node is not its own
            return
        reaper, self._reaper = self._reaper, None
        if self.is_connected:
            if reaper is None:
                ray.shutdown()
            else:
                shut_down_at_once()
        self._pid = 0
        if reaper is not None:
            reaper.finish()
        for name, before in self._variables.items():
            _restore_variable(name, before)
        self._variables.clear()
        reload_settings()
        atexit.unregister(self.stop)

    def _begin_session(self) -> None:
        """Put the node's processes into sessions of their own. Called in every fork of this process.

        A signal to the driver's process group (`timeout`, a scheduler, a terminal's Ctrl-C or hang-up) would otherwise
        end Ray's head before the driver has saved. The thread that calls `ray.init` forks the node's processes.
        """
        if self._starting_thread == threading.get_ident():
            os.setsid()
            sessions = os.open(self._sessions_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            os.write(sessions, b"%d\n" % os.getpid())
            os.close(sessions)

    def _set_variable(self, name: str, value: str) -> None:
        self._variables[name] = os.environ.get(name)
        os.environ[name] = value


def _choose_parent_directory() -> str:
    """Return the directory below which the node gets its own: RAY_TMPDIR, otherwise that for temporary files.

    The paths of the node's sockets may have 107 characters in total.

    Raises:
        ConfigError: RAY_TMPDIR is too long for that, or cannot be created.
    """
    directory = os.environ.get("RAY_TMPDIR")
    if not directory:
        return tempfile.gettempdir() if len(tempfile.gettempdir()) <= _MAX_PARENT_CHARS else "/tmp"
    directory = os.path.abspath(directory)
    if len(os.fsencode(directory)) > _MAX_PARENT_CHARS:
        raise ConfigError(
            f"RAY_TMPDIR={directory}: the path has {len(os.fsencode(directory))} characters, of which "
            f"{_MAX_PARENT_CHARS} are possible, as Ray's sockets lie below it and their paths may have 107 in all: use "
            "a shorter one"
        )
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"RAY_TMPDIR={directory}: Ray's files cannot be put there: {error}") from error
    return directory


def _restore_variable(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def _read_address() -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address


_DEFAULTS = {
    # Ray lowers its workers' priority by 15, which starves them next to any other work.
    "RAY_worker_niceness": "0",
    # Without it, an actor that requests no GPU sees all of them, and Ray warns about the default at every start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The interpreter draws a hash seed at its start, which sets the order of a set of strings: a split made from one
    # would differ between workers, and in a resumed run.
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
