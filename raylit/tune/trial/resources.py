"""Room: what a trial takes of the cluster, and where its own process has to stand. Driver."""

import contextlib
import os
import sys
import uuid
from dataclasses import dataclass, replace

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylit.compat import ray_core
from raylit.config.plan import Workers
from raylit.driver.ray import local_cluster, worker_pool
from raylit.driver.ray.placement import (
    check_memory,
    cluster_hosts,
    create_placement_group,
    format_hosts,
    resources_per_worker,
)
from raylit.driver.ray.resource_request import ResourceRequest, Resources
from raylit.errors import ConfigError, ResourcesError
from raylit.storage import is_url

_SHARE = 0.001
"""Of the unit that every host has of a resource of its own."""
_LOOK_S = 20.0
"""For a host to say whether it sees a file. It starts a process for that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResources:
    """A placement group for each trial."""

    workers: Workers
    home: str = ""
    """Ray's resource of the host where the trials' own processes have to stand; empty: anywhere."""

    @property
    def demand(self) -> ResourceRequest:
        """Without workers the trial's own process trains, and needs what a worker would."""
        workers = self.workers
        return ResourceRequest(
            workers=replace(workers, num_workers=workers.world_size), each=resources_per_worker(workers, cpu=1.0)
        )

    @property
    def placement(self) -> tune.PlacementGroupFactory:
        """A bundle for each worker. The trial's own process, which only waits for them, holds nothing else."""
        demand = self.demand
        head: list[Resources] = [{self.home: _SHARE} if self.home else {}] if self.workers.num_workers > 0 else []
        selector = self.workers.label_selector
        selectors = [*([{}] if self.home else []), *(dict(selector) for _ in demand.bundles)]
        options = {"bundle_label_selector": selectors} if selector else {}
        return tune.PlacementGroupFactory([*head, *demand.bundles], strategy=demand.strategy, **options)


def find_trial_resources(workers: Workers, *, title: str, directory: str | None = None) -> TrialResources:
    """Once the cluster can run a single trial: with an autoscaler, that may be after a wait. `directory`: what the
    trials' own processes write to. ResourcesError: it never can. ConfigError: nor where those processes may stand."""
    local_cluster.connect()
    # Idle workers of this process's own fits hold what trials need.
    worker_pool.clear()
    room = TrialResources(workers=workers)
    demand, hosts = room.demand, cluster_hosts()
    if not demand.fits(hosts):
        if ray_core.read_autoscaling() is None:
            raise ResourcesError(
                f"a trial needs {demand}, which this cluster of {format_hosts(hosts)} can never offer, and no "
                "autoscaler adds to it. Ask for fewer workers (num_workers) or fewer resources for each "
                "(resources_per_worker; resources_per_worker={'CPU': 0.5} has two workers share a core), or connect to "
                "a larger cluster (RAY_ADDRESS)"
            )
        # Nodes that have come stay for a while.
        ray.util.remove_placement_group(create_placement_group(demand))
    else:
        check_memory(demand, hosts)
    if directory is None or is_url(directory) or _is_seen_by_all(directory):
        return room
    if workers.num_nodes or workers.placement.startswith("STRICT"):
        asked = f"num_nodes={workers.num_nodes}" if workers.num_nodes else f"placement={workers.placement!r}"
        raise ConfigError(
            f"{directory} is not there for all hosts of the cluster, and with {asked} a trial's own process, which "
            "writes to it, may have to run on any of them. Give default_root_dir= a directory that all hosts share, or "
            "a URL such as s3://BUCKET/PATH, or leave the placement to Ray"
        )
    # What would train in the trial's own process trains in a worker, with the same numbers.
    workers = replace(workers, num_workers=workers.world_size)
    sys.stderr.write(
        f"raylit: {title}: other hosts may not see {directory}. So the trials' own processes run on this host and "
        "write for their workers, which run anywhere; with a shared directory or a URL as default_root_dir both may "
        "run on any host\n"
    )
    return TrialResources(workers=workers, home=_own_resource())


def _is_seen_by_all(directory: str) -> bool:
    """By every host of the cluster; with an autoscaler, also by those that a cluster of this host alone may get."""
    own = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    if not others:
        return ray_core.read_autoscaling() is None
    os.makedirs(directory, exist_ok=True)
    mark = os.path.join(directory, f".seen-{uuid.uuid4().hex}")
    open(mark, "x").close()
    try:
        # Not a function of raylit's, whose import takes the hosts' processes seconds.
        look = ray.remote(num_cpus=0, max_retries=0)(os.path.isfile)
        answers = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(mark)
            for node in others
        ]
        ready, late = ray.wait(answers, num_returns=len(answers), timeout=_LOOK_S)
        with contextlib.suppress(RayError):  # a host has gone meanwhile
            return not late and all(ray.get(ready))
        return False
    finally:
        os.remove(mark)


def _own_resource() -> str:
    """Every node has one of its own, which nothing else uses up."""
    own = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
    return next(name for name in resources if name.startswith("node:") and not name.startswith("node:__"))
