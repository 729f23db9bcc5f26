"""Where Ray comes from: the cluster the driver is connected to, the one RAY_ADDRESS names, or a node of our own."""

import atexit
import logging
import os
import secrets
import sys
import tempfile

import ray

from raylit.driver.janitor import MARK, Janitor
from raylit.driver.ray_private import reload_authentication, shut_down_at_once


class _EmbeddedNode:
    """The local Ray node that raylit has started in this process, if it has."""

    def __init__(self) -> None:
        self._pid = 0
        self._address = ""
        self._janitor: Janitor | None = None
        self._variables: dict[str, str | None] = {}

    def start(self) -> None:
        self.stop()  # of an earlier one, which a ray.shutdown of the user's has ended, some may be left
        # Ray's ports are open to the network. Its own start would write a token file, which makes a later `ray start`
        # demand tokens; a token in the environment protects this node as well and leaves nothing behind.
        # A user's choice is kept.
        if "RAY_AUTH_MODE" not in os.environ:
            self._set("RAY_AUTH_MODE", "token")
            self._set("RAY_AUTH_TOKEN", secrets.token_hex(32))
            reload_authentication()
        for name, value in _DEFAULTS.items():
            if name not in os.environ:
                self._set(name, value)
        # Of its own, so that nothing in it can be somebody else's.
        directory = tempfile.mkdtemp(prefix="rl-", dir=_parent_directory())
        mark = os.environ.get(MARK)
        os.environ[MARK] = directory
        self._pid = os.getpid()
        try:
            if sys.platform == "linux":
                self._janitor = Janitor(directory)
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                _temp_dir=directory,
            )
        finally:
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
        reload_authentication()
        atexit.unregister(self.stop)

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
}

_MAX_PARENT_CHARS = 107 - len("/rl-01234567/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store")

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
    """Where the node's directory comes to stand. Its sockets' paths may have 107 characters in all, so that some places
    for temporary files do not do."""
    given = os.environ.get("RAY_TMPDIR")
    return given or (tempfile.gettempdir() if len(tempfile.gettempdir()) <= _MAX_PARENT_CHARS else "/tmp")
