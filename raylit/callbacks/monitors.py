"""Callbacks that log learning rates, device statistics and throughput. Run on every worker."""

import importlib
import importlib.util
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer

from raylit.accelerators import choose_accelerator
from raylit.callbacks.base import Callback
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError


class LearningRateMonitor(Callback):
    """Callback that logs each optimizer's learning rate, and on request momentum and weight decay.

    Names: `lr-Adam`; `lr-Adam/pg1`, `/pg2` for several parameter groups, or their own "name" if they have one;
    `lr-Adam-1` for a second optimizer of a class. The "name" of a scheduler's dict replaces all that.

    Args:
        logging_interval: "step" logs at every logging step, "epoch" at the start of each epoch; None follows the
            scheduler's interval, and logs at logging steps if there is no scheduler.
        log_momentum: Also log momentum (or the first beta).
        log_weight_decay: Also log weight decay.

    Raises:
        ConfigError: if the interval is unknown; during a run, if two parameter groups share a name.
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
        """Every value that was logged, by name."""

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self.lrs = {}

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.logging_interval != "epoch" and trainer.is_logging_step:
            for name, value in self._read_values(trainer, interval="step").items():
                pl_module.log(name, value, on_step=True, on_epoch=False)

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self.logging_interval != "step":
            for name, value in self._read_values(trainer, interval="epoch").items():
                pl_module.log(name, value, on_step=False, on_epoch=True, batch_size=1)

    def _read_values(self, trainer: TrainerView, *, interval: str) -> dict[str, float]:
        """Return the values of the optimizers that are logged at this interval."""
        values: dict[str, float] = {}
        for optimizer, name, own_interval in _name_optimizers(trainer):
            if interval != (self.logging_interval or own_interval):
                continue
            names = _name_groups(optimizer, name)
            for group, group_name in zip(optimizer.param_groups, names, strict=True):
                # Some schedulers store the learning rate as a tensor.
                values[group_name] = float(group["lr"])
                self._record(group_name, values[group_name], is_single=len(names) == 1)
                if self.log_momentum:
                    momentum = group["betas"][0] if "betas" in optimizer.defaults else group.get("momentum", 0)
                    values[f"{group_name}-momentum"] = float(momentum)
                if self.log_weight_decay:
                    values[f"{group_name}-weight_decay"] = float(group.get("weight_decay", 0))
        return values

    def _record(self, name: str, value: float, *, is_single: bool) -> None:
        if not is_single and name.endswith("/pg1") and name not in self.lrs:
            # A second group was added, so the first one's name changes.
            self.lrs[name] = self.lrs.pop(name.removesuffix("/pg1"), [])
        self.lrs.setdefault(name, []).append(value)


class DeviceStatsMonitor(Callback):
    """Callback that logs device statistics at start and end of each logging step's batch, as the mean of the workers.

    Names: `DeviceStatsMonitor.on_train_batch_start/cpu_percent`. On CUDA these are torch.cuda.memory_stats', on the CPU
    the load of processor, memory and swap in percent, which needs psutil.

    Args:
        cpu_stats: Log the CPU's statistics always (True), never (False), or only if the device is the CPU (None).

    Raises:
        ConfigError: if psutil is needed and missing.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        if cpu_stats is not False and importlib.util.find_spec("psutil") is None and choose_accelerator().is_host:
            raise ConfigError("DeviceStatsMonitor reads the CPU's statistics with psutil: pip install psutil")
        self.cpu_stats = cpu_stats

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._is_due = trainer.is_logging_step
        if self._is_due:
            self._log(trainer, pl_module, "on_train_batch_start")

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due:
            self._log(trainer, pl_module, "on_train_batch_end")

    def _log(self, trainer: TrainerView, pl_module: LightningModule, hook: str) -> None:
        stats: dict[str, float] = {}
        stats.update(trainer.accelerator.memory_stats())
        if self.cpu_stats or (self.cpu_stats is None and trainer.accelerator.is_host):
            stats.update(_read_cpu_stats())
        for name, value in stats.items():
            pl_module.log(f"{type(self).__qualname__}.{hook}/{name}", float(value), on_step=True, on_epoch=False)


class ThroughputMonitor(Callback):
    """Callback that logs the training speed at logging steps.

    Names, with `separator` in place of the slash: `train/time` (seconds of training, without validation),
    `train/batches`, `train/samples`, `train/lengths`. Once `window_size` batches have passed, averaged over about as
    many: `train/device/batches_per_sec`, `samples_per_sec`, `items_per_sec` (of `length_fn`, all lengths of a batch)
    and `flops_per_sec`; and the same without `device/` for all workers together. The workers' values are averaged.

    `flops_per_sec` is computed from the module's `flops_per_batch`. The device is synchronized at logging steps only.

    Args:
        batch_size_fn: Returns the number of samples in a batch.
        length_fn: Returns the number of items (e.g. tokens) in a batch.
        window_size: Number of batches over which speeds are averaged, at least 2.
        separator: Replaces the slash in names.
        available_flops: Peak FLOP/s of one device; logs the fraction that is used as `train/device/mfu`.

    Raises:
        ConfigError: if `window_size` is less than 2.
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

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._started_at = time.perf_counter()
        self._batches = self._samples = self._lengths = 0
        self._flops = 0.0
        self._marks: deque[_Mark] = deque([_Mark(0.0, 0, 0, 0, 0.0)])
        self._is_due = False

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._is_due = trainer.is_logging_step
        self._window = trainer.num_windows

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        self._samples += self.batch_size_fn(batch)
        if self.length_fn is not None:
            self._lengths += self.length_fn(batch)
        self._flops += getattr(pl_module, "flops_per_batch", 0.0)
        if self._is_due and trainer.num_windows > self._window:
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._started_at += time.perf_counter() - self._paused_at

    def _log(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        trainer.accelerator.synchronize()
        now = _Mark(
            time.perf_counter() - self._started_at, self._batches, self._samples, self._lengths, float(self._flops)
        )
        values = {"time": now.time_s, "batches": now.batches, "samples": now.samples}
        if self.length_fn is not None:
            values["lengths"] = now.lengths
        # Keep the newest mark that is at least a whole window back as the first.
        while len(self._marks) > 1 and now.batches - self._marks[1].batches >= self.window_size:
            self._marks.popleft()
        if now.batches - self._marks[0].batches >= self.window_size:
            values.update(self._compute_rates(self._marks[0], now, world_size=trainer.world_size))
        self._marks.append(now)
        for name, value in values.items():
            full_name = self.separator.join(["train", *name.split("/")])
            pl_module.log(full_name, float(value), on_step=True, on_epoch=False)

    def _compute_rates(self, start: "_Mark", end: "_Mark", *, world_size: int) -> dict[str, float]:
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


def _name_optimizers(trainer: TrainerView) -> list[tuple[Optimizer, str, str]]:
    """Return each optimizer with its name and its scheduler's interval; those with schedulers come first."""
    optimizers: list[tuple[Optimizer, str | None, str]] = [
        (config.scheduler.optimizer, config.name, config.interval) for config in trainer.lr_scheduler_configs
    ]
    scheduled = [optimizer for optimizer, _, _ in optimizers]
    optimizers += [(one, None, "step") for one in trainer.optimizers if not any(one is other for other in scheduled)]
    counts: Counter[str] = Counter()
    result = []
    for optimizer, own_name, interval in optimizers:
        name = own_name or f"lr-{type(optimizer).__name__}"
        counts[name] += 1
        result.append((optimizer, name if counts[name] == 1 else f"{name}-{counts[name] - 1}", interval))
    return result


def _name_groups(optimizer: Optimizer, name: str) -> list[str]:
    groups = optimizer.param_groups
    own_names = [group["name"] for group in groups if "name" in group]
    if len(set(own_names)) < len(own_names):
        raise ConfigError(f"LearningRateMonitor: the parameter groups of {name} share a name: {', '.join(own_names)}")
    if len(groups) == 1:
        return [f"{name}/{own_names[0]}" if own_names else name]
    return [f"{name}/{group.get('name', f'pg{number}')}" for number, group in enumerate(groups, start=1)]


def _read_cpu_stats() -> dict[str, float]:
    psutil: Any = importlib.import_module("psutil")
    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


class _Mark(NamedTuple):
    """Totals at a moment of the training."""

    time_s: float
    batches: int
    samples: int
    lengths: int
    flops: float
