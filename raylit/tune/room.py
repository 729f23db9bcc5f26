"""Room for trials: the placement group of one, and whether the cluster can ever offer it. Driver."""

import math
from dataclasses import replace

from ray import tune

from raylit.driver import ray_private
from raylit.driver.demand import Demand, Resources
from raylit.driver.placement import cluster_hosts, each_of, hosts_in_words
from raylit.driver.waiting import Waiting
from raylit.errors import ResourcesError
from raylit.plan import Workers


def demand_of(workers: Workers) -> Demand:
    """What one trial needs. Without workers the trial's own process trains, and needs what a worker would."""
    return Demand(workers=replace(workers, num_workers=workers.world_size), each=each_of(workers, cpu=1.0))


def placement_of(workers: Workers) -> tune.PlacementGroupFactory:
    """A bundle for each worker. The trial's own process, which only waits for them, holds nothing."""
    demand = demand_of(workers)
    head: list[Resources] = [{}] if workers.num_workers > 0 else []
    selector = workers.label_selector
    options = {"bundle_label_selector": [dict(selector) for _ in demand.bundles]} if selector else {}
    return tune.PlacementGroupFactory([*head, *demand.bundles], strategy=demand.strategy, **options)


def check_room(workers: Workers) -> None:
    """ResourcesError: the cluster can never run a single trial."""
    demand, hosts = demand_of(workers), cluster_hosts()
    if demand.fits(hosts):
        return
    if ray_private.autoscaling() is not None:
        Waiting(timeout_s=math.inf).say(f"room for a trial: {demand}; the autoscaler is asked for more nodes")
        return
    raise ResourcesError(
        f"a trial needs {demand}, which this cluster of {hosts_in_words(hosts)} can never offer, and no autoscaler "
        "adds to it. Ask for fewer workers (num_workers) or fewer resources for each (resources_per_worker; "
        "resources_per_worker={'CPU': 0.5} has two workers share a core), or connect to a larger cluster (RAY_ADDRESS)"
    )
