"""Where Ray comes from: the cluster the driver is connected to, the one RAY_ADDRESS names, or a node of our own."""

import atexit
import logging
import os
import secrets

import ray

_LOOPBACK = "127.0.0.1"


class _EmbeddedNode:
    """The local Ray node that raylit has started in this process, if it has."""

    def __init__(self) -> None:
        self.is_running = False
        self._variables: dict[str, str | None] = {}

    def start(self) -> None:
        # Ray's own start writes a token file that makes a later `ray start` demand tokens; one in the environment
        # protects this node as well and leaves nothing behind. A user's choice is kept.
        if "RAY_AUTH_MODE" not in os.environ:
            self._set("RAY_AUTH_MODE", "token")
            self._set("RAY_AUTH_TOKEN", secrets.token_hex(32))
        for name, value in _DEFAULTS.items():
            if name not in os.environ:
                self._set(name, value)
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.WARNING,
            _node_ip_address=_LOOPBACK,
        )
        self.is_running = True
        atexit.register(self.stop)

    def stop(self) -> None:
        if not self.is_running:
            return
        self.is_running = False
        atexit.unregister(self.stop)
        ray.shutdown()
        for name, before in self._variables.items():
            if before is None:
                os.environ.pop(name, None)
        self._variables.clear()

    def _set(self, name: str, value: str) -> None:
        self._variables[name] = os.environ.get(name)
        os.environ[name] = value


_DEFAULTS = {
    # Ray lowers its workers' priority by 15, which starves them beside any other work.
    "RAY_worker_niceness": "0",
    # Without it, an actor that asks for no GPU sees all of them, and Ray warns about the default at every start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_node = _EmbeddedNode()


def connect() -> None:
    """Make sure that this process is a Ray driver."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        _node.start()


def shutdown() -> None:
    """End the embedded node, if raylit has started one. A cluster of the user's is left alone."""
    _node.stop()
