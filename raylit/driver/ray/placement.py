"""The placement group of a run: created, or the one that the calling task, actor or trial has."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylit.compat import ray_core
from raylit.config.plan import Workers
from raylit.driver.ray import local_cluster
from raylit.driver.ray.resource_request import (
    CapacityWait,
    Host,
    ResourceRequest,
    Resources,
    format_gigabytes,
    format_resources,
    num_slots,
)
from raylit.errors import ConfigError, ResourcesError


def bundles_for(demand: ResourceRequest, group: PlacementGroup) -> list[tuple[int, Resources]]:
    """For each worker the index of a bundle with room for it, and what it asks for there.

    Where the bundles are too small beside what this process holds itself, its workers use its CPUs as well: it only
    waits for them. ResourcesError: there is not enough, or not in time.
    """
    specs = dict(enumerate(dict(bundle) for bundle in group.bundle_specs))
    hosts = _hosts_of_bundles(group)
    own = ray.get_runtime_context().get_assigned_resources()
    home = _home(own, specs)
    rest = _with(specs, home, {name: -amount for name, amount in own.items()})
    lent = {"CPU": own.get("CPU", 0.0)} if _chosen(demand, rest, hosts) is None else {}
    if _chosen(demand, _with(rest, home, lent), hosts) is None:
        raise ResourcesError(_too_small(demand, specs, own))
    waiting = CapacityWait(timeout_s=demand.workers.start_timeout_s)
    while True:
        free = ray_core.read_free_in_group(group.id.hex())
        chosen = _chosen(demand, _with(free, home, lent), hosts)
        if chosen is not None:
            return [(index, _asked(demand, lent if index == home else {}, chosen.count(index))) for index in chosen]
        missing = f"{demand} in the placement group that this runs in; free there: {_listed(free)}"
        if waiting.is_over:
            raise ResourcesError(
                f"{missing}: not free within start_timeout_s={demand.workers.start_timeout_s:g}. End what holds it, or "
                "make the group larger"
            )
        if waiting.is_line_due:
            waiting.say(f"{missing}; others hold the rest")
        time.sleep(min(0.1, waiting.slice_s))


def _chosen(
    demand: ResourceRequest, bundles: dict[int, Resources], hosts: dict[int, tuple[str, Host]]
) -> list[int] | None:
    """A bundle for each worker; the first bundle comes last, as it is by custom that of the trial itself."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for index in sorted(bundles, key=lambda index: (index == 0, index)):
        host_id, host = hosts[index]
        if demand.is_allowed_on(host):
            by_host[host_id] += [index] * num_slots(bundles[index], demand.each)
    wanted, num_nodes = demand.workers.num_workers, demand.workers.num_nodes
    if not num_nodes:
        slots = sorted((index for slots in by_host.values() for index in slots), key=lambda index: (index == 0, index))
        return slots[:wanted] if len(slots) >= wanted else None
    share = wanted // num_nodes
    large = [slots[:share] for slots in by_host.values() if len(slots) >= share]
    return [index for slots in large[:num_nodes] for index in slots] if len(large) >= num_nodes else None


def _hosts_of_bundles(group: PlacementGroup) -> dict[int, tuple[str, Host]]:
    labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    places: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return {index: (node, Host(resources={}, labels=labels.get(node, {}))) for index, node in places.items()}


def _home(own: Resources, specs: dict[int, Resources]) -> int:
    """The bundle that this task or actor takes from: Ray takes the first with room unless told otherwise."""
    needed = {name: amount for name, amount in own.items() if amount > 0}
    return next((index for index, bundle in specs.items() if needed and num_slots(bundle, needed)), 0)


def _with(bundles: dict[int, Resources], home: int, more: Resources) -> dict[int, Resources]:
    """The bundles, `more` being added to one of them."""
    at_home = dict(bundles.get(home, {}))
    for name, amount in more.items():
        at_home[name] = at_home.get(name, 0.0) + amount
    return {**bundles, home: at_home}


def _asked(demand: ResourceRequest, lent: Resources, num_workers: int) -> Resources:
    """What Ray has to give to each of so many workers in a bundle, where they share what is lent to them."""
    missing = {name: amount - lent.get(name, 0.0) / num_workers for name, amount in demand.each.items()}
    return {name: round(amount, 4) for name, amount in missing.items() if amount >= 0.0001}


def _too_small(demand: ResourceRequest, specs: dict[int, Resources], own: Resources) -> str:
    head = {name: amount for name, amount in own.items() if amount > 0} or {"CPU": 1.0}
    needed = f"PlacementGroupFactory([{_short(head)}] + [{_short(demand.bundles[0])}] * {len(demand.bundles)})"
    return (
        f"{demand} are asked for inside a placement group of {_listed(specs)}, of which this task, actor or trial "
        f"holds {format_resources(own)} itself: that is too small. Give it a bundle for each worker (in Tune: "
        f"tune.with_resources(trainable, tune.{needed})) or more CPUs of its own, which its workers use then (Train's "
        "ScalingConfig(resources_per_worker=...)), or ask for fewer workers or resources"
    )


def _listed(bundles: dict[int, Resources]) -> str:
    return "[" + ", ".join(f"{{{format_resources(bundle)}}}" for _, bundle in sorted(bundles.items())) + "]"


def _short(resources: Resources) -> str:
    return "{" + ", ".join(f'"{name}": {amount:g}' for name, amount in resources.items()) + "}"


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
            self._places = bundles_for(
                ResourceRequest(workers=workers, each=resources_per_worker(workers, cpu=1.0)), current
            )
        else:
            demand = _demand(workers)
            self._group = create_placement_group(demand, make_room=make_room)
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

    def is_reusable(self) -> bool:
        """The process still stands where it stood: a process of Ray's runs tasks of several groups, one by one."""
        current = ray.util.get_current_placement_group()
        return current is None if self._is_own else current is not None and current.id == self._group.id

    def remove(self) -> None:
        """Give the room back; a group that was there before is left alone."""
        if self._is_own:
            remove_placement_group(self._group)


def _demand(workers: Workers) -> ResourceRequest:
    """What the workers ask for. ResourcesError: nothing can meet it."""
    hosts = cluster_hosts()
    # On the node that is ours alone, a small share leaves room beside warm workers that wait for their next run.
    cpu = 0.01 if local_cluster.is_embedded() else 1.0
    # A task or actor only waits for its workers: they use what it holds, or tasks that fill a cluster would wait for
    # each other.
    lent = _own()[1].get("CPU", 0.0) / workers.num_workers
    demand = ResourceRequest(workers=workers, each=resources_per_worker(workers, cpu=max(0.0, round(cpu - lent, 4))))
    if demand.fits(hosts):
        check_memory(demand, hosts)
        return demand
    if ray_core.read_autoscaling() is not None:
        return demand
    # More processes than cores are allowed: they share.
    cpu = 0.5
    while "CPU" not in workers.resources_per_worker and cpu >= 0.001:
        shared = ResourceRequest(workers=workers, each=resources_per_worker(workers, cpu=math.floor(cpu * 1000) / 1000))
        if shared.fits(hosts):
            check_memory(shared, hosts)
            return shared
        cpu /= 2
    raise ResourcesError(
        f"{demand} {_are(workers)} asked for, which this cluster of {_offer(demand, hosts)} can never offer, and no "
        f"autoscaler adds to it.{_note_on_own()} Ask for fewer workers or resources (num_workers, "
        "resources_per_worker, num_nodes, placement, label_selector), or connect to a larger cluster (RAY_ADDRESS)"
    )


def check_memory(demand: ResourceRequest, hosts: list[Host]) -> None:
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
            f"{format_gigabytes(_LEAST_WORKER_BYTES)} before it holds a model or data, and this cluster of "
            f"{_offer(counted, hosts)} has no more. Ask for fewer workers; or say what a worker of yours needs, which "
            "counts instead: resources_per_worker={'memory': BYTES}, 0 for as many as you say"
        )


def resources_per_worker(workers: Workers, *, cpu: float) -> Resources:
    """What a worker asks for: what is named, and what every worker needs where it is not named."""
    each = {"CPU": cpu, **workers.accelerator.resources, **workers.resources_per_worker}
    # Ray has no bundles of nothing, and counts memory in bytes.
    return {name: float(amount) for name, amount in each.items() if amount} or {"memory": 1.0}


def create_placement_group(demand: ResourceRequest, *, make_room: Callable[[], bool] = lambda: False) -> PlacementGroup:
    """A group that is there. Whatever ends the wait early leaves no demand behind."""
    group = _group(demand)
    timeout_s = demand.workers.start_timeout_s
    waiting = CapacityWait(timeout_s=timeout_s)
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
                    f"{format_hosts(cluster_hosts())} cannot offer, and its autoscaler says that no nodes it may "
                    "start could: ask for fewer workers or resources, or give the cluster larger or more worker nodes "
                    "(available_node_types, max_workers)"
                )
            missing = (
                f"{demand}; free now: {format_resources(ray.available_resources())} of {format_hosts(cluster_hosts())}"
            )
            if waiting.is_over:
                raise ResourcesError(
                    f"{missing}: not free within start_timeout_s={timeout_s:g}. Ask for fewer workers or resources, "
                    "end what holds them, or wait longer"
                )
            if is_line_due:
                waiting.say(f"{missing}; {describe_pending_capacity(demand, scaler)}")
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _group(demand: ResourceRequest) -> PlacementGroup:
    selector = demand.workers.label_selector
    options = {"bundle_label_selector": [dict(selector) for _ in demand.bundles]} if selector else {}
    try:
        return placement_group(demand.bundles, strategy=demand.strategy, **options)
    except ValueError as error:
        raise ConfigError(f"Ray does not take resources_per_worker or label_selector as they are: {error}") from error


def describe_pending_capacity(demand: ResourceRequest, scaler: ray_core.Autoscaling | None) -> str:
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
    return context.get_node_id(), dict(context.get_assigned_resources()) if local_cluster.is_in_worker() else {}


def _note_on_own() -> str:
    held = format_resources(_own()[1])
    if held == "nothing":
        return ""
    return f" The task or actor that waits for them holds {held} itself, which its num_cpus=0 would leave to them."


def format_hosts(hosts: list[Host], *, is_with_memory: bool = False) -> str:
    total: Resources = {}
    for host in hosts:
        for name, amount in host.resources.items():
            total[name] = total.get(name, 0.0) + amount
    plural = "s" if len(hosts) > 1 else ""
    return f"{len(hosts)} host{plural} with {format_resources(total, is_with_memory=is_with_memory)}"


def _offer(demand: ResourceRequest, hosts: list[Host]) -> str:
    return format_hosts(hosts, is_with_memory=demand.each.get("memory", 0.0) > 1)


def _are(workers: Workers) -> str:
    return "is" if workers.num_workers == 1 else "are"
