"""TPU slices: versions, topologies and hosts, and the place of a worker in them. Driver and worker."""

import math
import pathlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from raylit.errors import ConfigError

_ONE_CORE_VERSIONS = ("v5litepod", "v6e")
"""Versions whose chips have one TensorCore, and whose hosts have up to 8 chips if the slice has no other host."""
_CHIPS_PER_HOST = 4
_FLAT = ("2x2", "2x4", "2x8", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def _list_cubes(x: int, y: int, z: int) -> tuple[str, ...]:
    """List the topologies up to a size whose three dimensions are multiples of 4."""
    return tuple("x".join(map(str, dims)) for dims in product(*(range(4, size + 1, 4) for size in (x, y, z))))


_TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v2": ("4x4", "4x8", "8x8", "8x16", "16x16"),
    "v3": ("4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
    "v4": (*_SMALL_CUBES, *_list_cubes(12, 12, 16)),
    "v5litepod": ("1x1", *_FLAT),
    "v5p": (*_SMALL_CUBES, *_list_cubes(16, 16, 24)),
    "v6e": ("1x1", *_FLAT),
    "v7x": (*_SMALL_CUBES, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}
"""Topologies of the slices of each version, as Ray 2.60 knows them."""

_PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
_CHIPS = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})
"""PCI numbers of TPU chips; other devices of the vendor are network cards and the like."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TPUSlices:
    """One or several equal slices, whose hosts the workers of a run use."""

    accelerator_version: str
    """Generation of the chips, as Ray spells it: "v5p", "v5litepod", "v6e"."""
    topology: str
    """Arrangement of a slice's chips, such as "4x4" or "2x2x2"."""
    chips_per_host: int
    devices_per_chip: int = 1
    """Devices that torch sees for each chip: RAY_TPU_RESOURCE_PER_CHIP."""
    num_slices: int = 1

    @property
    def hosts_per_slice(self) -> int:
        return max(1, count_chips(self.topology) // self.chips_per_host)

    @property
    def num_hosts(self) -> int:
        return self.hosts_per_slice * self.num_slices

    @property
    def devices_per_host(self) -> int:
        return self.chips_per_host * self.devices_per_chip

    @property
    def num_devices(self) -> int:
        return self.devices_per_host * self.num_hosts

    @property
    def pod_type(self) -> str:
        """Ray's label for a host of such a slice, which counts TensorCores: "v6e-16"."""
        return f"{self.accelerator_version}-{count_chips(self.topology) * cores_per_chip(self.accelerator_version)}"

    def __str__(self) -> str:
        chips = f"{self.chips_per_host} chip" + ("s" if self.chips_per_host > 1 else "")
        hosts = (
            f"{self.hosts_per_slice} hosts with {chips} each" if self.hosts_per_slice > 1 else f"a host with {chips}"
        )
        return f"{self.accelerator_version} {self.topology} ({hosts})"


@dataclass(frozen=True, kw_only=True, slots=True)
class TPUHost:
    """A host with TPUs, as Ray describes it."""

    num_devices: int
    """Ray's resource TPU."""
    accelerator_version: str | None = None
    topology: str | None = None
    """None, like the version, if the host does not say what slice it belongs to."""
    slice_name: str = ""
    """Empty for a host that is a slice by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TPUInventory:
    """The TPUs that a run can have."""

    hosts: tuple[TPUHost, ...]
    where: str
    """Words for the place of the hosts: "this cluster of 2 hosts with 8 CPU, 8 TPU"."""
    can_grow: bool = False
    """True if an autoscaler may add hosts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TPUPlace:
    """Place of a worker in TPU slices. Ranks are ordered by slice, then by TPU_WORKER_ID, then by chip."""

    slices: TPUSlices
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    host_ips: tuple[str, ...]
    """Address of each rank's host."""

    @property
    def workers_per_slice(self) -> int:
        return self.world_size // self.slices.num_slices

    @property
    def slice_id(self) -> int:
        return self.rank // self.workers_per_slice

    @property
    def slice_ranks(self) -> range:
        """The ranks of this worker's slice."""
        first = self.slice_id * self.workers_per_slice
        return range(first, first + self.workers_per_slice)


def has_tpu_chips() -> bool:
    """Return True if this machine has TPU chips; nothing is started."""
    try:
        return any(
            _read_pci_number(device, "vendor") == _GOOGLE and _read_pci_number(device, "device") in _CHIPS
            for device in _PCI_DEVICES.iterdir()
        )
    except OSError:
        return False


def _read_pci_number(device: pathlib.Path, name: str) -> str:
    try:
        return (device / name).read_text().strip()
    except OSError:
        return ""


def cores_per_chip(accelerator_version: str) -> int:
    """Return the number of TensorCores of a chip."""
    return 1 if accelerator_version in _ONE_CORE_VERSIONS else 2


def count_chips(topology: str) -> int:
    """Return the number of chips of a slice with this topology."""
    return math.prod(int(size) for size in topology.split("x"))


def default_chips_per_host(accelerator_version: str, topology: str) -> int:
    """Return the chips of each host of such a slice, unless its hosts say something else."""
    num_chips = count_chips(topology)
    has_one_host = accelerator_version in _ONE_CORE_VERSIONS and topology in ("1x1", "2x2", "2x4")
    return num_chips if has_one_host else min(num_chips, _CHIPS_PER_HOST)


def parse_version(text: str) -> str:
    """Return Ray's spelling of a version such as "v6e", "TPU-V6E", "v5e" or "tpu7x".

    Raises:
        ConfigError: There is no such version.
    """
    version = re.sub(r"^tpu-?v?", "v", text.strip().lower())
    version = {"v5e": "v5litepod", "v5lite": "v5litepod", "v7": "v7x"}.get(version, version)
    if version not in _TOPOLOGIES:
        raise ConfigError(f"accelerator_version={text!r}: must be one of {', '.join(_TOPOLOGIES)}")
    return version


def parse_topology(text: str, *, accelerator_version: str | None = None) -> str:
    """Return a topology in Ray's spelling.

    Raises:
        ConfigError: No slice of the version, or of any version, has such a topology.
    """
    topology = text.strip().lower()
    versions = [accelerator_version] if accelerator_version else list(_TOPOLOGIES)
    if any(topology in _TOPOLOGIES[version] for version in versions):
        return topology
    there_is = "; ".join(f"{version}: {_format_topologies(version)}" for version in versions)
    owner = f"{accelerator_version} slice" if accelerator_version else "slice of a TPU"
    raise ConfigError(f"topology={text!r}: no {owner} has it. There is {there_is}")


def has_topology(accelerator_version: str, topology: str) -> bool:
    """Return True if this version has slices of this topology."""
    return topology in _TOPOLOGIES.get(accelerator_version, ())


def versions_with(topology: str) -> list[str]:
    """Return the versions that have slices of this topology."""
    return [version for version, topologies in _TOPOLOGIES.items() if topology in topologies]


def list_core_counts(versions: Iterable[str] = _TOPOLOGIES) -> list[int]:
    """Return the numbers of TensorCores that slices of these versions, or one chip of a host, have."""
    counts = {cores_per_chip(version) for version in versions}
    for version in versions:
        counts |= {count_chips(topology) * cores_per_chip(version) for topology in _TOPOLOGIES[version]}
    # The smallest slices of versions 2 and 3, which Ray knows as hosts only.
    return sorted(counts | {8} if {"v2", "v3"} & set(versions) else counts)


def choose_topology(accelerator_version: str, num_chips: int) -> str | None:
    """Return the topology of this version with so many chips, or None; of several the one closest to a cube."""
    topologies = [topology for topology in _TOPOLOGIES[accelerator_version] if count_chips(topology) == num_chips]
    return min(topologies, key=lambda topology: (max(map(int, topology.split("x"))), topology), default=None)


def _format_topologies(accelerator_version: str) -> str:
    topologies = _TOPOLOGIES[accelerator_version]
    return ", ".join(topologies) if len(topologies) <= 12 else ", ".join((*topologies[:8], "...", topologies[-1]))
