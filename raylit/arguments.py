"""From the Trainer's arguments to the groups of a Plan: parsed, checked, explained. Driver."""

import difflib
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch

from raylit.driver.where import is_on_cluster
from raylit.errors import ConfigError, UnknownArgumentError
from raylit.plan import (
    AcceleratorName,
    BatchLimit,
    Limits,
    Optimization,
    PlacementName,
    PrecisionName,
    StrategyName,
    Validation,
    Workers,
)

_PRECISIONS: dict[str, PrecisionName] = {
    "32": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    **{name: name for name in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")},
}
_ACCELERATORS: dict[str, AcceleratorName] = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
_STRATEGIES = ("auto", "single", "ddp")
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"([a-zA-Z0-9.-]+/)?{_LABEL}")
_LABEL_CONDITION = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")


def refuse_unknown(unknown: Iterable[str], known: Iterable[str]) -> None:
    """UnknownArgumentError for the first of `unknown`, with the nearest name that is known."""
    for name in unknown:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see help(raylit.Trainer) for those that it has"
        raise UnknownArgumentError(f"Trainer has no argument {name!r}: {hint}")


def parse_workers(
    *,
    num_workers: int | None,
    gpus: int | str | list[int] | None,
    num_nodes: int,
    num_processes: int | None,
    accelerator: str,
    devices: int | str | list[int],
    strategy: str,
    resources_per_worker: dict[str, float] | None,
    placement: str | None,
    label_selector: dict[str, str] | None,
    start_timeout_s: float,
    ping_timeout_s: float,
    keep_s: float | None,
) -> Workers:
    """How many workers of which kind. Nothing asked for: this process, or a worker per GPU where there are several."""
    _at_least(1, num_nodes=num_nodes)
    if ping_timeout_s < 0:
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
    if strategy not in _STRATEGIES:
        raise ConfigError(f"strategy={strategy!r}: must be one of {', '.join(map(repr, _STRATEGIES))}")
    if strategy == "single" and world_size > 1:
        raise ConfigError(f"strategy='single' with {num_workers} workers: use 'ddp' or 'auto'")
    chosen: StrategyName = "ddp" if world_size > 1 else "single"
    if world_size % num_nodes:
        raise ConfigError(f"{num_workers} workers cannot be spread evenly over num_nodes={num_nodes}")
    return Workers(
        num_workers=num_workers,
        num_nodes=num_nodes if num_nodes > 1 else None,
        accelerator=name,
        strategy=chosen,
        resources_per_worker=_resources(resources_per_worker or {}, name),
        placement=_placement(placement, num_nodes=num_nodes),
        label_selector=_label_selector(label_selector or {}),
        start_timeout_s=start_timeout_s,
        ping_timeout_s=ping_timeout_s,
        keep_s=keep_s,
    )


def parse_limits(
    *,
    max_epochs: int | None,
    min_epochs: int | None,
    max_steps: int,
    min_steps: int | None,
    limit_train_batches: BatchLimit,
    limit_val_batches: BatchLimit,
    limit_test_batches: BatchLimit,
    limit_predict_batches: BatchLimit,
    num_sanity_val_steps: int,
    fast_dev_run: bool | int,
) -> Limits:
    """Lightning's -1 and None for "no limit" become None."""
    limits = {
        "limit_train_batches": limit_train_batches,
        "limit_val_batches": limit_val_batches,
        "limit_test_batches": limit_test_batches,
        "limit_predict_batches": limit_predict_batches,
    }
    for name, limit in limits.items():
        _check_limit(name, limit)
    if max_steps < -1 or (max_epochs is not None and max_epochs < -1):
        raise ConfigError(f"max_epochs={max_epochs}, max_steps={max_steps}: must be -1 (no limit) or more")
    if fast_dev_run:
        count = int(fast_dev_run)
        _at_least(1, fast_dev_run=count)
        return Limits(
            max_epochs=1,
            max_steps=count,
            train_batches=count,
            val_batches=count,
            test_batches=count,
            predict_batches=count,
            sanity_val_batches=0,
        )
    if max_epochs is None:
        max_epochs = 1000 if max_steps == -1 else -1
    return Limits(
        max_epochs=None if max_epochs == -1 else max_epochs,
        min_epochs=min_epochs or 0,
        max_steps=None if max_steps == -1 else max_steps,
        min_steps=min_steps or 0,
        train_batches=limit_train_batches,
        val_batches=limit_val_batches,
        test_batches=limit_test_batches,
        predict_batches=limit_predict_batches,
        sanity_val_batches=num_sanity_val_steps,
    )


def parse_optimization(
    *,
    accumulate_grad_batches: int,
    gradient_clip_val: float | None,
    gradient_clip_algorithm: str | None,
    precision: int | str,
    accelerator: AcceleratorName,
) -> Optimization:
    """A clip value of 0 means none, as it always has in Lightning."""
    _at_least(1, accumulate_grad_batches=accumulate_grad_batches)
    if gradient_clip_val is not None and gradient_clip_val < 0:
        raise ConfigError(f"gradient_clip_val={gradient_clip_val}: must be 0 (no clipping) or more")
    algorithm: Literal["norm", "value"] = "value" if gradient_clip_algorithm == "value" else "norm"
    if gradient_clip_algorithm not in (None, "norm", "value"):
        raise ConfigError(f"gradient_clip_algorithm={gradient_clip_algorithm!r}: must be 'norm' or 'value'")
    if str(precision) not in _PRECISIONS:
        raise ConfigError(f"precision={precision!r}: must be one of {', '.join(_PRECISIONS)}")
    name = _PRECISIONS[str(precision)]
    if name == "16-mixed" and accelerator == "cpu":
        warnings.warn("precision='16-mixed' needs a GPU; 'bf16-mixed' is used on CPU", stacklevel=4)
        name = "bf16-mixed"
    return Optimization(
        accumulation=((0, accumulate_grad_batches),),
        clip_val=gradient_clip_val or None,
        clip_algorithm=algorithm,
        precision=name,
    )


def parse_validation(interval: BatchLimit, every_n_epochs: int, *, is_dev_run: bool) -> Validation:
    """`interval`: a fraction of the epoch above 0, or a positive count of batches."""
    is_fraction = isinstance(interval, float)
    if (is_fraction and not 0 < interval <= 1) or (not is_fraction and interval < 1) or isinstance(interval, bool):
        raise ConfigError(f"val_check_interval={interval!r}: must be a float in (0, 1] or an int of at least 1")
    return Validation(interval=1.0 if is_dev_run else interval, every_n_epochs=every_n_epochs)


def _at_least(least: int, **named: int) -> None:
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: must be an int of at least {least}")


def _check_limit(name: str, limit: BatchLimit) -> None:
    if isinstance(limit, bool) or limit < 0 or (isinstance(limit, float) and limit > 1):
        raise ConfigError(f"{name}={limit!r}: must be a float in [0, 1] (a fraction) or an int (a count of batches)")


def _accelerator(accelerator: str, *, gpus: Any, num_processes: Any, devices: Any, num_workers: Any) -> AcceleratorName:
    if accelerator not in ("auto", *_ACCELERATORS):
        raise ConfigError(f"accelerator={accelerator!r}: must be 'auto', 'cpu', 'gpu' or 'cuda'")
    if gpus not in (None, 0, [], "0", "") and accelerator == "cpu":
        raise ConfigError(f"accelerator='cpu' and gpus={gpus!r} contradict each other: leave one out")
    if gpus not in (None, 0, [], "0", ""):
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
    """How many workers each host has; None where that was not said."""
    given = {
        "gpus": gpus if gpus not in (0, [], "0", "") else None,
        "num_processes": num_processes,
        "devices": None if devices == "auto" else devices,
    }
    counts = {key: _count(key, value, name) for key, value in given.items() if value is not None}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"{counts} contradict each other: leave one out")
    return next(iter(counts.values()), None)


def _count(key: str, value: Any, name: AcceleratorName) -> int:
    """An int, a list of indices, "2", "0,1", or -1 for all."""
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


def _default_num_workers(total: int | None, name: AcceleratorName) -> int:
    if total is None:
        # One GPU, or none, is driven from this process: same numbers, no start of Ray.
        num_gpus = torch.cuda.device_count() if name == "cuda" else 0
        return num_gpus if num_gpus > 1 else 0
    return 0 if total == 1 and name == "cpu" else total


def _refuse_without_workers(*, num_nodes: int, **given: Any) -> None:
    """What is said of workers means that there are to be some."""
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
