"""What the benchmarks train, written once as plain PyTorch, and the peers that are installed."""

import importlib
import importlib.util
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

WARM_UP = 200
"""Steps before the clock starts."""


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


def table(times: dict[str, list[float]], reference: str) -> None:
    """Medians, and the median of each round's ratio to the reference."""
    print(f"\n{'':32}{'median':>12}{'ratio':>8}{'(min - max)':>16}")
    for name, values in times.items():
        ratios = sorted(value / base for value, base in zip(values, times[reference], strict=True))
        median = sorted(values)[len(values) // 2]
        middle = ratios[len(ratios) // 2]
        print(f"{name:32}{median * 1e6:9.1f} us{middle:8.2f}{ratios[0]:9.2f} - {ratios[-1]:.2f}")
