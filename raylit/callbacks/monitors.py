"""Monitors: learning rates, device statistics and throughput, logged as training runs."""

import importlib
import importlib.util
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError


class LearningRateMonitor(Callback):
    """Logs each optimizer's learning rate, with `log_momentum` and `log_weight_decay` those too.

    `logging_interval="step"`: that of every logging step; "epoch": that which each epoch begins with; None: as often as
    the scheduler changes it, and at logging steps where there is none. Names: `lr-Adam`; `lr-Adam/pg1`, `/pg2` of
    several parameter groups, by their own "name" where they have one; `lr-Adam-1` of a second optimizer of a kind; the
    "name" of a scheduler's dict takes the place of all that.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigError(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): must be 'step', 'epoch' or None"
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        """Every value that was logged, by its name."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.lrs = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.logging_interval != "epoch" and trainer.is_logging_step:
            for name, value in self._values(trainer, interval="step").items():
                pl_module.log(name, value, on_step=True, on_epoch=False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.logging_interval != "step":
            for name, value in self._values(trainer, interval="epoch").items():
                pl_module.log(name, value, on_step=False, on_epoch=True, batch_size=1)

    def _values(self, trainer: Any, *, interval: str) -> dict[str, float]:
        """Of the optimizers that are logged at this interval."""
        values: dict[str, float] = {}
        for optimizer, name, own_interval in _named_optimizers(trainer):
            if interval != (self.logging_interval or own_interval):
                continue
            names = _group_names(optimizer, name)
            for group, group_name in zip(optimizer.param_groups, names, strict=True):
                # A scheduler may keep it as a tensor.
                values[group_name] = float(group["lr"])
                self._note(group_name, values[group_name], is_single=len(names) == 1)
                if self.log_momentum:
                    momentum = group["betas"][0] if "betas" in optimizer.defaults else group.get("momentum", 0)
                    values[f"{group_name}-momentum"] = float(momentum)
                if self.log_weight_decay:
                    values[f"{group_name}-weight_decay"] = float(group.get("weight_decay", 0))
        return values

    def _note(self, name: str, value: float, *, is_single: bool) -> None:
        if not is_single and name.endswith("/pg1") and name not in self.lrs:
            # The only group so far has got company.
            self.lrs[name] = self.lrs.pop(name.removesuffix("/pg1"), [])
        self.lrs.setdefault(name, []).append(value)


def _named_optimizers(trainer: Any) -> list[tuple[Optimizer, str, str]]:
    """Each optimizer with its name and how often its scheduler steps; those with schedulers first."""
    found: list[tuple[Optimizer, str | None, str]] = [
        (config.scheduler.optimizer, config.name, config.interval) for config in trainer.lr_scheduler_configs
    ]
    followed = [optimizer for optimizer, _, _ in found]
    found += [(one, None, "step") for one in trainer.optimizers if not any(one is other for other in followed)]
    seen: Counter[str] = Counter()
    named = []
    for optimizer, given, interval in found:
        name = given or f"lr-{type(optimizer).__name__}"
        seen[name] += 1
        named.append((optimizer, name if seen[name] == 1 else f"{name}-{seen[name] - 1}", interval))
    return named


def _group_names(optimizer: Optimizer, name: str) -> list[str]:
    groups = optimizer.param_groups
    own = [group["name"] for group in groups if "name" in group]
    if len(set(own)) < len(own):
        raise ConfigError(f"LearningRateMonitor: the parameter groups of {name} share a name: {', '.join(own)}")
    if len(groups) == 1:
        return [f"{name}/{own[0]}" if own else name]
    return [f"{name}/{group.get('name', f'pg{number}')}" for number, group in enumerate(groups, start=1)]


class DeviceStatsMonitor(Callback):
    """Logs the device's statistics at the start and end of the batch of each logging step, as the mean of the workers.

    Names: `DeviceStatsMonitor.on_train_batch_start/cpu_percent`. On CUDA they are torch.cuda.memory_stats', on the CPU
    the load of processor, memory and swap, which needs psutil. `cpu_stats`: those of the CPU always, never, or (None)
    only where it is the device.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        if cpu_stats is not False and importlib.util.find_spec("psutil") is None and not torch.cuda.is_available():
            raise ConfigError("DeviceStatsMonitor reads the CPU's statistics with psutil: pip install psutil")
        self.cpu_stats = cpu_stats

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._is_due = trainer.is_logging_step
        if self._is_due:
            self._log(pl_module, "on_train_batch_start")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._is_due:
            self._log(pl_module, "on_train_batch_end")

    def _log(self, pl_module: Any, hook: str) -> None:
        device = pl_module.device
        stats: dict[str, float] = {}
        if device.type == "cuda":
            stats.update(torch.cuda.memory_stats(device))
        if self.cpu_stats or (self.cpu_stats is None and device.type == "cpu"):
            stats.update(_cpu_stats())
        for name, value in stats.items():
            pl_module.log(f"{type(self).__qualname__}.{hook}/{name}", float(value), on_step=True, on_epoch=False)


def _cpu_stats() -> dict[str, float]:
    psutil: Any = importlib.import_module("psutil")
    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


class ThroughputMonitor(Callback):
    """Logs how fast the training goes, at logging steps.

    Names, with `separator` for the slash: `train/time` (seconds of training, validation left out), `train/batches`,
    `train/samples`, `train/lengths`; once `window_size` batches have passed, over about so many,
    `train/device/batches_per_sec`, `samples_per_sec`, `items_per_sec` (of `length_fn`, all lengths of a batch) and
    `flops_per_sec`, and the same without `device/` for all workers together. Each worker's values count as their mean.

    `batch_size_fn` and `length_fn` get a batch. The module's `flops_per_batch` says what `flops_per_sec` is made of;
    with `available_flops`, of one device, `train/device/mfu` is the share of it that is used. The device is waited for
    at logging steps only.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int],
        length_fn: Callable[[Any], int] | None = None,
        *,
        window_size: int = 100,
        separator: str = "/",
        available_flops: float | None = None,
    ) -> None:
        if window_size < 2:
            raise ConfigError(f"ThroughputMonitor(window_size={window_size}): must be at least 2 batches")
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.window_size = window_size
        self.separator = separator
        self.available_flops = available_flops

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._started_at = time.perf_counter()
        self._batches = self._samples = self._lengths = 0
        self._flops = 0.0
        self._marks: deque[_Mark] = deque([_Mark(0.0, 0, 0, 0, 0.0)])
        self._is_due = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._is_due = trainer.is_logging_step
        self._window = trainer.num_windows

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches += 1
        self._samples += self.batch_size_fn(batch)
        if self.length_fn is not None:
            self._lengths += self.length_fn(batch)
        self._flops += getattr(pl_module, "flops_per_batch", 0.0)
        if self._is_due and trainer.num_windows > self._window:
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._started_at += time.perf_counter() - self._paused_at

    def _log(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = _Mark(
            time.perf_counter() - self._started_at, self._batches, self._samples, self._lengths, float(self._flops)
        )
        values = {"time": now.time_s, "batches": now.batches, "samples": now.samples}
        if self.length_fn is not None:
            values["lengths"] = now.lengths
        # The oldest mark that is still a whole window back.
        while len(self._marks) > 1 and now.batches - self._marks[1].batches >= self.window_size:
            self._marks.popleft()
        if now.batches - self._marks[0].batches >= self.window_size:
            values.update(self._rates(self._marks[0], now, world_size=trainer.world_size))
        self._marks.append(now)
        for name, value in values.items():
            full_name = self.separator.join(["train", *name.split("/")])
            pl_module.log(full_name, float(value), on_step=True, on_epoch=False)

    def _rates(self, start: "_Mark", end: "_Mark", *, world_size: int) -> dict[str, float]:
        elapsed_s = max(end.time_s - start.time_s, 1e-9)
        rates = {
            "batches_per_sec": (end.batches - start.batches) / elapsed_s,
            "samples_per_sec": (end.samples - start.samples) / elapsed_s,
        }
        if self.length_fn is not None:
            rates["items_per_sec"] = (end.lengths - start.lengths) / elapsed_s
        if end.flops:
            rates["flops_per_sec"] = (end.flops - start.flops) / elapsed_s
        values = {f"device/{name}": rate for name, rate in rates.items()}
        if world_size > 1:
            values.update({name: rate * world_size for name, rate in rates.items()})
        if self.available_flops and "flops_per_sec" in rates:
            values["device/mfu"] = rates["flops_per_sec"] / self.available_flops
        return values


class _Mark(NamedTuple):
    """What was done by a moment of the training."""

    time_s: float
    batches: int
    samples: int
    lengths: int
    flops: float
