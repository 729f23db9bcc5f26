"""Resources of a trial in the cluster, and the host of its own process. Driver."""

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
from raylit.config import Workers
from raylit.driver.ray import local_cluster, worker_pool
from raylit.driver.ray.placement import (
    ResourceRequest,
    Resources,
    check_memory,
    create_placement_group,
    format_hosts,
    read_hosts,
    resources_per_worker,
)
from raylit.errors import ConfigError, ResourcesError
from raylit.storage import is_url

_NODE_SHARE = 0.001
"""Fraction of the unit of each host's own resource that binds a process to the host."""
_CHECK_TIMEOUT_S = 20.0
"""Seconds in which a host has to answer whether it can see a file, for which it starts a process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResources:
    """Resources of a trial, which get a placement group for each trial."""

    workers: Workers
    home: str = ""
    """Ray's resource of the host on which the trials' own processes have to run; empty: any host."""

    @property
    def demand(self) -> ResourceRequest:
        """Return the resource request; without workers the trial's own process needs the resources of a worker."""
        workers = self.workers
        return ResourceRequest(
            workers=replace(workers, num_workers=workers.world_size), each=resources_per_worker(workers, cpu=1.0)
        )

    @property
    def placement(self) -> tune.PlacementGroupFactory:
        """Return Tune's placement group: a bundle for each worker, and one for the trial's own process.

        The latter only waits for the workers and needs no resources.
        """
        demand = self.demand
        head: list[Resources] = [{self.home: _NODE_SHARE} if self.home else {}] if self.workers.num_workers > 0 else []
        selector = self.workers.label_selector
        selectors = [*([{}] if self.home else []), *(dict(selector) for _ in demand.bundles)]
        options = {"bundle_label_selector": selectors} if selector else {}
        return tune.PlacementGroupFactory([*head, *demand.bundles], strategy=demand.strategy, **options)


def find_trial_resources(workers: Workers, *, title: str, directory: str | None = None) -> TrialResources:
    """Wait until the cluster can run a single trial, and return the trial's resources.

    It waits only for an autoscaler. `directory` is where the trials' own processes write.

    Raises:
        ResourcesError: the cluster can never run a trial.
        ConfigError: the trials' own processes might run on a host that cannot see the directory.
    """
    local_cluster.connect()
    # Idle workers of this process's own fits occupy resources that trials need.
    worker_pool.clear()
    resources = TrialResources(workers=workers)
    demand, hosts = resources.demand, read_hosts()
    if not demand.fits(hosts):
        if ray_core.read_autoscaling() is None:
            raise ResourcesError(
                f"a trial needs {demand}, which this cluster of {format_hosts(hosts)} can never offer, and no "
                "autoscaler adds to it. Ask for fewer workers (num_workers) or fewer resources for each "
                "(resources_per_worker; resources_per_worker={'CPU': 0.5} has two workers share a core), or connect to "
                "a larger cluster (RAY_ADDRESS)"
            )
        # Nodes that the autoscaler has added stay for a while.
        ray.util.remove_placement_group(create_placement_group(demand))
    else:
        check_memory(demand, hosts)
    if directory is None or is_url(directory) or _can_all_hosts_see(directory):
        return resources
    if workers.num_nodes or workers.placement.startswith("STRICT"):
        argument = f"num_nodes={workers.num_nodes}" if workers.num_nodes else f"placement={workers.placement!r}"
        raise ConfigError(
            f"{directory} is not there for all hosts of the cluster, and with {argument} a trial's own process, which "
            "writes to it, may have to run on any of them. Give default_root_dir= a directory that all hosts share, or "
            "a URL such as s3://BUCKET/PATH, or leave the placement to Ray"
        )
    # A trial that would train in its own process trains in one worker instead, with the same numbers.
    workers = replace(workers, num_workers=workers.world_size)
    sys.stderr.write(
        f"raylit: {title}: other hosts may not see {directory}. So the trials' own processes run on this host and "
        "write for their workers, which run anywhere; with a shared directory or a URL as default_root_dir both may "
        "run on any host\n"
    )
    return TrialResources(workers=workers, home=_find_own_resource())


def _can_all_hosts_see(directory: str) -> bool:
    """Return whether every host can see the directory, also hosts that an autoscaler may add to this one alone."""
    own = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    if not others:
        return ray_core.read_autoscaling() is None
    os.makedirs(directory, exist_ok=True)
    marker = os.path.join(directory, f".seen-{uuid.uuid4().hex}")
    open(marker, "x").close()
    try:
        # The remote function is Python's own: importing raylit would take the hosts' processes seconds.
        check = ray.remote(num_cpus=0, max_retries=0)(os.path.isfile)
        answers = [
            check.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(marker)
            for node in others
        ]
        ready, late = ray.wait(answers, num_returns=len(answers), timeout=_CHECK_TIMEOUT_S)
        with contextlib.suppress(RayError):  # a host may have left the cluster
            return not late and all(ray.get(ready))
        return False
    finally:
        os.remove(marker)


def _find_own_resource() -> str:
    """Return the name of the resource that only this node has, and nothing else uses up."""
    own = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
    return next(name for name in resources if name.startswith("node:") and not name.startswith("node:__"))
