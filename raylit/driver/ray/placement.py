"""Resources of the workers in the cluster: the request, the wait for capacity, and the placement group. Driver."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylit.compat import ray_core
from raylit.compat.ray_core import select_plain_resources
from raylit.config import Workers
from raylit.driver.ray import local_cluster
from raylit.errors import ConfigError, ResourcesError

_FIRST_LINE_S = 2.0
_BETWEEN_LINES_S = 10.0
_SLICE_S = 0.5


class CapacityWait:
    """Wait for capacity of the cluster, with a timeout and lines that say what is missing."""

    def __init__(self, *, timeout_s: float, first_line_s: float = _FIRST_LINE_S) -> None:
        self.timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._started_at = time.strftime("%H:%M:%S")
        self._next_line_s = first_line_s

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def slice_s(self) -> float:
        """Time to wait before the next check."""
        return max(0.01, min(_SLICE_S, self.timeout_s - self.waited_s))

    @property
    def is_over(self) -> bool:
        return self.waited_s >= self.timeout_s

    @property
    def is_line_due(self) -> bool:
        return self.waited_s >= self._next_line_s

    def say(self, missing: str) -> None:
        """Print a whole line on stderr, above a progress bar."""
        self._next_line_s = self.waited_s + _BETWEEN_LINES_S
        text = f"raylit: waiting since {self._started_at} ({self.waited_s:.0f} s) for {missing}\n"
        sys.stderr.write(text)
        sys.stderr.flush()


Resources = dict[str, float]
"""Amounts by Ray's resource names."""

_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Resources of a host, total or free, and its labels."""

    resources: Resources
    labels: dict[str, str]
    node_id: str = ""
    """Ray's id of the node, in hex; empty for a host that is not there yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceRequest:
    """Request for `workers`, with the resources `each` for every one of them."""

    workers: Workers
    each: Resources

    @property
    def bundles(self) -> list[Resources]:
        """Bundles, one per worker, or one per host if every host takes a fixed number of workers."""
        num_bundles = self.workers.num_nodes or self.workers.num_workers
        share = self.workers.num_workers // num_bundles
        # Ray counts in steps of 1/10000: 3 * 0.1 must not become more than 0.3.
        return [{name: round(amount * share, 4) for name, amount in self.each.items()} for _ in range(num_bundles)]

    @property
    def bundle_of_worker(self) -> list[int]:
        share = self.workers.num_workers // len(self.bundles)
        return [index // share for index in range(self.workers.num_workers)]

    @property
    def strategy(self) -> str:
        return "STRICT_SPREAD" if self.workers.num_nodes else self.workers.placement

    def fits(self, hosts: Sequence[Host]) -> bool:
        return self.num_fitting(hosts) >= self.workers.num_workers

    def num_fitting(self, hosts: Sequence[Host]) -> int:
        """Return how many such workers the hosts can have at most under this placement."""
        slots = sorted(
            (num_slots(host.resources, self.each) for host in hosts if self.is_allowed_on(host)), reverse=True
        )
        num_nodes = self.workers.num_nodes
        if num_nodes:
            return slots[num_nodes - 1] * num_nodes if len(slots) >= num_nodes else 0
        if self.workers.placement == "STRICT_PACK":
            return max(slots, default=0)
        if self.workers.placement == "STRICT_SPREAD":
            return sum(count > 0 for count in slots)
        return sum(slots)

    def is_allowed_on(self, host: Host) -> bool:
        """Return True if the host's labels match label_selector."""
        return all(_meets_condition(host.labels.get(key), value) for key, value in self.workers.label_selector.items())

    def __str__(self) -> str:
        num_workers, num_nodes = self.workers.num_workers, self.workers.num_nodes
        each = format_resources(self.each, is_with_memory=True)
        text = f"{_format_count(num_workers, 'worker')} of {each} each"
        if num_nodes:
            text = f"{_format_count(num_workers // num_nodes, 'worker')} of {each} each on each of {num_nodes} hosts"
        elif self.workers.placement == "STRICT_PACK":
            text += " on one host"
        elif self.workers.placement == "STRICT_SPREAD":
            text += f" on {num_workers} different hosts"
        if self.workers.label_selector:
            text += f" with the labels {self.workers.label_selector}"
        return text


def num_slots(resources: Resources, each: Resources) -> int:
    """Return how many times `each` fits into `resources`."""
    return min(math.floor((resources.get(name, 0.0) + _TOLERANCE) / amount) for name, amount in each.items())


def format_resources(resources: Resources, *, is_with_memory: bool = False) -> str:
    """Format amounts by name, CPU and GPU first, without Ray's internal ones.

    Internal ones are those of placement groups and the like. Ray itself lists resources in no fixed order.
    """
    named = select_plain_resources(resources)
    ordered = sorted(named, key=lambda name: (name != "CPU", name != "GPU", name))
    words = [f"{round(named[name], 4):g} {name}" for name in ordered if named[name] > 0]
    if is_with_memory and resources.get("memory", 0.0) > 1:
        words.append(f"{format_gigabytes(resources['memory'])} of memory")
    return ", ".join(words) or "nothing"


def format_gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _meets_condition(label: str | None, condition: str) -> bool:
    """Evaluate one of Ray's label conditions: `a`, `!a`, `in(a, b)` or `!in(a, b)`.

    A host without the label meets the negative ones.
    """
    wanted = condition.removeprefix("!")
    allowed = [wanted]
    if wanted.startswith("in(") and wanted.endswith(")"):
        allowed = [value.strip() for value in wanted[3:-1].split(",")]
    return (label in allowed) != condition.startswith("!")


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def choose_bundles(request: ResourceRequest, group: PlacementGroup) -> list[tuple[int, Resources]]:
    """Choose for each worker a bundle of an existing placement group, by index, and what it requests there.

    If the bundles are too small next to what this process holds itself, its workers use its CPUs as well, as it only
    waits for them.

    Raises:
        ResourcesError: The group does not have enough, or it did not become free in time.
    """
    bundles = dict(enumerate(dict(bundle) for bundle in group.bundle_specs))
    hosts = _read_bundle_hosts(group)
    own = ray.get_runtime_context().get_assigned_resources()
    home = _find_home_bundle(own, bundles)
    rest = _add_resources(bundles, home, {name: -amount for name, amount in own.items()})
    lent = {"CPU": own.get("CPU", 0.0)} if _assign_bundles(request, rest, hosts) is None else {}
    if _assign_bundles(request, _add_resources(rest, home, lent), hosts) is None:
        raise ResourcesError(_describe_too_small(request, bundles, own))
    capacity_wait = CapacityWait(timeout_s=request.workers.start_timeout_s)
    while True:
        free = ray_core.read_free_in_group(group.id.hex())
        chosen = _assign_bundles(request, _add_resources(free, home, lent), hosts)
        if chosen is not None:
            return [
                (index, _remaining_request(request, lent if index == home else {}, chosen.count(index)))
                for index in chosen
            ]
        missing = f"{request} in the placement group that this runs in; free there: {_format_bundles(free)}"
        if capacity_wait.is_over:
            raise ResourcesError(
                f"{missing}: not free within start_timeout_s={request.workers.start_timeout_s:g}. End what holds it, "
                "or make the group larger"
            )
        if capacity_wait.is_line_due:
            capacity_wait.say(f"{missing}; others hold the rest")
        time.sleep(min(0.1, capacity_wait.slice_s))


def _assign_bundles(
    request: ResourceRequest, bundles: dict[int, Resources], hosts: dict[int, tuple[str, Host]]
) -> list[int] | None:
    """Choose a bundle for each worker; the first one comes last, as by convention it is the trial's own."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for index in sorted(bundles, key=lambda index: (index == 0, index)):
        host_id, host = hosts[index]
        if request.is_allowed_on(host):
            by_host[host_id] += [index] * num_slots(bundles[index], request.each)
    num_workers, num_nodes = request.workers.num_workers, request.workers.num_nodes
    if not num_nodes:
        slots = sorted((index for slots in by_host.values() for index in slots), key=lambda index: (index == 0, index))
        return slots[:num_workers] if len(slots) >= num_workers else None
    share = num_workers // num_nodes
    large = [slots[:share] for slots in by_host.values() if len(slots) >= share]
    return [index for slots in large[:num_nodes] for index in slots] if len(large) >= num_nodes else None


def _read_bundle_hosts(group: PlacementGroup) -> dict[int, tuple[str, Host]]:
    labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    node_ids: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return {index: (node, Host(resources={}, labels=labels.get(node, {}))) for index, node in node_ids.items()}


def _find_home_bundle(own: Resources, bundles: dict[int, Resources]) -> int:
    """Return the bundle that this task or actor uses: Ray takes the first with enough resources unless it names one."""
    needed = {name: amount for name, amount in own.items() if amount > 0}
    return next((index for index, bundle in bundles.items() if needed and num_slots(bundle, needed)), 0)


def _add_resources(bundles: dict[int, Resources], home: int, more: Resources) -> dict[int, Resources]:
    """Return the bundles with `more` added to one of them."""
    at_home = dict(bundles.get(home, {}))
    for name, amount in more.items():
        at_home[name] = at_home.get(name, 0.0) + amount
    return {**bundles, home: at_home}


def _remaining_request(request: ResourceRequest, lent: Resources, num_workers: int) -> Resources:
    """Return what Ray must give each of `num_workers` workers in a bundle that share `lent` resources."""
    missing = {name: amount - lent.get(name, 0.0) / num_workers for name, amount in request.each.items()}
    return {name: round(amount, 4) for name, amount in missing.items() if amount >= 0.0001}


def _describe_too_small(request: ResourceRequest, bundles: dict[int, Resources], own: Resources) -> str:
    head = {name: amount for name, amount in own.items() if amount > 0} or {"CPU": 1.0}
    head_text, bundle_text = _format_bundle(head), _format_bundle(request.bundles[0])
    needed = f"PlacementGroupFactory([{head_text}] + [{bundle_text}] * {len(request.bundles)})"
    return (
        f"{request} are asked for inside a placement group of {_format_bundles(bundles)}, of which this task, "
        f"actor or trial holds {format_resources(own)} itself: that is too small. Give it a bundle for each worker (in "
        f"Tune: tune.with_resources(trainable, tune.{needed})) or more CPUs of its own, which its workers use then "
        "(Train's ScalingConfig(resources_per_worker=...)), or ask for fewer workers or resources"
    )


def _format_bundles(bundles: dict[int, Resources]) -> str:
    return "[" + ", ".join(f"{{{format_resources(bundle)}}}" for _, bundle in sorted(bundles.items())) + "]"


def _format_bundle(resources: Resources) -> str:
    return "{" + ", ".join(f'"{name}": {amount:g}' for name, amount in resources.items()) + "}"


_MIN_WORKER_BYTES = 200_000_000
"""Memory of a process that has imported torch and Ray, without shared pages: measured 190 MB on Linux."""
_UNKNOWN_BYTES = 1e18
"""Memory assumed for a host that does not report it."""
_INFEASIBLE_S = 10.0
"""Time after which an autoscaler's word that none of its nodes can serve the request is final: it checks every 5 s."""
_AUTOSCALER_ADVICE = (
    "ask for fewer workers or resources, or let the autoscaler start more or larger nodes (available_node_types, "
    "max_workers)"
)


class Placement:
    """Bundles of the workers, in a placement group of their own or in the one this process runs in."""

    is_in_rank_order = False
    """True if the workers' indices are their ranks; otherwise ranks follow from where the actors run."""

    def __init__(self, workers: Workers, *, free_resources: Callable[[], bool] = lambda: False) -> None:
        """Reserve the workers' resources.

        Args:
            workers: Number, resources and placement of the workers.
            free_resources: Ends something of this process's own that holds resources; returns False if there is
                nothing.

        Raises:
            ResourcesError: The cluster does not have the resources, or did not offer them in time.
        """
        self._accelerator = workers.accelerator
        current = ray.util.get_current_placement_group()
        self._is_own = current is None
        if current is not None:
            self._group = current
            self._bundles = choose_bundles(
                ResourceRequest(workers=workers, each=resources_per_worker(workers, cpu=1.0)), current
            )
        else:
            request = _build_request(workers)
            self._group = create_placement_group(request, free_resources=free_resources)
            self._bundles = [(bundle, request.each) for bundle in request.bundle_of_worker]

    def options(self, index: int) -> dict[str, Any]:
        """Return Ray's options for the actor of this worker."""
        bundle, each = self._bundles[index]
        return build_actor_options(each, group=self._group, bundle=bundle)

    def variables(self, index: int) -> dict[str, str]:
        """Return the environment variables with which the process of this worker starts."""
        return dict(self._accelerator.process_variables(None))

    @property
    def resources(self) -> Resources:
        """Resources that a worker takes from the cluster; none in an existing placement group."""
        return self._bundles[0][1] if self._is_own else {}

    def is_reusable(self) -> bool:
        """Return True if this process is in the same placement group as before.

        Ray runs tasks of several placement groups in one process, one after the other.
        """
        current = ray.util.get_current_placement_group()
        return current is None if self._is_own else current is not None and current.id == self._group.id

    def remove(self) -> None:
        """Remove the placement group; an existing one is left alone."""
        if self._is_own:
            remove_placement_group(self._group)


def build_actor_options(each: Resources, *, group: PlacementGroup, bundle: int) -> dict[str, Any]:
    """Return Ray's options for an actor with the resources `each` in a bundle of a placement group."""
    option_names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    return {
        "num_cpus": 0,
        **{option_names[name]: amount for name, amount in each.items() if name in option_names},
        "resources": {name: amount for name, amount in each.items() if name not in option_names},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        ),
    }


def _build_request(workers: Workers) -> ResourceRequest:
    """Build the workers' resource request. ResourcesError: the cluster can never meet it."""
    hosts = read_hosts()
    # On the embedded node a small share leaves some next to pooled workers that wait for their next run.
    cpu = 0.01 if local_cluster.is_embedded() else 1.0
    # A task or actor only waits for its workers: they use its CPUs, or tasks that fill a cluster would wait for each
    # other.
    lent = _read_own_resources()[1].get("CPU", 0.0) / workers.num_workers
    request = ResourceRequest(workers=workers, each=resources_per_worker(workers, cpu=max(0.0, round(cpu - lent, 4))))
    if request.fits(hosts):
        check_memory(request, hosts)
        return request
    if ray_core.read_autoscaling() is not None:
        return request
    # More processes than cores are allowed: they share the cores.
    cpu = 0.5
    while "CPU" not in workers.resources_per_worker and cpu >= 0.001:
        shared = ResourceRequest(workers=workers, each=resources_per_worker(workers, cpu=math.floor(cpu * 1000) / 1000))
        if shared.fits(hosts):
            check_memory(shared, hosts)
            return shared
        cpu /= 2
    raise ResourcesError(
        f"{request} {_is_or_are(workers)} asked for, which this cluster of {_format_offer(request, hosts)} can never "
        f"offer, and no autoscaler adds to it.{_describe_own_resources()} Ask for fewer workers or resources "
        "(num_workers, resources_per_worker, num_nodes, placement, label_selector), or connect to a larger cluster "
        "(RAY_ADDRESS)"
    )


def check_memory(request: ResourceRequest, hosts: list[Host]) -> None:
    """Check the memory for workers whose request names none, which Ray does not count.

    Raises:
        ResourcesError: So many workers would exhaust the memory before they train.
    """
    if "memory" in request.workers.resources_per_worker or ray_core.read_autoscaling() is not None:
        return
    counted = replace(request, each={**request.each, "memory": float(_MIN_WORKER_BYTES)})
    hosts = [replace(host, resources={"memory": _UNKNOWN_BYTES, **host.resources}) for host in hosts]
    num_fitting, num_workers = counted.num_fitting(hosts), request.workers.num_workers
    if num_fitting < num_workers:
        raise ResourcesError(
            f"num_workers={num_workers}: there is memory for {num_fitting} such workers: a worker takes "
            f"{format_gigabytes(_MIN_WORKER_BYTES)} before it holds a model or data, and this cluster of "
            f"{_format_offer(counted, hosts)} has no more. Ask for fewer workers; or say what a worker of yours needs, "
            "which counts instead: resources_per_worker={'memory': BYTES}, 0 for as many as you say"
        )


def resources_per_worker(workers: Workers, *, cpu: float) -> Resources:
    """Return a worker's request: what the user names, and the defaults for what is not named."""
    each = {"CPU": cpu, **workers.accelerator.resources, **workers.resources_per_worker}
    # Ray has no empty bundles, and counts memory in bytes.
    return {name: float(amount) for name, amount in each.items() if amount} or {"memory": 1.0}


def create_placement_group(
    request: ResourceRequest, *, free_resources: Callable[[], bool] = lambda: False
) -> PlacementGroup:
    """Create a placement group and wait until it is placed; on an error its request is withdrawn.

    Raises:
        ResourcesError: No node that the autoscaler may start can serve it, or it was not placed in time.
    """
    will_fit = _check_autoscaler_limits(request)
    group = _create_group(request)
    timeout_s = request.workers.start_timeout_s
    capacity_wait = CapacityWait(timeout_s=timeout_s)
    infeasible_since_s: float | None = None
    try:
        # In slices, as Ray's wait does not notice Ctrl-C; of a second, as Ray truncates fractions (2.60).
        while not group.wait(1):
            if free_resources():
                continue
            is_line_due = capacity_wait.is_line_due
            scaler, hosts = ray_core.read_autoscaling(), read_hosts()
            is_infeasible = scaler is not None and group.id.hex() in scaler.infeasible_groups
            # The autoscaler counts what is free now: what others hold may make it infeasible only for a while.
            if not is_infeasible or will_fit or request.fits(hosts) or _is_anything_in_use(request, group, hosts):
                infeasible_since_s = None
            elif infeasible_since_s is None:
                infeasible_since_s = capacity_wait.waited_s
            elif capacity_wait.waited_s - infeasible_since_s >= _INFEASIBLE_S:
                raise ResourcesError(
                    f"{request} {_is_or_are(request.workers)} asked for, which this cluster of {format_hosts(hosts)} "
                    "cannot offer, and its autoscaler says that no nodes it may start could: "
                    f"{_AUTOSCALER_ADVICE}"
                )
            missing = f"{request}; free now: {format_resources(ray.available_resources())} of {format_hosts(hosts)}"
            pending = describe_pending_capacity(request, scaler, is_infeasible=is_infeasible)
            if capacity_wait.is_over:
                raise ResourcesError(
                    f"{missing}; {pending}: not placed within start_timeout_s={timeout_s:g}. Ask for fewer workers or "
                    "resources, end what holds them, or wait longer"
                )
            if is_line_due:
                capacity_wait.say(f"{missing}; {pending}")
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _check_autoscaler_limits(request: ResourceRequest) -> bool:
    """Check a request that does not fit the cluster of now against all nodes that its autoscaler may start.

    Returns:
        True if it will fit some time; False if that is unknown, or does not depend on an autoscaler.

    Raises:
        ResourcesError: It never will.
    """
    hosts = read_hosts()
    if request.fits(hosts) or ray_core.read_autoscaling() is None:
        return False
    limits = ray_core.read_autoscaler_limits()
    if limits is None:
        return False
    largest = list_hosts_at_most(request, limits, [host for host in hosts if host.node_id not in limits.node_ids])
    if request.fits(largest):
        return True
    types = [kind for kind in limits.node_types if kind.max_count]
    nodes = ", ".join(f"{kind.max_count} {kind.name} of {format_resources(kind.resources)}" for kind in types)
    if sum(kind.max_count for kind in types) > limits.max_nodes:
        nodes += f", but {limits.max_nodes} in all"
    raise ResourcesError(
        f"{request} {_is_or_are(request.workers)} asked for, which this cluster of {format_hosts(hosts)} can never "
        f"offer: with the nodes that its autoscaler may start at most ({nodes or 'none'}) "
        f"there is room for {request.num_fitting(largest)} such workers, on {_format_offer(request, largest)}: "
        f"{_AUTOSCALER_ADVICE}"
    )


def list_hosts_at_most(
    request: ResourceRequest, limits: ray_core.AutoscalerLimits, other_hosts: Sequence[Host]
) -> list[Host]:
    """List the hosts that the cluster can have at most: `other_hosts`, and those that its autoscaler may start.

    If the limit of all types together is below the sum of theirs, the types that serve the request best come first.
    """
    startable = [
        Host(resources=kind.resources, labels=kind.labels) for kind in limits.node_types for _ in range(kind.max_count)
    ]
    startable.sort(
        key=lambda host: (request.is_allowed_on(host), num_slots(host.resources, request.each)), reverse=True
    )
    return [*other_hosts, *startable[: limits.max_nodes]]


def _is_anything_in_use(request: ResourceRequest, group: PlacementGroup, hosts: Sequence[Host]) -> bool:
    """Return True if others hold resources of the kinds that the request names, or wait for some as well."""
    free = ray.available_resources()
    is_held = any(
        sum(host.resources.get(name, 0.0) for host in hosts) > free.get(name, 0.0) + _TOLERANCE for name in request.each
    )
    return is_held or bool(ray_core.list_pending_groups() - {group.id.hex()})


def _create_group(request: ResourceRequest) -> PlacementGroup:
    selector = request.workers.label_selector
    options = {"bundle_label_selector": [dict(selector) for _ in request.bundles]} if selector else {}
    try:
        return placement_group(request.bundles, strategy=request.strategy, **options)
    except ValueError as error:
        raise ConfigError(f"Ray does not take resources_per_worker or label_selector as they are: {error}") from error


def describe_pending_capacity(
    request: ResourceRequest, scaler: ray_core.Autoscaling | None, *, is_infeasible: bool = False
) -> str:
    """Describe where the missing resources may come from.

    Args:
        request: What waits.
        scaler: State of the cluster's autoscaler, or None without one.
        is_infeasible: True if the autoscaler says that what is free and what it may still start are too little.
    """
    if request.fits(read_hosts()):
        return "others hold the rest"
    if scaler is None:
        return "the cluster has lost what it had"
    if scaler.starting:
        return "the autoscaler starts " + ", ".join(f"{count} {name}" for name, count in scaler.starting.items())
    if is_infeasible:
        return "the autoscaler says that this and the nodes it may still start are too few"
    return "the autoscaler has been asked for more nodes"


def read_hosts() -> list[Host]:
    """Return the cluster's hosts with their total resources, less what this task or actor holds while it waits."""
    own_id, own = _read_own_resources()
    hosts = []
    for node in ray.nodes():
        if node["Alive"]:
            used = own if node["NodeID"] == own_id else {}
            resources = {name: amount - used.get(name, 0.0) for name, amount in node["Resources"].items()}
            hosts.append(Host(resources=resources, labels=node["Labels"], node_id=node["NodeID"]))
    return hosts


def _read_own_resources() -> tuple[str, Resources]:
    """Return this process's node and, in a task or an actor, the resources it holds."""
    context = ray.get_runtime_context()
    return context.get_node_id(), dict(context.get_assigned_resources()) if local_cluster.is_in_worker() else {}


def _describe_own_resources() -> str:
    own_resources = format_resources(_read_own_resources()[1])
    if own_resources == "nothing":
        return ""
    return (
        f" The task or actor that waits for them holds {own_resources} itself, which its num_cpus=0 would leave to "
        "them."
    )


def format_hosts(hosts: list[Host], *, is_with_memory: bool = False) -> str:
    total: Resources = {}
    for host in hosts:
        for name, amount in host.resources.items():
            total[name] = total.get(name, 0.0) + amount
    plural = "s" if len(hosts) > 1 else ""
    return f"{len(hosts)} host{plural} with {format_resources(total, is_with_memory=is_with_memory)}"


def _format_offer(request: ResourceRequest, hosts: list[Host]) -> str:
    return format_hosts(hosts, is_with_memory=request.each.get("memory", 0.0) > 1)


def _is_or_are(workers: Workers) -> str:
    return "is" if workers.num_workers == 1 else "are"
