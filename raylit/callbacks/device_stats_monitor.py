"""DeviceStatsMonitor: what processors and memory do, among the metrics. Runs on every worker."""

import importlib
import importlib.util
from typing import Any

import torch

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError


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
