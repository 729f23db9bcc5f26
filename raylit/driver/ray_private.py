"""The private names of Ray that raylit cannot do without, each behind one function. Driver."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.ray_logging import stdout_deduplicator
from ray._private.state import available_resources_per_node
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

_TIMEOUT_S = 5.0
"""For an answer of Ray's head."""


def reload_settings() -> None:
    """Have this process follow RAY_AUTH_MODE, RAY_AUTH_TOKEN and Ray's other settings in the environment as they are
    now: Ray reads them once, on import."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def listening_on_loopback() -> Iterator[None]:
    """Let a node that is started meanwhile have the address 127.0.0.1, so that its ports are open to this host alone.

    Ray replaces that address by the host's own where it is asked for it, and listens on all interfaces; except under
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which it reads once, on import.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def shut_down_at_once() -> None:
    """`ray.shutdown` for a node that this process has started, where somebody else clears away what is left of it: Ray
    itself waits a second for its raylet, which takes longer."""
    worker: Any = ray._private.worker
    node, worker._global_node = worker._global_node, None
    ray.shutdown()
    if node is not None:
        node.kill_all_processes(check_alive=False)


def hide_deaths(worker_ids: Sequence[str]) -> None:
    """Have Ray print nothing of its own about the deaths of these workers.

    As RAY_DEDUP_LOGS_SKIP_REGEX, which Ray reads once, on import; that of the user's stays.
    """
    own = rf"^A worker died or was killed .* Worker ID: (?:{'|'.join(worker_ids)}) "
    given = stdout_deduplicator.skip_re
    stdout_deduplicator.skip_re = re.compile(own if given is None else f"{given.pattern}|{own}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoscaling:
    """What the cluster's autoscaler says of itself."""

    starting: dict[str, int] = field(default_factory=dict)
    """Nodes on their way, by type."""
    infeasible_groups: frozenset[str] = frozenset()
    """Placement groups, by id in hex, that no node it may start could serve. The old autoscaler does not tell."""


def autoscaling() -> Autoscaling | None:
    """None: nothing adds nodes to this cluster.

    Ray 2.60 has no public word on that. The new autoscaler reports to the head; for the old one there is its status.
    """
    client = _gcs_client()
    reply: Any = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=_TIMEOUT_S))
    state = reply.autoscaling_state
    if state.autoscaler_state_version:
        return Autoscaling(
            starting={request.ray_node_type_name: request.count for request in state.pending_instance_requests},
            # "ID:STRATEGY|STATE"
            infeasible_groups=frozenset(
                request.details.split(":")[0] for request in state.infeasible_gang_resource_requests
            ),
        )
    status = client.internal_kv_get(b"__autoscaling_status", None, timeout=_TIMEOUT_S)
    return old_autoscaling(json.loads(status)) if status else None


def old_autoscaling(status: dict[str, Any]) -> Autoscaling | None:
    """From the status of an autoscaler of version 1, which is there on any cluster: without a configuration it only
    mirrors the nodes, as types of their own."""
    report = status.get("autoscaler_report") or {}
    types = [*report.get("active_nodes", {}), *report.get("pending_launches", {})]
    if all(name.startswith("node_") for name in types):
        return None
    return Autoscaling(starting=dict(report.get("pending_launches", {})))


def pending_groups() -> frozenset[str]:
    """Placement groups, by id in hex, that the autoscaler sees waiting."""
    reply: Any = GetClusterStatusReply()
    reply.ParseFromString(_gcs_client().get_cluster_status(timeout_s=_TIMEOUT_S))
    requests = reply.cluster_resource_state.pending_gang_resource_requests
    return frozenset(request.details.split(":")[0] for request in requests)


def waiting_demands() -> list[dict[str, float]]:
    """What each task, actor or bundle of a placement group asks for that has no room in the cluster yet, where a host
    has as much at all. A second old. It never connects to Ray, as many of Ray's functions do by themselves."""
    reply: Any = GetClusterStatusReply()
    reply.ParseFromString(_gcs_client().get_cluster_status(timeout_s=_TIMEOUT_S))
    state = reply.cluster_resource_state
    hosts = [dict(node.total_resources) for node in state.node_states]
    single = [entry.request for entry in state.pending_resource_requests]
    of_groups = [request for group in state.pending_gang_resource_requests for request in group.requests]
    demands = [dict(request.resources_bundle) for request in (*single, *of_groups)]
    return [
        demand
        for demand in demands
        if any(all(host.get(name, 0.0) >= amount for name, amount in demand.items()) for host in hosts)
    ]


def free_in_group(group_id: str) -> dict[int, dict[str, float]]:
    """What is free in each bundle of a placement group. `ray.available_resources` leaves these out."""
    free: dict[int, dict[str, float]] = {}
    for resources in available_resources_per_node().values():
        for key, amount in resources.items():
            name, separator, place = key.partition("_group_")  # CPU_group_0_ID, and CPU_group_ID for all together
            index, _, group = place.partition("_")
            if separator and group == group_id and name != "bundle":
                free.setdefault(int(index), {})[name] = amount
    return free


def _gcs_client() -> Any:
    worker: Any = ray._private.worker.global_worker
    return worker.gcs_client
