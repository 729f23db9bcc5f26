"""Steps per second of two CPU workers on a network of 3 million parameters, against a hand-written DDP script.

python tests/benchmarks/ddp_throughput.py
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from peers import WARM_UP, Clock, compare, dataset, installed, module_class, network
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import raylit as pl

WIDTH, HIDDEN, BATCH_SIZE, NUM_RANKS = 1024, 2900, 32, 2


def rank_by_hand(rank: int, num_steps: int, directory: str) -> None:
    """One process of the script that a user would write."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // NUM_RANKS))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=NUM_RANKS)
    torch.manual_seed(0)
    model = DistributedDataParallel(network(width=WIDTH, hidden=HIDDEN))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = dataset(samples(num_steps), width=WIDTH)
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=NUM_RANKS, rank=rank)
    clock = Clock(num_steps)
    for index, (x, y) in enumerate(DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)):
        clock.tick(index)
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    if rank == 0:
        Path(directory, "seconds").write_text(repr(clock.seconds_per_step))
    dist.destroy_process_group()


def samples(num_steps: int) -> int:
    return (WARM_UP + num_steps + 1) * BATCH_SIZE * NUM_RANKS


def by_hand(num_steps: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(rank_by_hand, args=(num_steps, directory), nprocs=NUM_RANKS)
        return float(Path(directory, "seconds").read_text())


def with_sgd(base: Any) -> Any:
    class Module(module_class(base)):  # type: ignore[misc]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Module


def with_raylit(num_steps: int, directory: str) -> float:
    model = with_sgd(pl.LightningModule)(width=WIDTH, hidden=HIDDEN, num_steps=num_steps)
    loader = DataLoader(dataset(samples(num_steps), width=WIDTH), batch_size=BATCH_SIZE, shuffle=True)
    pl.fit(model, loader, num_workers=NUM_RANKS, max_epochs=1, default_root_dir=directory)
    return float(model.clock.seconds_per_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--without-peers", action="store_true")
    args = parser.parse_args()
    directory = tempfile.mkdtemp()
    contenders = {"raylit, num_workers=2": partial(with_raylit, args.num_steps, directory)}
    lightning = None if args.without_peers else installed("lightning")
    if lightning is not None:
        contenders["Lightning, ddp_fork"] = partial(with_lightning, lightning, args.num_steps, directory)
    compare("DDP by hand", partial(by_hand, args.num_steps), contenders, num_rounds=args.rounds)


def with_lightning(lightning: Any, num_steps: int, directory: str) -> float:
    path = Path(directory, "lightning-seconds")
    model = lightning_module(lightning)(width=WIDTH, hidden=HIDDEN, num_steps=num_steps, path=path)
    loader = DataLoader(dataset(samples(num_steps), width=WIDTH), batch_size=BATCH_SIZE, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=NUM_RANKS,
        strategy="ddp_fork",
        default_root_dir=directory,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return float(path.read_text())


def lightning_module(lightning: Any) -> Any:
    class Module(with_sgd(lightning.LightningModule)):  # type: ignore[misc]
        def __init__(self, *, path: Path, **shape: int) -> None:
            super().__init__(**shape)
            self.path = path

        def on_fit_start(self) -> None:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // NUM_RANKS))

        def on_train_end(self) -> None:
            if self.global_rank == 0:
                self.path.write_text(repr(self.clock.seconds_per_step))

    return Module


if __name__ == "__main__":
    main()
