"""Slices of TPU hosts: what the cluster has, their reservation, and the ranks on them. Driver."""

import pathlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.tpu import SlicePlacementGroup, get_tpu_coordinator_env_vars, slice_placement_group

from raylit.accelerators.tpu_slices import TPUHost, TPUInventory, TPUPlace, TPUSlices
from raylit.compat import ray_core
from raylit.config import Workers
from raylit.driver.ray import local_cluster
from raylit.driver.ray.placement import (
    CapacityWait,
    Host,
    Resources,
    build_actor_options,
    format_hosts,
    format_resources,
    read_hosts,
    resources_per_worker,
)
from raylit.errors import ConfigError, ResourcesError

_SLICE_NAME = "ray.io/tpu-slice-name"
_WORKER_ID = "ray.io/tpu-worker-id"
_POD_TYPE = "ray.io/tpu-pod-type"
_TOPOLOGY = "ray.io/tpu-topology"
_HEAD_TIMEOUT_S = 2.0
"""Time for one attempt to reserve the first hosts of the slices, during which Ctrl-C waits."""
_MEGASCALE_PORT = 8081
"""Port of the coordinator of several slices; a host's further workers take the next ones."""
_EXIT_TIMEOUT_S = 60.0
"""Time for a killed process to disappear, which first closes its TPU chips."""


def find_tpus() -> TPUInventory:
    """List the hosts with TPUs of the cluster that this process is connected to, or connects to now."""
    local_cluster.connect()
    hosts = read_hosts()
    return TPUInventory(
        hosts=tuple(_read_host(host) for host in hosts if host.resources.get("TPU", 0) >= 1),
        where=f"this cluster of {format_hosts(hosts)}",
        can_grow=ray_core.read_autoscaling() is not None,
    )


def _read_host(host: Host) -> TPUHost:
    pod_type = host.labels.get(_POD_TYPE)
    return TPUHost(
        num_devices=int(host.resources["TPU"]),
        accelerator_version=None if pod_type is None else pod_type.partition("-")[0],
        topology=host.labels.get(_TOPOLOGY),
        slice_name=host.labels.get(_SLICE_NAME, ""),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seat:
    """Bundle of a worker and the host that it is on."""

    bundle: int
    ip: str


class SlicePlacement:
    """Bundles of workers on whole TPU slices, one for each host; the workers' indices are their ranks."""

    is_in_rank_order = True

    def __init__(self, workers: Workers, *, free_resources: Callable[[], bool] = lambda: False) -> None:
        """Reserve the slices.

        Args:
            workers: Number and resources of the workers, and their slices.
            free_resources: See `Placement`.

        Raises:
            ResourcesError: The cluster does not have the slices, or did not offer them in time.
        """
        assert workers.slices is not None
        self._workers = workers
        self._slices = workers.slices
        self._each = _request_resources(workers, self._slices)
        self._handle = _reserve_slices(workers, self._each, free_resources=free_resources)
        try:
            group = self._handle.placement_group
            assert group is not None
            self._group: PlacementGroup = group
            self._seats = _order_seats(group, self._slices, workers_per_host=_workers_per_host(workers))
        except BaseException:
            self._handle.shutdown()
            raise

    def options(self, index: int) -> dict[str, Any]:
        """Return Ray's options for the actor of this worker."""
        return build_actor_options(self._each, group=self._group, bundle=self._seats[index].bundle)

    def variables(self, index: int) -> dict[str, str]:
        """Return the environment variables with which the process of this worker starts."""
        per_host = _workers_per_host(self._workers)
        place = TPUPlace(
            slices=self._slices,
            rank=index,
            local_rank=index % per_host,
            world_size=len(self._seats),
            local_world_size=per_host,
            host_ips=tuple(seat.ip for seat in self._seats),
        )
        return {**self._workers.accelerator.process_variables(place), **_build_multislice_variables(place)}

    @property
    def resources(self) -> Resources:
        """Resources that a worker takes from the cluster."""
        return self._each

    def is_reusable(self) -> bool:
        """Return True if this process is still outside of placement groups."""
        return ray.util.get_current_placement_group() is None

    def remove(self) -> None:
        """Give the slices back."""
        self._handle.shutdown()


def _workers_per_host(workers: Workers) -> int:
    assert workers.slices is not None
    return workers.num_workers // workers.slices.num_hosts


def _request_resources(workers: Workers, slices: TPUSlices) -> Resources:
    """Return a worker's request; unless the user names one, a CPU, or its share of its host's."""
    hosts = [host for host in read_hosts() if host.labels.get(_POD_TYPE) == slices.pod_type]
    num_cpus = min((host.resources.get("CPU", 0.0) for host in hosts), default=1.0)
    share = num_cpus / _workers_per_host(workers)
    cpu = 0.01 if local_cluster.is_embedded() else min(1.0, int(share * 100) / 100)
    return resources_per_worker(workers, cpu=cpu)


def _reserve_slices(workers: Workers, each: Resources, *, free_resources: Callable[[], bool]) -> SlicePlacementGroup:
    """Reserve the slices and wait until all their hosts are free; on an error the request is withdrawn."""
    slices = workers.slices
    assert slices is not None
    text = f"{slices.num_slices} TPU slice(s) {slices} for {workers.num_workers} worker(s)"
    wait = CapacityWait(timeout_s=workers.start_timeout_s)
    while True:
        _check_existence(slices, text)
        handle = _try_to_reserve(workers, slices, each)
        if handle is not None:
            break
        _keep_waiting(wait, text, free_resources)
    try:
        group = handle.placement_group
        assert group is not None
        # In slices, as Ray's wait does not notice Ctrl-C; of a second, as Ray truncates fractions (2.60).
        while not group.wait(1):
            _keep_waiting(wait, text, free_resources)
        handle.release_head_pgs()
    except BaseException:
        handle.shutdown()
        raise
    return handle


def _try_to_reserve(workers: Workers, slices: TPUSlices, each: Resources) -> SlicePlacementGroup | None:
    """Return the placement group, whose bundles may be pending; None if the slices' first hosts are not free."""
    per_host = _workers_per_host(workers)
    selector = {**_select_pod_type(slices), **workers.label_selector}
    try:
        return slice_placement_group(
            topology=slices.topology,
            accelerator_version=slices.accelerator_version,
            # Ray counts in steps of 1/10000.
            resources_per_bundle={name: round(amount * per_host, 4) for name, amount in each.items()},
            num_slices=slices.num_slices,
            chips_per_vm=slices.chips_per_host,
            tpu_resource_per_chip=slices.devices_per_chip,
            bundle_label_selector=[dict(selector) for _ in range(slices.num_hosts)],
            strategy="STRICT_SPREAD",
            head_reservation_timeout_s=_HEAD_TIMEOUT_S,
        )
    except TimeoutError:
        return None
    except RuntimeError as error:
        raise ResourcesError(f"Ray cannot reserve the TPU slices {slices}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"Ray does not take the TPU slices {slices} as they are: {error}") from error


def _select_pod_type(slices: TPUSlices) -> dict[str, str]:
    """Return the label that keeps a slice of one host away from the hosts of larger ones, if hosts have it."""
    is_labelled = any(host.labels.get(_POD_TYPE) == slices.pod_type for host in read_hosts())
    return {_POD_TYPE: slices.pod_type} if is_labelled or ray_core.read_autoscaling() is not None else {}


def _check_existence(slices: TPUSlices, text: str) -> None:
    """Raise ResourcesError if no host of such a slice is there and no autoscaler may add one."""
    hosts = read_hosts()
    devices = [host.resources.get("TPU", 0.0) for host in hosts if host.labels.get(_TOPOLOGY) == slices.topology]
    if sum(devices) >= slices.num_devices or ray_core.read_autoscaling() is not None:
        return
    raise ResourcesError(
        f"{text} are asked for, which this cluster of {format_hosts(hosts)} does not have, and no autoscaler adds to "
        "it: ask for what it has (tpu_cores, topology, accelerator_version, num_workers), or connect to a cluster with "
        "such slices (RAY_ADDRESS)"
    )


def _keep_waiting(wait: CapacityWait, text: str, free_resources: Callable[[], bool]) -> None:
    """End something that holds resources, or say what is missing. ResourcesError: the time is over."""
    if free_resources():
        return
    missing = f"{text}; free now: {format_resources(ray.available_resources())} of {format_hosts(read_hosts())}"
    if wait.is_over:
        raise ResourcesError(
            f"{missing}: not free within start_timeout_s={wait.timeout_s:g}. Ask for fewer slices, end what holds "
            "them, or wait longer"
        )
    if wait.is_line_due:
        wait.say(missing)


def _order_seats(group: PlacementGroup, slices: TPUSlices, *, workers_per_host: int) -> list[_Seat]:
    """Return the workers' bundles by rank: by slice, then by the host's TPU_WORKER_ID, which Ray keeps as a label."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    node_ids: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]

    def sort_key(bundle: int) -> tuple[int, int]:
        labels = nodes[node_ids[bundle]]["Labels"]
        return bundle // slices.hosts_per_slice, int(labels.get(_WORKER_ID, bundle % slices.hosts_per_slice))

    return [
        _Seat(bundle=bundle, ip=nodes[node_ids[bundle]]["NodeManagerAddress"])
        for bundle in sorted(node_ids, key=sort_key)
        for _ in range(workers_per_host)
    ]


def _build_multislice_variables(place: TPUPlace) -> dict[str, str]:
    """Return the variables with which several slices find each other; none for one slice."""
    num_slices = place.slices.num_slices
    if num_slices == 1:
        return {}
    coordinator, is_alone = place.host_ips[0], place.local_world_size == 1
    return get_tpu_coordinator_env_vars(
        # Processes that share a host have a port each, so the coordinator's must be given.
        coordinator_address=coordinator if is_alone else f"{coordinator}:{_MEGASCALE_PORT}",
        num_slices=num_slices,
        slice_id=place.slice_id,
        coordinator_port=str(_MEGASCALE_PORT + place.local_rank),
    )


def wait_for_exits(processes: Iterable[tuple[str, int]], *, timeout_s: float = _EXIT_TIMEOUT_S) -> None:
    """Wait until killed processes are gone, so that their devices are free for others; say so if one stays.

    Args:
        processes: Node id and process id of each.
        timeout_s: How long to wait in all.
    """
    pids: Mapping[str, list[int]] = defaultdict(list)
    for node_id, pid in processes:
        pids[node_id].append(pid)
    own = ray.get_runtime_context().get_node_id()

    def list_running(pids: list[int], timeout_s: float) -> list[int]:
        # Pickled by value: the task's process does not import raylit, and torch with it.
        deadline = time.monotonic() + timeout_s
        while True:
            running = []
            for pid in pids:
                try:
                    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if state != "Z":
                    running.append(pid)
            if not running or time.monotonic() >= deadline:
                return running
            time.sleep(0.02)

    task: Any = ray.remote(list_running)
    calls = {
        node_id: task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        ).remote(node_pids, timeout_s)
        for node_id, node_pids in pids.items()
        if node_id != own
    }
    running = list_running(pids[own], timeout_s) if own in pids else []
    for call in calls.values():
        try:
            running += ray.get(call, timeout=timeout_s)
        except RayError:
            continue  # the node has gone, and its processes with it
    if running:
        sys.stderr.write(f"raylit: ended workers still hold their TPU chips, processes {running}\n")
