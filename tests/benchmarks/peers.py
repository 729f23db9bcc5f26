"""What the benchmarks train, written once as plain PyTorch, and the peers that are installed."""

import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

WARM_UP = 200
"""Steps before the clock starts."""

Run = Callable[[], float]
"""Seconds per step of a training from its beginning to its end."""


def dataset(num_samples: int, *, width: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(num_samples, width, generator=generator), torch.randn(num_samples, 1, generator=generator)
    )


def network(*, width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))


class Clock:
    """Seconds per step, between two steps."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.started = 0.0
        self.seconds_per_step = 0.0

    def tick(self, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.started = time.perf_counter()
        elif batch_idx == WARM_UP + self.num_steps:
            self.seconds_per_step = (time.perf_counter() - self.started) / self.num_steps


def module_class(base: Any) -> Any:
    """The same module for raylit and for Lightning: it logs every step's loss to the progress bar."""

    class Module(base):  # type: ignore[misc]
        def __init__(self, *, width: int, hidden: int, num_steps: int) -> None:
            super().__init__()
            self.network = network(width=width, hidden=hidden)
            self.clock = Clock(num_steps)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.clock.tick(batch_idx)
            x, y = batch
            loss = functional.mse_loss(self.network(x), y)
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Module


def by_hand(*, width: int, hidden: int, batch_size: int, num_steps: int) -> float:
    """Seconds per step of the loop that a user would write, without any logging."""
    torch.manual_seed(0)
    model = network(width=width, hidden=hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(
        dataset((WARM_UP + num_steps + 1) * batch_size, width=width), batch_size=batch_size, shuffle=True
    )
    clock = Clock(num_steps)
    for index, (x, y) in enumerate(loader):
        clock.tick(index)
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return clock.seconds_per_step


def installed(name: str) -> Any:
    """The package, or None with a word on how to get it."""
    if importlib.util.find_spec(name) is None:
        print(f"{name}: not installed; pip install -e '.[bench]' brings the peers")
        return None
    warnings.filterwarnings("ignore")
    return importlib.import_module(name)


def compare(reference: str, run_reference: Run, contenders: dict[str, Run], *, num_rounds: int) -> None:
    """Run the contenders in turn, the reference before and after each, and print what each takes of its time.

    Each ratio is to the mean of the two neighbours in time, so that a machine that slows down meanwhile, or other work
    on it, changes it little; the median over the rounds drops what is left of that.
    """
    times: dict[str, list[float]] = {reference: [run_reference()], **{name: [] for name in contenders}}
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_rounds):
        for name, run in contenders.items():
            times[name].append(run())
            times[reference].append(run_reference())
            ratios[name].append(times[name][-1] / statistics.mean(times[reference][-2:]))
    print(f"\n{'':32}{'median':>12}{'ratio':>9}{'middle half':>16}{'all':>16}")
    print(f"{reference:32}{statistics.median(times[reference]) * 1e6:9.1f} us")
    for name, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if num_rounds > 1 else values * 3
        print(
            f"{name:32}{statistics.median(times[name]) * 1e6:9.1f} us{median:9.3f}{low:9.3f} - {high:.3f}"
            f"{min(values):9.3f} - {max(values):.3f}"
        )
