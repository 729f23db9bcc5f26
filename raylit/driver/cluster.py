"""Where Ray comes from: the cluster the driver is connected to, the one RAY_ADDRESS names, or a node of our own."""

import logging
import os
import secrets

import ray

from raylit.driver.ray_private import reload_authentication


class _EmbeddedNode:
    """The local Ray node that raylit has started in this process, if it has."""

    def __init__(self) -> None:
        self.is_running = False
        self.address = ""
        self._variables: dict[str, str | None] = {}

    def start(self) -> None:
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
        os.environ[_MARK] = "1"
        try:
            ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
        finally:
            # The node's processes have it now; others that this process may start are not of the node.
            del os.environ[_MARK]
        self.address = ray.get_runtime_context().gcs_address
        self.is_running = True

    def stop(self) -> None:
        if not self.is_running:
            return
        self.is_running = False
        ray.shutdown()
        for name, before in self._variables.items():
            if before is None:
                os.environ.pop(name, None)
        self._variables.clear()
        reload_authentication()

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

_MARK = "RAYLIT_EMBEDDED_NODE"
"""In the environment of the embedded node's processes: tasks and actors know by it where they are."""

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
        return _MARK in os.environ
    return _node.is_running and ray.get_runtime_context().gcs_address == _node.address


def is_in_worker() -> bool:
    """This process runs a task or an actor of Ray's."""
    return ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def shutdown() -> None:
    """End the embedded node, if raylit has started one."""
    _node.stop()
