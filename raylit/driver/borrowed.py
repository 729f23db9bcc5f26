"""Bundles of the placement group that this process runs in: inside a task, an actor or a Tune trial. Driver."""

import time
from collections import defaultdict

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from raylit.compat import ray_core
from raylit.driver.demand import Demand, Host, Resources, in_words, num_slots
from raylit.driver.waiting import Waiting
from raylit.errors import ResourcesError


def bundles_for(demand: Demand, group: PlacementGroup) -> list[tuple[int, Resources]]:
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
    waiting = Waiting(timeout_s=demand.workers.start_timeout_s)
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


def _chosen(demand: Demand, bundles: dict[int, Resources], hosts: dict[int, tuple[str, Host]]) -> list[int] | None:
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


def _asked(demand: Demand, lent: Resources, num_workers: int) -> Resources:
    """What Ray has to give to each of so many workers in a bundle, where they share what is lent to them."""
    missing = {name: amount - lent.get(name, 0.0) / num_workers for name, amount in demand.each.items()}
    return {name: round(amount, 4) for name, amount in missing.items() if amount >= 0.0001}


def _too_small(demand: Demand, specs: dict[int, Resources], own: Resources) -> str:
    head = {name: amount for name, amount in own.items() if amount > 0} or {"CPU": 1.0}
    needed = f"PlacementGroupFactory([{_short(head)}] + [{_short(demand.bundles[0])}] * {len(demand.bundles)})"
    return (
        f"{demand} are asked for inside a placement group of {_listed(specs)}, of which this task, actor or trial "
        f"holds {in_words(own)} itself: that is too small. Give it a bundle for each worker (in Tune: "
        f"tune.with_resources(trainable, tune.{needed})) or more CPUs of its own, which its workers use then (Train's "
        "ScalingConfig(resources_per_worker=...)), or ask for fewer workers or resources"
    )


def _listed(bundles: dict[int, Resources]) -> str:
    return "[" + ", ".join(f"{{{in_words(bundle)}}}" for _, bundle in sorted(bundles.items())) + "]"


def _short(resources: Resources) -> str:
    return "{" + ", ".join(f'"{name}": {amount:g}' for name, amount in resources.items()) + "}"
