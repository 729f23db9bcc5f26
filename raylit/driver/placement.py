"""Placement: room for the workers of a run, all of them or none, in one placement group. Driver."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylit.compat import ray_core
from raylit.driver import borrowed, cluster
from raylit.driver.demand import Demand, Host, Resources, gigabytes, in_words
from raylit.driver.waiting import Waiting
from raylit.errors import ConfigError, ResourcesError
from raylit.plan import Workers

_LEAST_WORKER_BYTES = 200_000_000
"""Of a process that has imported torch and Ray: what it shares with no other, measured 190 MB on Linux."""
_UNKNOWN_BYTES = 1e18
"""A host that does not tell its memory."""
_HOPELESS_S = 10.0
"""An autoscaler that says for so long that no node of its could serve the demand is believed: it looks every 5 s."""


class Placement:
    """The bundles of the workers: of a placement group of their own, or of the one that this process runs in."""

    def __init__(self, workers: Workers, *, make_room: Callable[[], bool] = lambda: False) -> None:
        """ResourcesError: the cluster has not what is asked for, or did not offer it in time.

        `make_room`: ends something of this process's own that holds resources; False: there is nothing.
        """
        current = ray.util.get_current_placement_group()
        self._is_own = current is None
        if current is not None:
            self._group = current
            self._places = borrowed.bundles_for(Demand(workers=workers, each=each_of(workers, cpu=1.0)), current)
        else:
            demand = _demand(workers)
            self._group = placed(demand, make_room=make_room)
            self._places = [(bundle, demand.each) for bundle in demand.bundle_of_worker]

    def options(self, index: int) -> dict[str, Any]:
        """Ray's options for the actor of this worker."""
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        bundle, each = self._places[index]
        return {
            "num_cpus": 0,
            **{named[name]: amount for name, amount in each.items() if name in named},
            "resources": {name: amount for name, amount in each.items() if name not in named},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=bundle
            ),
        }

    @property
    def resources(self) -> Resources:
        """What a worker takes away from others; in a group that was there before, nothing."""
        return self._places[0][1] if self._is_own else {}

    def is_within_reach(self) -> bool:
        """The process still stands where it stood: a process of Ray's runs tasks of several groups, one by one."""
        current = ray.util.get_current_placement_group()
        return current is None if self._is_own else current is not None and current.id == self._group.id

    def remove(self) -> None:
        """Give the room back; a group that was there before is left alone."""
        if self._is_own:
            remove_placement_group(self._group)


def _demand(workers: Workers) -> Demand:
    """What the workers ask for. ResourcesError: nothing can meet it."""
    hosts = cluster_hosts()
    # On the node that is ours alone, a small share leaves room beside warm workers that wait for their next run.
    cpu = 0.01 if cluster.is_embedded() else 1.0
    # A task or actor only waits for its workers: they use what it holds, or tasks that fill a cluster would wait for
    # each other.
    lent = _own()[1].get("CPU", 0.0) / workers.num_workers
    demand = Demand(workers=workers, each=each_of(workers, cpu=max(0.0, round(cpu - lent, 4))))
    if demand.fits(hosts):
        check_memory(demand, hosts)
        return demand
    if ray_core.read_autoscaling() is not None:
        return demand
    # More processes than cores are allowed: they share.
    cpu = 0.5
    while "CPU" not in workers.resources_per_worker and cpu >= 0.001:
        shared = Demand(workers=workers, each=each_of(workers, cpu=math.floor(cpu * 1000) / 1000))
        if shared.fits(hosts):
            check_memory(shared, hosts)
            return shared
        cpu /= 2
    raise ResourcesError(
        f"{demand} {_are(workers)} asked for, which this cluster of {_offer(demand, hosts)} can never offer, and no "
        f"autoscaler adds to it.{_note_on_own()} Ask for fewer workers or resources (num_workers, "
        "resources_per_worker, num_nodes, placement, label_selector), or connect to a larger cluster (RAY_ADDRESS)"
    )


def check_memory(demand: Demand, hosts: list[Host]) -> None:
    """Ray does not count the memory of workers that say nothing of it. ResourcesError: with so many, none would come to
    train, and the machine to a standstill."""
    if "memory" in demand.workers.resources_per_worker or ray_core.read_autoscaling() is not None:
        return
    counted = replace(demand, each={**demand.each, "memory": float(_LEAST_WORKER_BYTES)})
    hosts = [replace(host, resources={"memory": _UNKNOWN_BYTES, **host.resources}) for host in hosts]
    num_fitting, num_workers = counted.num_fitting(hosts), demand.workers.num_workers
    if num_fitting < num_workers:
        raise ResourcesError(
            f"num_workers={num_workers}: there is memory for {num_fitting} such workers: a worker takes "
            f"{gigabytes(_LEAST_WORKER_BYTES)} before it holds a model or data, and this cluster of "
            f"{_offer(counted, hosts)} has no more. Ask for fewer workers; or say what a worker of yours needs, which "
            "counts instead: resources_per_worker={'memory': BYTES}, 0 for as many as you say"
        )


def each_of(workers: Workers, *, cpu: float) -> Resources:
    """What a worker asks for: what is named, and what every worker needs where it is not named."""
    each = {"CPU": cpu, **({"GPU": 1.0} if workers.accelerator == "cuda" else {}), **workers.resources_per_worker}
    # Ray has no bundles of nothing, and counts memory in bytes.
    return {name: float(amount) for name, amount in each.items() if amount} or {"memory": 1.0}


def placed(demand: Demand, *, make_room: Callable[[], bool] = lambda: False) -> PlacementGroup:
    """A group that is there. Whatever ends the wait early leaves no demand behind."""
    group = _group(demand)
    timeout_s = demand.workers.start_timeout_s
    waiting = Waiting(timeout_s=timeout_s)
    hopeless_since_s: float | None = None
    try:
        # In slices, as a wait of Ray's does not notice Ctrl-C; of a second, as Ray cuts off fractions (2.60).
        while not group.wait(1):
            if make_room():
                continue
            is_line_due = waiting.is_line_due
            scaler = ray_core.read_autoscaling()
            is_hopeless = scaler is not None and group.id.hex() in scaler.infeasible_groups
            if not is_hopeless or demand.fits(cluster_hosts()):
                hopeless_since_s = None
            elif hopeless_since_s is None:
                hopeless_since_s = waiting.waited_s
            elif waiting.waited_s - hopeless_since_s >= _HOPELESS_S:
                raise ResourcesError(
                    f"{demand} {_are(demand.workers)} asked for, which this cluster of "
                    f"{hosts_in_words(cluster_hosts())} cannot offer, and its autoscaler says that no nodes it may "
                    "start could: ask for fewer workers or resources, or give the cluster larger or more worker nodes "
                    "(available_node_types, max_workers)"
                )
            missing = f"{demand}; free now: {in_words(ray.available_resources())} of {hosts_in_words(cluster_hosts())}"
            if waiting.is_over:
                raise ResourcesError(
                    f"{missing}: not free within start_timeout_s={timeout_s:g}. Ask for fewer workers or resources, "
                    "end what holds them, or wait longer"
                )
            if is_line_due:
                waiting.say(f"{missing}; {hope(demand, scaler)}")
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _group(demand: Demand) -> PlacementGroup:
    selector = demand.workers.label_selector
    options = {"bundle_label_selector": [dict(selector) for _ in demand.bundles]} if selector else {}
    try:
        return placement_group(demand.bundles, strategy=demand.strategy, **options)
    except ValueError as error:
        raise ConfigError(f"Ray does not take resources_per_worker or label_selector as they are: {error}") from error


def hope(demand: Demand, scaler: ray_core.Autoscaling | None) -> str:
    """Whence the missing may come."""
    if demand.fits(cluster_hosts()):
        return "others hold the rest"
    if scaler is None:
        return "the cluster has lost what it had"
    if not scaler.starting:
        return "the autoscaler has been asked for more nodes"
    return "the autoscaler starts " + ", ".join(f"{count} {name}" for name, count in scaler.starting.items())


def cluster_hosts() -> list[Host]:
    """The cluster's hosts with all they have, less what this very task or actor holds while it waits."""
    own_id, own = _own()
    hosts = []
    for node in ray.nodes():
        if node["Alive"]:
            taken = own if node["NodeID"] == own_id else {}
            resources = {name: amount - taken.get(name, 0.0) for name, amount in node["Resources"].items()}
            hosts.append(Host(resources=resources, labels=node["Labels"]))
    return hosts


def _own() -> tuple[str, Resources]:
    """Where this process is and, in a task or an actor, what that holds."""
    context = ray.get_runtime_context()
    return context.get_node_id(), dict(context.get_assigned_resources()) if cluster.is_in_worker() else {}


def _note_on_own() -> str:
    held = in_words(_own()[1])
    if held == "nothing":
        return ""
    return f" The task or actor that waits for them holds {held} itself, which its num_cpus=0 would leave to them."


def hosts_in_words(hosts: list[Host], *, is_with_memory: bool = False) -> str:
    total: Resources = {}
    for host in hosts:
        for name, amount in host.resources.items():
            total[name] = total.get(name, 0.0) + amount
    return f"{len(hosts)} host{'s' if len(hosts) > 1 else ''} with {in_words(total, is_with_memory=is_with_memory)}"


def _offer(demand: Demand, hosts: list[Host]) -> str:
    return hosts_in_words(hosts, is_with_memory=demand.each.get("memory", 0.0) > 1)


def _are(workers: Workers) -> str:
    return "is" if workers.num_workers == 1 else "are"
