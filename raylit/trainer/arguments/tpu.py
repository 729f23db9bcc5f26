"""Map a request for TPUs (cores, devices, workers, topology, version) to slices and workers. Driver."""

from collections import Counter
from dataclasses import dataclass, replace

from raylit.accelerators import Accelerator
from raylit.accelerators.tpu_slices import (
    TPUInventory,
    TPUSlices,
    choose_topology,
    cores_per_chip,
    default_chips_per_host,
    has_topology,
    list_core_counts,
    versions_with,
)
from raylit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TPURequest:
    """TPUs that the Trainer's arguments ask for; None for what they leave open."""

    accelerator: Accelerator
    num_workers: int | None = None
    num_cores: int | None = None
    """TensorCores of all hosts: `tpu_cores` times `num_nodes`."""
    num_devices: int | None = None
    """Devices of all hosts: `devices` times `num_nodes`."""
    num_hosts: int | None = None
    """`num_nodes`, if it is not 1."""
    accelerator_version: str | None = None
    topology: str | None = None
    devices_per_chip: int = 1

    def __str__(self) -> str:
        given = {
            "num_workers": self.num_workers,
            "tpu_cores": self._per_host(self.num_cores),
            "devices": self._per_host(self.num_devices),
            "num_nodes": self.num_hosts,
            "accelerator_version": self.accelerator_version,
            "topology": self.topology,
        }
        named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return ", ".join([f"accelerator={self.accelerator.name!r}", *named])

    def _per_host(self, total: int | None) -> int | None:
        return None if total is None else total // (self.num_hosts or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TPULayout:
    """Workers for a request."""

    num_workers: int
    devices_per_worker: int
    slices: TPUSlices | None = None
    """None if the workers are on one host that tells no slice, or use a part of a host."""

    @property
    def num_hosts(self) -> int:
        return 1 if self.slices is None else self.slices.num_hosts


def check_tpu_cores(tpu_cores: int, *, num_nodes: int) -> None:
    """Check that slices of some version have so many cores.

    Raises:
        ConfigError: No slices do.
    """
    counts = list_core_counts()
    total = tpu_cores * num_nodes
    if total not in counts and total % 8:
        nodes = f" and num_nodes={num_nodes}" if num_nodes > 1 else ""
        raise ConfigError(
            f"tpu_cores={tpu_cores}{nodes}: no TPU slice has {total} cores. There are slices of "
            f"{', '.join(map(str, counts[:8]))}, ... cores (a chip has one in v5e and v6e, two in the other versions): "
            "give such a number, or say topology= and accelerator_version="
        )


def lay_out_workers(request: TPURequest, inventory: TPUInventory) -> TPULayout:
    """Choose slices and the number of workers.

    Raises:
        ConfigError: The request is not for whole slices of one kind that the inventory has.
    """
    offers = _list_offers(request, inventory)
    layouts = [layout for offer in offers if (layout := _fit_slices(request, *offer)) is not None]
    fewest = min((layout.slices.num_slices for layout in layouts if layout.slices is not None), default=0)
    layouts = [layout for layout in layouts if layout.slices is not None and layout.slices.num_slices == fewest]
    if len(layouts) == 1:
        return layouts[0]
    if layouts:
        raise ConfigError(
            f"{request}: several kinds of slices have that many, {_format_offers(offers)}: say topology= or "
            "accelerator_version="
        )
    if (part := _use_one_host(request, inventory)) is not None:
        return part
    raise ConfigError(_explain_misfit(request, inventory, offers))


_Offer = tuple[TPUSlices, int | None]
"""A slice, and how many of them there are; None if there may be any number."""


def _list_offers(request: TPURequest, inventory: TPUInventory) -> list[_Offer]:
    """List the kinds of complete slices of the inventory that have the wanted version and topology."""
    hosts_of_slices: dict[TPUSlices, Counter[str]] = {}
    for index, host in enumerate(inventory.hosts):
        version, topology = host.accelerator_version, host.topology
        if version is None or topology is None or not has_topology(version, topology):
            continue
        if request.topology in (None, topology) and request.accelerator_version in (None, version):
            chips_per_host = max(1, host.num_devices // request.devices_per_chip)
            slices = _describe_slices(request, version, topology, chips_per_host=chips_per_host)
            name = host.slice_name if slices.hosts_per_slice > 1 else f"host {index}"
            hosts_of_slices.setdefault(slices, Counter())[name] += 1
    offers: list[_Offer] = []
    for slices, num_hosts in hosts_of_slices.items():
        num_complete = sum(count == slices.hosts_per_slice for count in num_hosts.values())
        if num_complete or inventory.can_grow:
            offers.append((slices, None if inventory.can_grow else num_complete))
    if offers or not inventory.can_grow:
        return offers
    # An autoscaler starts from nothing: the request must say what it is to add.
    version, topology = request.accelerator_version, request.topology
    if version is None and topology is not None and len(versions_with(topology)) == 1:
        version = versions_with(topology)[0]
    if version is not None and topology is None and request.num_cores is not None:
        topology = choose_topology(version, request.num_cores // cores_per_chip(version))
    return [] if version is None or topology is None else [(_describe_slices(request, version, topology), None)]


def _describe_slices(
    request: TPURequest, accelerator_version: str, topology: str, *, chips_per_host: int | None = None
) -> TPUSlices:
    return TPUSlices(
        accelerator_version=accelerator_version,
        topology=topology,
        chips_per_host=chips_per_host or default_chips_per_host(accelerator_version, topology),
        devices_per_chip=request.devices_per_chip,
    )


def _fit_slices(request: TPURequest, slices: TPUSlices, num_available: int | None) -> TPULayout | None:
    """Return the layout on whole slices of this kind that the request asks for; None if there is none."""
    is_spmd = request.accelerator.is_spmd
    workers_per_slice = slices.hosts_per_slice * (1 if is_spmd else slices.devices_per_host)
    wanted_and_size = (
        (request.num_workers, workers_per_slice),
        (request.num_cores, _count_cores(slices)),
        (request.num_devices, slices.num_devices),
        (request.num_hosts, slices.hosts_per_slice),
    )
    counts = {wanted / size for wanted, size in wanted_and_size if wanted is not None} or {1.0}
    count = counts.pop()
    if counts or count < 1 or count != int(count) or (num_available is not None and count > num_available):
        return None
    return TPULayout(
        num_workers=workers_per_slice * int(count),
        devices_per_worker=slices.devices_per_host if is_spmd else 1,
        slices=replace(slices, num_slices=int(count)),
    )


def _count_cores(slices: TPUSlices) -> int:
    """Return the number of TensorCores of one slice."""
    return slices.chips_per_host * slices.hosts_per_slice * cores_per_chip(slices.accelerator_version)


def _use_one_host(request: TPURequest, inventory: TPUInventory) -> TPULayout | None:
    """Return the layout of one worker with one chip of a host, or with all of a host that tells no slice."""
    if request.num_workers not in (None, 1) or request.num_hosts is not None or request.topology is not None:
        return None
    is_spmd = request.accelerator.is_spmd
    for host in inventory.hosts:
        version = host.accelerator_version
        if request.accelerator_version not in (None, version):
            continue
        core_counts = (1, 2) if version is None else (cores_per_chip(version),)
        is_one_device = request.num_devices == 1 or (request.num_workers == 1 and not is_spmd)
        is_one_chip = request.num_cores in core_counts or (is_one_device and request.num_cores is None)
        if is_one_chip and (request.devices_per_chip == 1 or is_spmd):
            return TPULayout(num_workers=1, devices_per_worker=request.devices_per_chip)
        is_without_slice = version is None or host.topology is None or not has_topology(version, host.topology)
        is_one_worker = is_spmd or host.num_devices == 1
        chips = host.num_devices // request.devices_per_chip
        has_cores = request.num_cores is None or request.num_cores in [chips * count for count in core_counts]
        if is_without_slice and is_one_worker and has_cores and request.num_devices in (None, host.num_devices):
            return TPULayout(num_workers=1, devices_per_worker=host.num_devices)
    return None


def _explain_misfit(request: TPURequest, inventory: TPUInventory, offers: list[_Offer]) -> str:
    if not inventory.hosts and not inventory.can_grow:
        return (
            f"{request}: there is no TPU in {inventory.where}. Connect to a cluster with TPU hosts (RAY_ADDRESS, or "
            "ray.init(address=...)), start Ray on the TPU hosts themselves, which then have the resource TPU and the "
            "labels ray.io/tpu-*, or train without: accelerator='cpu' or 'gpu'"
        )
    if not offers and inventory.can_grow:
        return (
            f"{request}: {inventory.where} has no such TPU slice yet, and its autoscaler must know which to add: say "
            "topology= and accelerator_version="
        )
    if not offers:
        return (
            f"{request}: {inventory.where} has no such complete TPU slice, but {_format_hosts(inventory)}. Ask for "
            "what there is; Ray must run on all hosts of a slice, with its labels ray.io/tpu-topology, "
            "ray.io/tpu-pod-type and ray.io/tpu-slice-name"
        )
    is_spmd = request.accelerator.is_spmd
    unit = "host" if is_spmd else "chip" if request.devices_per_chip == 1 else "device"
    choices = []
    for slices, count in offers:
        num_workers = slices.hosts_per_slice * (1 if is_spmd else slices.devices_per_host)
        limit = "what the autoscaler allows" if count is None else str(count)
        multiple = "" if count == 1 else f" times the number of slices, up to {limit}"
        workers = f"num_workers={num_workers} (one for each {unit})"
        choices.append(f"{workers} or tpu_cores={_count_cores(slices)} for {slices}{multiple}")
    return (
        f"{request}: a slice is used as a whole, and {inventory.where} has {_format_offers(offers)}. Ask for "
        f"{'; '.join(choices)}"
    )


def _format_offers(offers: list[_Offer]) -> str:
    return " and ".join(
        f"slices {slices}" if count is None else f"{count} slice{'s' if count > 1 else ''} {slices}"
        for slices, count in offers
    )


def _format_hosts(inventory: TPUInventory) -> str:
    kinds = [
        f"{host.num_devices} TPU"
        + ("" if host.topology is None else f" of {host.accelerator_version or 'a'} slice {host.topology}")
        for host in inventory.hosts
    ]
    return " and ".join(f"{kinds.count(kind)} host(s) with {kind}" for kind in dict.fromkeys(kinds))
