"""Stopwatch: how long a trial's batches and steps take, for the speed of a batch size. Worker."""

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from raylit.callbacks.base import Callback
from raylit.worker.batch_size import batch_size_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Medians of a rank's batches of full size, data loading included."""

    num_samples: int
    batch_s: float
    """Without an optimizer's step."""
    step_batch_s: float
    """With one."""

    def samples_per_s(self, window: int) -> float:
        """Where the optimizer steps once in `window` batches."""
        seconds = (window - 1) * self.batch_s + self.step_batch_s
        return window * self.num_samples / seconds if seconds > 0 else 0.0


class Stopwatch(Callback):
    """Times batches until there are enough steps and it has taken long enough; the first step does not count."""

    def __init__(self, *, num_steps: int, least_s: float = 0.0) -> None:
        self._num_steps = max(2, num_steps)
        self._least_s = least_s
        self._since_s = 0.0
        self._started_s = 0.0
        self._num_windows = 0
        self._times: list[tuple[int, float, bool]] = []
        """Samples, seconds, and whether there was a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # what lies between two epochs belongs to no batch
            self._since_s = perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now_s = perf_counter()
        is_step = trainer.num_windows > self._num_windows
        if self._num_windows == 0:
            self._started_s = now_s  # until then memory is allocated, kernels are chosen
        else:
            self._times.append((batch_size_of(batch), now_s - self._since_s, is_step))
        self._num_windows, self._since_s = trainer.num_windows, now_s
        is_enough = self._num_windows >= self._num_steps and now_s - self._started_s >= self._least_s
        trainer.should_stop = trainer.should_stop or is_enough

    def found(self) -> Timing:
        num_samples = max((size for size, _, _ in self._times), default=0)
        full = [(seconds, is_step) for size, seconds, is_step in self._times if size == num_samples]
        with_step = [seconds for seconds, is_step in full if is_step]
        without = [seconds for seconds, is_step in full if not is_step]
        return Timing(
            num_samples=num_samples,
            batch_s=median(without or with_step or [0.0]),
            step_batch_s=median(with_step or without or [0.0]),
        )
