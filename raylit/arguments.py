"""From the Trainer's arguments to the groups of a Plan: parsed, checked, explained. Driver."""

import difflib
import os
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch

from raylit.driver.where import is_on_cluster
from raylit.errors import ConfigError, UnknownArgumentError
from raylit.plan import AcceleratorName, BatchLimit, Limits, Optimization, PrecisionName, StrategyName, Workers

_PRECISIONS: dict[str, PrecisionName] = {
    "32": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    **{name: name for name in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")},
}
_ACCELERATORS: dict[str, AcceleratorName] = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
_STRATEGIES = ("auto", "single", "ddp")


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
    start_timeout_s: float,
    keep_s: float | None,
) -> Workers:
    """How many workers of which kind. Nothing asked for: this process, or a worker per GPU where there are several."""
    _at_least(1, num_nodes=num_nodes)
    name = _accelerator(accelerator, gpus=gpus, num_processes=num_processes, devices=devices, num_workers=num_workers)
    per_node = _devices_per_node(gpus, num_processes, devices, name)
    total = None if per_node is None else per_node * num_nodes
    if num_workers is None:
        num_workers = _default_num_workers(total, name)
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
        resources_per_worker=dict(resources_per_worker or {}),
        start_timeout_s=start_timeout_s,
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
        accumulate_batches=accumulate_grad_batches,
        clip_val=gradient_clip_val or None,
        clip_algorithm=algorithm,
        precision=name,
    )


def check_interval(interval: BatchLimit) -> BatchLimit:
    """val_check_interval: a fraction of the epoch above 0, or a positive count of batches."""
    is_fraction = isinstance(interval, float)
    if (is_fraction and not 0 < interval <= 1) or (not is_fraction and interval < 1) or isinstance(interval, bool):
        raise ConfigError(f"val_check_interval={interval!r}: must be a float in (0, 1] or an int of at least 1")
    return interval


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
