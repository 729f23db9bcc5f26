"""What a save costs the training loop: 200 MB of weights and as much optimizer state, saved every 20 steps, beside
Lightning's synchronous save.

python tests/benchmarks/checkpoint.py
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from peers import dataset, installed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl

WIDTH, NUM_LAYERS, BATCH_SIZE = 2048, 12, 32
EVERY = 20
"""Steps between two saves."""
NUM_QUIET = 8
"""Of these, the last ones, which no save disturbs: what a step takes by itself."""


def module_class(base: Any) -> Any:
    class Module(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
            self.times: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.times.append(time.perf_counter())
            x, _ = batch
            return functional.mse_loss(self.network(x), x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    return Module


def loader(num_saves: int) -> Any:
    return DataLoader(dataset((num_saves + 1) * EVERY * BATCH_SIZE, width=WIDTH), batch_size=BATCH_SIZE)


def with_raylit(num_saves: int, **arguments: Any) -> list[float]:
    model = module_class(pl.LightningModule)()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        saving = pl.ModelCheckpoint(directory, every_n_train_steps=EVERY)
        pl.fit(
            model,
            loader(num_saves),
            max_epochs=1,
            callbacks=saving,
            logger=False,
            enable_progress_bar=False,
            **arguments,
        )
    return list(model.times)


def with_lightning(lightning: Any, num_saves: int) -> list[float]:
    model = module_class(lightning.LightningModule)()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        saving = lightning.pytorch.callbacks.ModelCheckpoint(directory, every_n_train_steps=EVERY)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=saving, logger=False, enable_progress_bar=False
        )
        trainer.fit(model, loader(num_saves))
    return list(model.times)


def steps(times: list[float]) -> tuple[float, list[float]]:
    """An undisturbed step; and for the step with a save in it and each until the next one, what it takes more. Medians
    over the saves, so that the machine's other work counts little."""
    taken = [after - before for before, after in itertools.pairwise(times)]
    windows = [taken[first : first + EVERY] for first in range(EVERY - 1, len(taken) - EVERY, EVERY)]
    quiet = statistics.median(step for window in windows for step in window[-NUM_QUIET:])
    return quiet, [statistics.median(place) - quiet for place in zip(*windows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-saves", type=int, default=8)
    parser.add_argument("--without-peers", action="store_true")
    args = parser.parse_args()
    contenders = {
        "raylit, num_workers=0": partial(with_raylit, args.num_saves, num_workers=0),
        "raylit, num_workers=1": partial(with_raylit, args.num_saves, num_workers=1),
        "raylit, not asynchronous": partial(with_raylit, args.num_saves, num_workers=0, checkpoint_async=False),
    }
    lightning = None if args.without_peers else installed("lightning")
    if lightning is not None:
        contenders["Lightning"] = partial(with_lightning, lightning, args.num_saves)
    results = {name: run() for name, run in contenders.items()}
    print(f"\n{'':32}{'a step':>10}{'a save':>10}   of that, in each step from the save on")
    for name, times in results.items():
        quiet, extra = steps(times)
        each = " ".join(f"{value * 1000:.0f}" for value in extra)
        print(f"{name:32}{quiet:8.3f} s{sum(extra):8.3f} s   {each} ms")


if __name__ == "__main__":
    main()
