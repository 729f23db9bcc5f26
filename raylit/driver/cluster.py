"""Where Ray comes from: the cluster the driver is connected to, the one RAY_ADDRESS names, or a node of our own."""

import atexit
import logging
import os
import secrets
import sys
import tempfile
import threading

import ray

from raylit.driver.janitor import MARK, PREFIX, SESSIONS, Janitor
from raylit.driver.ray_private import listening_on_loopback, reload_settings, shut_down_at_once
from raylit.errors import ConfigError


class _EmbeddedNode:
    """The local Ray node that raylit has started in this process, if it has."""

    def __init__(self) -> None:
        self._pid = 0
        self._address = ""
        self._janitor: Janitor | None = None
        self._variables: dict[str, str | None] = {}
        self._starting_thread: int | None = None
        """The thread that starts the node's processes now."""
        self._sessions_path = ""
        if sys.platform == "linux":
            os.register_at_fork(after_in_child=self._begin_session)

    def start(self) -> None:
        self.stop()  # of an earlier one, which a ray.shutdown of the user's has ended, some may be left
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
        directory = tempfile.mkdtemp(prefix=PREFIX, dir=_parent_directory())
        mark = os.environ.get(MARK)
        os.environ[MARK] = directory
        self._pid = os.getpid()
        self._sessions_path = os.path.join(directory, SESSIONS)
        try:
            if sys.platform == "linux":
                self._janitor = Janitor(directory)
            self._starting_thread = threading.get_ident()
            with listening_on_loopback():
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
        end Ray's head before the driver has saved. Ray forks the node's processes from the thread that calls `ray.init`.
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
    # Ray's head keeps a record of every actor call, for `ray list tasks` and the timeline: 3.5 KB each, so that the pings
    # of a long run alone add up to 25 MB an hour.
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
        _node.start()


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
    """The directory below which the node gets one of its own: RAY_TMPDIR, else that for temporary files. The paths of the
    node's sockets may have 107 characters in all. ConfigError: RAY_TMPDIR is too long for that, or cannot be made."""
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
