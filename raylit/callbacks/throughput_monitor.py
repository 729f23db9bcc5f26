"""ThroughputMonitor: batches, samples and operations per second, among the metrics. Runs on every worker."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError


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
