"""Private names of Ray's core, its sessions and the texts of its errors, each behind one function. Driver.

Written for Ray 2.60. A missing name is a RaylitError, or is ignored if only printed lines or a second's wait depend on
it. Ray takes seconds to import: this module imports it in the functions that use it, and what `sys.modules` does not
have is not in use.
"""

import contextlib
import glob
import importlib
import inspect
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from raylit.compat.private_names import describe_missing, import_private
from raylit.errors import RaylitError

_FEATURE = "training on Ray workers"
_SESSION_FEATURE = "a fit inside a function of Ray Tune or Ray Train"
_TIMEOUT_S = 5.0
"""Timeout of an answer from Ray's head."""
_HEAD_RESOURCE = "node:__internal_head__"
"""Resource that only the head's node has."""
_DEFAULT_MAX_WORKERS = 2
"""Ray's own default of `max_workers` in a cluster's configuration."""


# Settings and processes


def reload_settings() -> None:
    """Reload Ray's settings from the environment, RAY_AUTH_MODE and RAY_AUTH_TOKEN included.

    Ray itself reads them once, on import.
    """
    _import("ray._raylet", "Config").initialize("")
    try:
        tokens = _import("ray._raylet", "AuthenticationTokenLoader")
    except RaylitError:  # a version of Ray without tokens
        return
    tokens.instance().reset_cache()


@contextmanager
def listen_on_loopback() -> Iterator[None]:
    """Give a node that starts within this context the address 127.0.0.1, so that its ports are open to this host only.

    Ray replaces that address by the host's own and listens on all interfaces, except under
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which it reads once, on import.
    """
    constants = _import("ray._private", "ray_constants")
    before = _import("ray._private.ray_constants", "ENABLE_RAY_CLUSTER")
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def resolve_address(address: str) -> str | None:
    """Return the HOST:PORT that Ray takes an address for; None if "auto" finds no node on this host.

    Raises:
        ValueError: It is no address.
        OSError: "auto" finds several nodes.
    """
    resolve = _import("ray._private.services", "canonicalize_bootstrap_address")
    return cast("str | None", resolve(address))


def find_version_mismatch(address: str) -> tuple[str, str] | None:
    """Return the versions of Ray and Python of the cluster at HOST:PORT, or None if this process may connect to it.

    Ray checks them as well, but only when it has connected, which fails before that if the protocols differ.

    Raises:
        RuntimeError: The cluster refuses the connection.
    """
    client = _import("ray._raylet", "GcsClient")(address=address)
    metadata = _import("ray._common.usage.usage_lib", "get_cluster_metadata")(client)
    if not metadata:
        return None
    try:
        _import("ray._private.utils", "check_version_info")(metadata, address)
    except RuntimeError:
        return metadata["ray_version"], metadata["python_version"]
    return None


def measure_package(directory: str, *, timeout_s: float) -> dict[str, int]:
    """Measure what Ray would upload of a working directory, which it packs without compression.

    Returns:
        Bytes by the first name below the directory, without what .gitignore, .rayignore and Ray's defaults exclude; of
        a part of the files if there are too many for `timeout_s`.
    """
    module = "ray._private.runtime_env.packaging"
    root = Path(directory).absolute()
    sizes: dict[str, int] = {}
    deadline = time.monotonic() + timeout_s

    def add(path: Path) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError
        if path.is_file():
            name = path.relative_to(root).parts[0]
            sizes[name] = sizes.get(name, 0) + path.stat().st_size

    constants = _import("ray._private", "ray_constants")
    excludes = [_import(module, "_get_excludes")(root, constants.get_runtime_env_default_excludes())]
    ignores_git = os.environ.get(constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    silent = logging.Logger("silent", level=logging.CRITICAL + 1)
    with contextlib.suppress(TimeoutError):
        _import(module, "_dir_travel")(root, excludes, add, include_gitignore=ignores_git, logger=silent)
    return sizes


def read_package_limits() -> tuple[int, int]:
    """Return the bytes that a working directory may have for `ray job submit`, and for `ray.init`."""
    job_limit = _import("ray._private.ray_constants", "DASHBOARD_CLIENT_MAX_SIZE")
    return job_limit, _import("ray._private.runtime_env.packaging", "GCS_STORAGE_MAX_SIZE")


def shut_down_at_once() -> None:
    """Call `ray.shutdown` without its wait for the raylet, for a node of this process that the node reaper removes.

    Ray waits a second for its raylet, which takes longer. Without the private name this is `ray.shutdown`.
    """
    import ray

    worker = _import("ray._private", "worker")
    node = getattr(worker, "_global_node", None)
    if node is not None:
        worker._global_node = None
    ray.shutdown()
    if node is not None:
        node.kill_all_processes(check_alive=False)


def hide_worker_deaths(worker_ids: Sequence[str]) -> None:
    """Keep Ray from printing lines of its own about the deaths of these workers.

    It has the effect of RAY_DEDUP_LOGS_SKIP_REGEX, which Ray reads once, on import; the user's setting stays. Without
    the private name Ray prints its lines in addition to raylit's error.
    """
    try:
        deduplicator = _import("ray._private.ray_logging", "stdout_deduplicator")
        user_pattern = deduplicator.skip_re
    except (RaylitError, AttributeError):
        return
    own = rf"^A worker died or was killed .* Worker ID: (?:{'|'.join(worker_ids)}) "
    deduplicator.skip_re = re.compile(own if user_pattern is None else f"{user_pattern.pattern}|{own}")


def load_exit_imports() -> None:
    """Import what Ray imports while a process ends, which takes 0.1 s either way; do nothing without Ray.

    After an uncaught KeyboardInterrupt, Python ends by SIGINT (130 in a shell, which then ends a loop of commands as
    well), unless code is compiled between the exception and the end: then its exit code is 1, as seen with Python 3.11.
    Ray causes that at its shutdown, by importing a package. With a version that has no such package, or others, a
    program that Ctrl-C ends may have the exit code 1.
    """
    if "ray" in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("ray.dag")


# The session of Ray Tune or Ray Train that runs a function in this process


def find_function_session() -> Any | None:
    """Return the session of a function trainable of Tune, or of a worker of Train's first version, or None."""
    module = "ray.train._internal.session"
    return import_private(module, "get_session", feature=_SESSION_FEATURE)() if module in sys.modules else None


def find_train_functions() -> Any | None:
    """Return the functions of Train's second version, if this process is one of its workers, or None."""
    module = "ray.train.v2._internal.execution.train_fn_utils"
    return import_private(module, "_train_fn_utils", feature=_SESSION_FEATURE) if module in sys.modules else None


def count_train_reports() -> int:
    """Return the number of reports of this worker of Train's second version; 0 in its local mode."""
    module = "ray.train.v2._internal.execution.context"
    context = import_private(module, "_train_context", feature=_SESSION_FEATURE)
    return 0 if context is None else int(context.report_call_index)


def read_trial_config(session: Any) -> Mapping[str, Any]:
    """Return the config that Tune has called the session's function with; empty if the session is not Tune's."""
    target = getattr(session.training_thread, "_target", None)
    if not inspect.isfunction(target):
        owner = "ray.train._internal.session.RunnerThread"
        raise describe_missing(owner, "_target", feature=_SESSION_FEATURE, library="ray")
    # The target is a lambda: self._trainable_func(self.config), where self is Tune's trainable.
    trainable = inspect.getclosurevars(target).nonlocals.get("self")
    return getattr(trainable, "config", None) or {}


# The cluster's state


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoscaling:
    """State of the cluster's autoscaler."""

    starting: dict[str, int] = field(default_factory=dict)
    """Nodes that are requested or starting, by type."""
    infeasible_groups: frozenset[str] = frozenset()
    """Placement groups, by id in hex, that what is free now and all nodes that it may still start could not serve.

    They may fit once others free their resources. The old autoscaler does not report them.
    """


def read_autoscaling() -> Autoscaling | None:
    """Read what the autoscaler is about to do from Ray's head; None if no autoscaler adds nodes to this cluster.

    Ray 2.60 has no public API for it. The new autoscaler reports to the head; the old one has a status.
    """
    state = _read_cluster_status().autoscaling_state
    if state.autoscaler_state_version:
        starting = Counter(instance.ray_node_type_name for instance in state.pending_instances)
        for request in state.pending_instance_requests:
            starting[request.ray_node_type_name] += request.count
        return Autoscaling(
            starting=dict(starting),
            # "ID:STRATEGY|STATE"
            infeasible_groups=frozenset(
                request.details.split(":")[0] for request in state.infeasible_gang_resource_requests
            ),
        )
    status = _get_gcs_client().internal_kv_get(b"__autoscaling_status", None, timeout=_TIMEOUT_S)
    return parse_old_autoscaling(json.loads(status)) if status else None


def parse_old_autoscaling(status: Mapping[str, Any]) -> Autoscaling | None:
    """Parse the status of an autoscaler of version 1; None if it has no configuration.

    The status exists on any cluster: without a configuration it only mirrors the nodes, as types of their own.
    """
    report = status.get("autoscaler_report") or {}
    types = [*report.get("active_nodes", {}), *report.get("pending_launches", {})]
    if all(name.startswith("node_") for name in types):
        return None
    return Autoscaling(starting=dict(report.get("pending_launches", {})))


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeType:
    """Type of node that the autoscaler may start."""

    name: str
    resources: dict[str, float]
    labels: dict[str, str]
    max_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscalerLimits:
    """The nodes that the autoscaler may have running at most."""

    node_types: tuple[NodeType, ...]
    max_nodes: int
    """Limit for the nodes of all types together."""
    node_ids: frozenset[str]
    """Nodes of these types that are in the cluster now, by id in hex."""


def read_autoscaler_limits(*, timeout_s: float = _TIMEOUT_S) -> AutoscalerLimits | None:
    """Read the limits from the autoscaler's configuration, which is a file on the head; it takes about a second.

    Ray's head does not publish them, so a task on the head finds the file by the command line of the autoscaler's
    process. None if that runs elsewhere, as KubeRay's does in a container of its own, or if the task does not answer
    in time.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    address = ray.get_runtime_context().gcs_address
    nodes = ray.nodes()
    head = next((node["NodeID"] for node in nodes if node["Alive"] and _HEAD_RESOURCE in node["Resources"]), None)
    if head is None:
        return None

    # A function inside a function is pickled by value: the head need not have raylit.
    def read_configuration() -> str | None:
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    words = dict(word.partition("=")[::2] for word in file.read().split("\0"))
            except OSError:  # the process has ended
                continue
            if words.get("--gcs-address") == address and "--autoscaling-config" in words:
                # The launcher's files name it below ~, which the autoscaler itself expands.
                with open(os.path.expanduser(words["--autoscaling-config"]), encoding="utf-8") as file:
                    return file.read()
        return None

    function: Any = ray.remote(num_cpus=0, max_retries=0)(read_configuration)
    task = function.options(scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False)).remote()
    try:
        text = ray.get(task, timeout=timeout_s)
    except RayError:
        ray.cancel(task, force=True)
        return None
    if text is None:
        return None
    # Imported here so that importing raylit does not import yaml.
    import yaml

    return _parse_autoscaler_limits(yaml.safe_load(text))


def _parse_autoscaler_limits(configuration: Mapping[str, Any]) -> AutoscalerLimits | None:
    """Parse a configuration of the cluster launcher; None if a type of node does not say what it has."""
    max_nodes = configuration.get("max_workers", _DEFAULT_MAX_WORKERS)
    types = {
        name: NodeType(
            name=name,
            resources=dict(entry.get("resources") or {}),
            labels=dict(entry.get("labels") or {}),
            max_count=entry.get("max_workers", max_nodes),
        )
        for name, entry in configuration["available_node_types"].items()
        if name != configuration.get("head_node_type")
    }
    if any(kind.max_count and not kind.resources for kind in types.values()):
        return None
    nodes = _read_cluster_status().cluster_resource_state.node_states
    return AutoscalerLimits(
        node_types=tuple(types.values()),
        max_nodes=max_nodes,
        node_ids=frozenset(node.node_id.hex() for node in nodes if node.ray_node_type_name in types),
    )


def list_pending_groups() -> frozenset[str]:
    """List the placement groups, by id in hex, that the autoscaler sees pending."""
    requests = _read_cluster_status().cluster_resource_state.pending_gang_resource_requests
    return frozenset(request.details.split(":")[0] for request in requests)


def list_pending_requests() -> list[dict[str, float]]:
    """List pending resource requests of tasks, actors and bundles that a host could serve in total, if it were free.

    The list may be a second old. It never connects to Ray, as many of Ray's functions do by themselves.
    """
    state = _read_cluster_status().cluster_resource_state
    hosts = [dict(node.total_resources) for node in state.node_states]
    single = [entry.request for entry in state.pending_resource_requests]
    bundles = [request for group in state.pending_gang_resource_requests for request in group.requests]
    requests = [dict(request.resources_bundle) for request in (*single, *bundles)]
    return [
        request
        for request in requests
        if any(all(host.get(name, 0.0) >= amount for name, amount in request.items()) for host in hosts)
    ]


def read_free_in_group(group_id: str) -> dict[int, dict[str, float]]:
    """Read the free resources of each bundle of a placement group, which `ray.available_resources` leaves out."""
    free: dict[int, dict[str, float]] = {}
    for resources in _import("ray._private.state", "available_resources_per_node")().values():
        for key, amount in resources.items():
            name, separator, suffix = key.partition("_group_")  # CPU_group_0_ID, and CPU_group_ID for all together
            index, _, group = suffix.partition("_")
            if separator and group == group_id and name != "bundle":
                free.setdefault(int(index), {})[name] = amount
    return free


def select_plain_resources(resources: Mapping[str, float]) -> dict[str, float]:
    """Select the resources other than memory and Ray's internal names, such as those of hosts and groups."""
    return {name: amount for name, amount in resources.items() if not _INTERNAL_RESOURCE.search(name)}


# Texts of Ray's errors and logs


def is_memory_monitor_kill(text: str) -> bool:
    """Return True if the text of an ActorDiedError says that Ray's memory monitor has killed the process."""
    return _MEMORY_MONITOR.search(text) is not None


def parse_memory_use(text: str) -> tuple[str, str] | None:
    """Parse the gigabytes in use and in total from a message of Ray's memory monitor; None if it has none."""
    match = _MEMORY_USED.search(text)
    return None if match is None else (match[1], match[2])


def parse_lost_host(text: str) -> str | None:
    """Parse why Ray has lost a host from an ActorDiedError's text: "" without a reason, None if no host was lost."""
    match = _HOST_LOST.search(text)
    return None if match is None else match[1] or ""


def parse_exit_code(text: str) -> int | None:
    """Parse the exit code of a worker's process from an ActorDiedError's text; None if it has none."""
    match = _EXIT_CODE.search(text)
    return None if match is None else int(match[1])


def is_exit_by_sigterm(text: str) -> bool:
    """Return True if an ActorDiedError's text says that the process was sent a SIGTERM."""
    return "receives a SIGTERM" in text


def is_connection_lost(text: str) -> bool:
    """Return True if an ActorDiedError's text only says that the process's connection ended."""
    return "Worker unexpectedly exits with a connection error" in text


def strip_preamble(text: str) -> str:
    """Return the cause in an ActorDiedError's text."""
    return text.partition("The actor is dead because ")[2] or text


def parse_host_address(text: str) -> str | None:
    """Parse the host's address from the text of an error about an actor; None if it has none."""
    match = _HOST_ADDRESS.search(text)
    return None if match is None else match[1]


def parse_crash_signal(log: str, *, pid: int) -> str | None:
    """Parse the signal, such as "SIGSEGV", that has crashed the process with this id from a worker's log, or None."""
    return next((name for owner, name in reversed(_CRASH.findall(log)) if int(owner) == pid), None)


_HOST_ADDRESS = re.compile(r"\b(?:ip|IP): ([^\s,]+)")
_CRASH = re.compile(r"^\[[^\]]* E (\d+) \d+\] \S+ \*\*\* (SIG[A-Z]+) received at ", re.MULTILINE)
"""Line that Ray's handler of such signals writes, with the process's id: its children write to the same log."""
_EXIT_CODE = re.compile(r"exits with an exit code (-?\d+)")
_HOST_LOST = re.compile(r"its node has died\.(?:.*?the actor's node was (.*?)[.:]?(?: The actor never ran.*)?$)?")
_INTERNAL_RESOURCE = re.compile(":|memory|_group_")
_MEMORY_MONITOR = re.compile(r"NODE_OUT_OF_MEMORY|running low on memory|memory monitor|low memory", re.IGNORECASE)
"""Exit type and messages of Ray's memory monitor."""
_MEMORY_USED = re.compile(r"was ([\d.]+) ?GB used / ([\d.]+) ?GB limit")


def _read_cluster_status() -> Any:
    """Read the state that the autoscaler works with from Ray's head."""
    reply = _import("ray.core.generated.autoscaler_pb2", "GetClusterStatusReply")()
    reply.ParseFromString(_get_gcs_client().get_cluster_status(timeout_s=_TIMEOUT_S))
    return reply


def _get_gcs_client() -> Any:
    return _import("ray._private.worker", "global_worker.gcs_client")


def _import(module: str, name: str) -> Any:
    return import_private(module, name, feature=_FEATURE)
