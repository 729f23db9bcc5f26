"""Parse and check the Trainer's arguments on workers, devices, hosts and resources. Driver."""

import os
import re
import sys
from typing import Any, get_args

from raylit.accelerators import Accelerator, choose_accelerator, get_accelerator, is_registered
from raylit.config import PlacementName, Workers
from raylit.errors import ConfigError
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
    resources_per_worker: dict[str, float] | None,
    placement: str | None,
    label_selector: dict[str, str] | None,
    start_timeout_s: float,
    ping_timeout_s: float | None,
    keep_workers_s: float | None,
) -> Workers:
    """Parse the number and kind of workers; by default one per GPU if there are several, else none (this process)."""
    check_count(1, num_nodes=num_nodes)
    _refuse_tpus(tpu_cores, accelerator)
    if ping_timeout_s is not None and not ping_timeout_s >= 0:
        raise ConfigError(f"ping_timeout_s={ping_timeout_s}: must be a number of seconds, or 0 for no limit")
    chosen = _accelerator(accelerator, gpus=gpus, num_processes=num_processes)
    per_node = _devices_per_node(gpus, num_processes, devices, chosen)
    total = None if per_node is None else per_node * num_nodes
    if num_workers is None:
        num_workers = _default_num_workers(total, chosen)
        if num_workers == 0:
            _refuse_without_workers(
                num_nodes=num_nodes,
                resources_per_worker=resources_per_worker,
                placement=placement,
                label_selector=label_selector,
            )
    elif num_workers < 0:
        raise ConfigError(f"num_workers={num_workers}: must be 0 (this process) or the number of workers")
    elif total is not None and total != max(1, num_workers):
        raise ConfigError(
            f"num_workers={num_workers} and {total} devices (gpus, devices or num_processes times "
            f"num_nodes={num_nodes}) are asked for: leave one of them out, or give the same number"
        )
    if not chosen.is_available() and (num_workers == 0 or not is_on_cluster()):
        raise ConfigError(chosen.explain_unavailable())
    world_size = max(1, num_workers)
    if world_size % num_nodes:
        raise ConfigError(f"{num_workers} workers cannot be spread evenly over num_nodes={num_nodes}")
    return Workers(
        num_workers=num_workers,
        num_nodes=num_nodes if num_nodes > 1 else None,
        accelerator=chosen,
        resources_per_worker=_resources(resources_per_worker or {}, chosen),
        placement=_placement(placement, num_nodes=num_nodes),
        label_selector=_label_selector(label_selector or {}),
        start_timeout_s=start_timeout_s,
        **({} if ping_timeout_s is None else _ping_timeouts(ping_timeout_s)),
        keep_s=keep_workers_s,
    )


def _ping_timeouts(given_s: float) -> dict[str, float]:
    return {"ping_timeout_s": given_s, "start_ping_timeout_s": given_s}


def _accelerator(accelerator: str | Accelerator, *, gpus: Any, num_processes: Any) -> Accelerator:
    """Make the one that is asked for, by `accelerator` or by `gpus`; "auto" takes what there is."""
    named = None
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
    """Return the number of devices that an int, a list of indices, "2", "0,1", or -1 (all) stands for."""
    if isinstance(value, str):
        parts = [part for part in value.split(",") if part.strip()]
        value = int(parts[0]) if len(parts) == 1 and "," not in value and _is_int(parts[0]) else parts
    if isinstance(value, (list, tuple)):
        return len(value)
    if value == -1:
        return accelerator.num_devices()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}={value!r}: must be a positive int, a list of indices, or -1 for all")
    return value


def _is_int(text: str) -> bool:
    return text.strip().lstrip("-").isdigit()


def _is_unregistered_tpu(accelerator: str | Accelerator) -> bool:
    return isinstance(accelerator, str) and accelerator == "tpu" and not is_registered(accelerator)


def _refuse_tpus(tpu_cores: Any, accelerator: str | Accelerator) -> None:
    if tpu_cores not in _NOTHING or _is_unregistered_tpu(accelerator):
        given = f"accelerator={accelerator!r}" if tpu_cores in _NOTHING else f"tpu_cores={tpu_cores!r}"
        raise ConfigError(
            f"{given}: this raylit has no accelerator for TPUs yet; say gpus= instead, or num_workers= for CPUs"
        )


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
    near = {"cpu": "CPU", "cpus": "CPU", "num_cpus": "CPU", "gpu": "GPU", "gpus": "GPU", "num_gpus": "GPU"}
    for key in resources:
        if key.lower() in near and key not in near.values():
            raise ConfigError(f"resources_per_worker={resources!r}: did you mean {near[key.lower()]!r}?")
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
