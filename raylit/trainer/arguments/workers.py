"""Parse and check the Trainer's arguments on workers, devices, hosts and resources. Driver."""

import os
import re
import sys
from typing import Any, get_args

import torch

from raylit.config.plan import AcceleratorName, PlacementName, Workers
from raylit.errors import ConfigError
from raylit.trainer.arguments.checks import check_count


def is_on_cluster() -> bool:
    """Return True if this process is connected to Ray already or RAY_ADDRESS names a cluster."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and bool(ray.is_initialized()))


_ACCELERATORS: dict[str, AcceleratorName] = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
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
    accelerator: str,
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
    name = _accelerator(accelerator, gpus=gpus, num_processes=num_processes, devices=devices, num_workers=num_workers)
    per_node = _devices_per_node(gpus, num_processes, devices, name)
    total = None if per_node is None else per_node * num_nodes
    if num_workers is None:
        num_workers = _default_num_workers(total, name)
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
    if name == "cuda" and not torch.cuda.is_available() and (num_workers == 0 or not is_on_cluster()):
        raise ConfigError(
            "GPUs are asked for, but torch sees none on this machine: use accelerator='cpu' with num_workers, install "
            "a CUDA build of torch, or connect to a cluster with GPUs (ray.init(address=...) or RAY_ADDRESS)"
        )
    world_size = max(1, num_workers)
    if world_size % num_nodes:
        raise ConfigError(f"{num_workers} workers cannot be spread evenly over num_nodes={num_nodes}")
    return Workers(
        num_workers=num_workers,
        num_nodes=num_nodes if num_nodes > 1 else None,
        accelerator=name,
        resources_per_worker=_resources(resources_per_worker or {}, name),
        placement=_placement(placement, num_nodes=num_nodes),
        label_selector=_label_selector(label_selector or {}),
        start_timeout_s=start_timeout_s,
        **({} if ping_timeout_s is None else _ping_timeouts(ping_timeout_s)),
        keep_s=keep_workers_s,
    )


def _ping_timeouts(given_s: float) -> dict[str, float]:
    return {"ping_timeout_s": given_s, "start_ping_timeout_s": given_s}


def _accelerator(accelerator: str, *, gpus: Any, num_processes: Any, devices: Any, num_workers: Any) -> AcceleratorName:
    if accelerator not in ("auto", *_ACCELERATORS):
        raise ConfigError(f"accelerator={accelerator!r}: must be 'auto', 'cpu', 'gpu' or 'cuda'")
    if gpus not in _NOTHING and accelerator == "cpu":
        raise ConfigError(f"accelerator='cpu' and gpus={gpus!r} contradict each other: leave one out")
    if gpus not in _NOTHING:
        if num_processes is not None:
            raise ConfigError(
                f"gpus={gpus!r} and num_processes={num_processes!r}: processes are CPU workers, choose one"
            )
        return "cuda"
    if accelerator != "auto":
        return _ACCELERATORS[accelerator]
    is_asking_for_cpu = num_processes is not None or gpus in (0, [], "0")
    return "cuda" if torch.cuda.is_available() and not is_asking_for_cpu else "cpu"


def _devices_per_node(gpus: Any, num_processes: int | None, devices: Any, name: AcceleratorName) -> int | None:
    """Return the number of workers per host; None if no argument gives it."""
    given = {
        "gpus": gpus if gpus not in _NOTHING else None,
        "num_processes": num_processes,
        "devices": None if devices == "auto" else devices,
    }
    counts = {key: _count(key, value, name) for key, value in given.items() if value is not None}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"{counts} contradict each other: leave one out")
    return next(iter(counts.values()), None)


def _count(key: str, value: Any, name: AcceleratorName) -> int:
    """Return the number of devices that an int, a list of indices, "2", "0,1", or -1 (all) stands for."""
    if isinstance(value, str):
        parts = [part for part in value.split(",") if part.strip()]
        value = int(parts[0]) if len(parts) == 1 and "," not in value and _is_int(parts[0]) else parts
    if isinstance(value, (list, tuple)):
        return len(value)
    if value == -1:
        return torch.cuda.device_count() if name == "cuda" else os.cpu_count() or 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}={value!r}: must be a positive int, a list of indices, or -1 for all")
    return value


def _is_int(text: str) -> bool:
    return text.strip().lstrip("-").isdigit()


def _refuse_tpus(tpu_cores: Any, accelerator: str) -> None:
    if tpu_cores not in _NOTHING or accelerator in ("tpu", "xla"):
        given = f"accelerator={accelerator!r}" if tpu_cores in _NOTHING else f"tpu_cores={tpu_cores!r}"
        raise ConfigError(
            f"{given}: this raylit has no accelerator for TPUs yet; say gpus= instead, or num_workers= for CPUs"
        )


def _default_num_workers(total: int | None, name: AcceleratorName) -> int:
    if total is None:
        # One GPU, or none, is driven from this process: same numbers, no start of Ray.
        num_gpus = torch.cuda.device_count() if name == "cuda" else 0
        return num_gpus if num_gpus > 1 else 0
    return 0 if total == 1 and name == "cpu" else total


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


def _resources(resources: dict[str, float], name: AcceleratorName) -> dict[str, float]:
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
    if name == "cuda" and resources.get("GPU", 1) == 0:
        raise ConfigError(f"resources_per_worker={resources!r} leaves workers without the GPU that they are to use")
    if name == "cpu" and resources.get("GPU", 0) > 0:
        raise ConfigError(
            f"resources_per_worker={resources!r} and accelerator='cpu': say accelerator='gpu' where workers are to use "
            "the GPU, else leave it out"
        )
    if name == "cpu" and resources.get("CPU", 1) == 0 and not any(resources.values()):
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
