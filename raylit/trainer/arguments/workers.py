"""Parse and check the Trainer's arguments on workers, devices, hosts and resources. Driver."""

import os
import re
import sys
from dataclasses import replace
from typing import Any, get_args

from raylit.accelerators import Accelerator, choose_accelerator, get_accelerator, is_registered
from raylit.accelerators.tpu_slices import TPUInventory, parse_topology, parse_version
from raylit.config import PlacementName, Workers
from raylit.errors import ConfigError
from raylit.trainer.arguments.tpu import TPULayout, TPURequest, check_tpu_cores, lay_out_workers
from raylit.trainer.arguments.training import check_count


def is_on_cluster() -> bool:
    """Return True if this process is connected to Ray already or RAY_ADDRESS names a cluster."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and bool(ray.is_initialized()))


_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"([a-zA-Z0-9.-]+/)?{_LABEL}")
_LABEL_CONDITION = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")
_NOTHING: tuple[Any, ...] = (None, 0, [], "0", "")


def parse_workers(
    *,
    num_workers: int | None,
    gpus: int | str | list[int] | None,
    tpu_cores: int | str | list[int] | None,
    num_nodes: int,
    num_processes: int | None,
    accelerator: str | Accelerator,
    devices: int | str | list[int],
    topology: str | None,
    accelerator_version: str | None,
    resources_per_worker: dict[str, float] | None,
    placement: str | None,
    label_selector: dict[str, str] | None,
    start_timeout_s: float,
    ping_timeout_s: float | None,
    keep_workers_s: float | None,
    storage: str | None = None,
) -> Workers:
    """Parse the number and kind of workers; by default one per GPU if there are several, else none (this process).

    `storage` is the directory for files that later runs reuse; None: none are kept.
    """
    check_count(1, num_nodes=num_nodes)
    num_cores = _count_tpu_cores(tpu_cores, num_nodes=num_nodes)
    if ping_timeout_s is not None and not ping_timeout_s >= 0:
        raise ConfigError(f"ping_timeout_s={ping_timeout_s}: must be a number of seconds, or 0 for no limit")
    chosen = _accelerator(accelerator, gpus=gpus, tpu_cores=tpu_cores, num_processes=num_processes)
    if storage is not None:
        chosen = chosen.with_storage(storage)
    layout = _lay_out_tpus(
        chosen,
        num_workers=num_workers,
        num_cores=num_cores,
        devices=devices,
        num_nodes=num_nodes,
        topology=topology,
        accelerator_version=accelerator_version,
    )
    if layout is not None:
        num_workers, num_nodes = layout.num_workers, layout.num_hosts
        resources = _tpu_resources(resources_per_worker or {}, layout, chosen)
        _check_tpu_placement(placement, layout)
    else:
        num_workers = _parse_num_workers(
            num_workers,
            _devices_per_node(gpus, num_processes, devices, chosen),
            accelerator=chosen,
            num_nodes=num_nodes,
            resources_per_worker=resources_per_worker,
            placement=placement,
            label_selector=label_selector,
        )
        resources = _resources(resources_per_worker or {}, chosen)
    workers = Workers(
        num_workers=num_workers,
        num_nodes=num_nodes if num_nodes > 1 else None,
        accelerator=chosen,
        slices=None if layout is None else layout.slices,
        resources_per_worker=resources,
        placement=_placement(placement, num_nodes=num_nodes),
        label_selector=_label_selector(label_selector or {}),
        start_timeout_s=start_timeout_s,
        keep_s=keep_workers_s,
    )
    if ping_timeout_s is None:
        return workers
    return replace(workers, ping_timeout_s=ping_timeout_s, start_ping_timeout_s=ping_timeout_s)


def _parse_num_workers(
    num_workers: int | None,
    devices_per_node: int | None,
    *,
    accelerator: Accelerator,
    num_nodes: int,
    **given: Any,
) -> int:
    """Return the number of workers, as it is given or follows from the devices.

    Args:
        num_workers: As given.
        devices_per_node: As given by `gpus`, `devices` or `num_processes`.
        accelerator: The kind of device.
        num_nodes: As given.
        **given: Arguments that mean nothing without workers.
    """
    total = None if devices_per_node is None else devices_per_node * num_nodes
    if num_workers is None:
        num_workers = _default_num_workers(total, accelerator)
        if num_workers == 0:
            _refuse_without_workers(num_nodes=num_nodes, **given)
    elif num_workers < 0:
        raise ConfigError(f"num_workers={num_workers}: must be 0 (this process) or the number of workers")
    elif total is not None and total != max(1, num_workers):
        raise ConfigError(
            f"num_workers={num_workers} and {total} devices (gpus, devices or num_processes times "
            f"num_nodes={num_nodes}) are asked for: leave one of them out, or give the same number"
        )
    if not accelerator.is_available() and (num_workers == 0 or not is_on_cluster()):
        raise ConfigError(accelerator.explain_unavailable())
    if max(1, num_workers) % num_nodes:
        raise ConfigError(f"{max(1, num_workers)} workers cannot be spread evenly over num_nodes={num_nodes}")
    return num_workers


def _accelerator(accelerator: str | Accelerator, *, gpus: Any, tpu_cores: Any, num_processes: Any) -> Accelerator:
    """Make the one that is asked for, by `accelerator`, `gpus` or `tpu_cores`; "auto" takes what there is."""
    named = None
    if tpu_cores not in _NOTHING:
        others = {"gpus": gpus if gpus not in _NOTHING else None, "num_processes": num_processes}
        if isinstance(accelerator, Accelerator):
            others["accelerator"] = None if accelerator.is_on_tpu else accelerator
        elif accelerator not in ("auto", "tpu", "xla", "torch_tpu") and not is_registered(accelerator):
            others["accelerator"] = accelerator
        for name, value in others.items():
            if value is not None:
                raise ConfigError(f"tpu_cores={tpu_cores!r} and {name}={value!r} contradict each other: leave one out")
        if accelerator == "auto":
            accelerator = "tpu"
    if isinstance(accelerator, Accelerator):
        named = accelerator
    elif accelerator != "auto":
        named = get_accelerator(accelerator)
    if gpus not in _NOTHING:
        of_gpus = get_accelerator("gpu")
        if named is not None and named != of_gpus:
            raise ConfigError(f"accelerator={named.name!r} and gpus={gpus!r} contradict each other: leave one out")
        if num_processes is not None:
            raise ConfigError(
                f"gpus={gpus!r} and num_processes={num_processes!r}: processes are CPU workers, choose one"
            )
        return of_gpus
    if named is not None:
        return named
    is_asking_for_cpu = num_processes is not None or gpus in (0, [], "0")
    return get_accelerator("cpu") if is_asking_for_cpu else choose_accelerator()


def _devices_per_node(gpus: Any, num_processes: int | None, devices: Any, accelerator: Accelerator) -> int | None:
    """Return the number of workers per host; None if no argument gives it."""
    given = {
        "gpus": gpus if gpus not in _NOTHING else None,
        "num_processes": num_processes,
        "devices": None if devices == "auto" else devices,
    }
    counts = {key: _count(key, value, accelerator) for key, value in given.items() if value is not None}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"{counts} contradict each other: leave one out")
    return next(iter(counts.values()), None)


def _count(key: str, value: Any, accelerator: Accelerator) -> int:
    """Return the number of devices that a value stands for; -1 stands for all that this machine has."""
    count = _parse_count(key, value)
    return accelerator.num_devices() if count == -1 else count


def _parse_count(key: str, value: Any) -> int:
    """Return the number that an int, a list of indices, "2", "0,1", or -1 (all) stands for."""
    if isinstance(value, str):
        parts = [part for part in value.split(",") if part.strip()]
        value = int(parts[0]) if len(parts) == 1 and "," not in value and _is_int(parts[0]) else parts
    if isinstance(value, (list, tuple)):
        return len(value)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ConfigError(f"{key}={value!r}: must be a positive int, a list of indices, or -1 for all")
    return value


def _is_int(text: str) -> bool:
    return text.strip().lstrip("-").isdigit()


def _count_tpu_cores(tpu_cores: Any, *, num_nodes: int) -> int | None:
    """Return the TensorCores of all hosts that are asked for; None if no number is."""
    if tpu_cores in _NOTHING or tpu_cores in (-1, "-1"):
        return None
    per_node = _parse_count("tpu_cores", tpu_cores)
    check_tpu_cores(per_node, num_nodes=num_nodes)
    return per_node * num_nodes


def _lay_out_tpus(
    accelerator: Accelerator,
    *,
    num_workers: int | None,
    num_cores: int | None,
    devices: int | str | list[int],
    num_nodes: int,
    topology: str | None,
    accelerator_version: str | None,
) -> TPULayout | None:
    """Choose the TPU slices of the workers and their number.

    Returns None for an accelerator without TPUs, without workers, or where torch has a device of its kind without
    TPUs, such as XLA's on the CPU.
    """
    if not accelerator.is_on_tpu:
        for name, value in {"topology": topology, "accelerator_version": accelerator_version}.items():
            if value is not None:
                raise ConfigError(f"{name}={value!r} and accelerator={accelerator.name!r}: only TPUs have it")
        return None
    version = None if accelerator_version is None else parse_version(accelerator_version)
    request = TPURequest(
        accelerator=accelerator,
        num_workers=num_workers,
        num_cores=num_cores,
        num_devices=None if devices in ("auto", -1, "-1") else _count("devices", devices, accelerator) * num_nodes,
        num_hosts=num_nodes if num_nodes > 1 else None,
        accelerator_version=version,
        topology=None if topology is None else parse_topology(topology, accelerator_version=version),
        devices_per_chip=_devices_per_chip(),
    )
    if num_workers == 0:
        return None
    is_named = any(value is not None for value in (num_cores, request.num_devices, version, request.topology))
    if not is_on_cluster():
        if not accelerator.is_available():
            raise ConfigError(accelerator.explain_unavailable())
        if accelerator.is_spmd and not is_named and num_workers is None:
            return None
    inventory = _find_tpus()
    if not inventory.hosts and accelerator.is_available() and not is_named:
        return None
    return lay_out_workers(request, inventory)


def _find_tpus() -> TPUInventory:
    # Importing Ray takes half a second, which a run without TPUs does not spend.
    from raylit.driver.ray.tpu_slice import find_tpus

    return find_tpus()


def _devices_per_chip() -> int:
    """Return Ray's number of TPU resources for a chip, which is the number of its devices if the user has set it."""
    text = os.environ.get("RAY_TPU_RESOURCE_PER_CHIP", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"RAY_TPU_RESOURCE_PER_CHIP={text!r}: must be a positive integer")
    return int(text)


def _tpu_resources(resources: dict[str, float], layout: TPULayout, accelerator: Accelerator) -> dict[str, float]:
    if resources.get("TPU", layout.devices_per_worker) != layout.devices_per_worker:
        raise ConfigError(
            f"resources_per_worker={resources!r}: a worker of accelerator={accelerator.name!r} has "
            f"{layout.devices_per_worker} TPU here; leave TPU out"
        )
    return {**_resources(resources, accelerator), "TPU": float(layout.devices_per_worker)}


def _check_tpu_placement(placement: str | None, layout: TPULayout) -> None:
    if placement is not None and layout.slices is not None:
        raise ConfigError(f"placement={placement!r}: the workers on TPU slices have their places; leave it out")


def _default_num_workers(total: int | None, accelerator: Accelerator) -> int:
    if total is None:
        # One GPU, or none, is driven from this process: same numbers, no start of Ray.
        num_devices = 0 if accelerator.is_host else accelerator.num_devices()
        return num_devices if num_devices > 1 else 0
    return 0 if total == 1 and accelerator.is_host else total


def _refuse_without_workers(*, num_nodes: int, **given: Any) -> None:
    """Raise ConfigError if an argument about workers is given but there are none."""
    named = [f"{name}={value!r}" for name, value in given.items() if value]
    if num_nodes > 1:
        named.append(f"num_nodes={num_nodes}")
    if named:
        raise ConfigError(
            f"{', '.join(named)} without workers: say how many with num_workers, or with gpus or num_processes (per "
            "node); num_workers=0 runs the loop in this process whatever is asked for workers"
        )


def _resources(resources: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    for key, amount in resources.items():
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not isinstance(key, str) or not is_number or not 0 <= amount < float("inf"):
            raise ConfigError(f"resources_per_worker={resources!r}: must be amounts of 0 or more by Ray's names")
        if key == "GPU" and amount > 1 and amount != int(amount):
            raise ConfigError(f"resources_per_worker={resources!r}: more than one GPU must be a whole number of them")
        if key == "object_store_memory":
            raise ConfigError(
                f"resources_per_worker={resources!r}: Ray gives out object_store_memory itself; leave it out"
            )
    for key in resources:
        name = key.lower().removeprefix("num_").removesuffix("s").upper()
        if name in ("CPU", "GPU", "TPU") and key != name:
            raise ConfigError(f"resources_per_worker={resources!r}: did you mean {name!r}?")
    own = accelerator.resources
    for key in own:
        if resources.get(key, 1) == 0:
            raise ConfigError(
                f"resources_per_worker={resources!r} leaves workers without the {key} that they are to use"
            )
    if "GPU" not in own and resources.get("GPU", 0) > 0:
        raise ConfigError(
            f"resources_per_worker={resources!r} and accelerator={accelerator.name!r}: say accelerator='gpu' where "
            "workers are to use the GPU, else leave it out"
        )
    if not own and resources.get("CPU", 1) == 0 and not any(resources.values()):
        raise ConfigError(f"resources_per_worker={resources!r} asks for nothing: give a share of a CPU, such as 0.01")
    return dict(resources)


def _placement(placement: str | None, *, num_nodes: int) -> PlacementName:
    names: dict[str, PlacementName] = {name: name for name in get_args(PlacementName)}
    if placement is None:
        return "PACK"
    if placement not in names:
        raise ConfigError(f"placement={placement!r}: must be one of {', '.join(map(repr, names))}")
    if num_nodes > 1:
        raise ConfigError(
            f"placement={placement!r} and num_nodes={num_nodes}: num_nodes says where workers go, leave one out"
        )
    return names[placement]


def _label_selector(selector: dict[str, str]) -> dict[str, str]:
    for key, condition in selector.items():
        if not (isinstance(key, str) and isinstance(condition, str)):
            raise ConfigError(f"label_selector={selector!r}: must be strings by string, such as {{'zone': 'a'}}")
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_CONDITION.fullmatch(condition):
            raise ConfigError(
                f"label_selector={selector!r}: {key!r}: {condition!r} is no label of Ray's with a condition like "
                "'a', '!a', 'in(a, b)' or '!in(a, b)'"
            )
    return dict(selector)
