"""What an in-memory data set costs: each worker's unique memory (USS), and driver, Ray and workers all together.

    python tests/benchmarks/shared_memory.py

All together is a sum of PSS, which counts what several processes share once, less the user's own copy in the driver.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from memory import descendants, megabytes
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

ROW_FLOATS = 1024


class Reader(pl.LightningModule):
    """Reads every sample once; measures while all ranks still have the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(ROW_FLOATS, 1)
        self.driver = os.getpid()
        self.uss: list[Any] = []
        self.pss = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).mean()

    def on_train_end(self) -> None:
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, megabytes()["uss"])
        self.uss = gathered
        if self.trainer.is_global_zero:
            self.pss = sum(megabytes(pid)["pss"] for pid in (self.driver, *descendants(self.driver)))
        torch.distributed.barrier()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--num-workers", type=int, default=4)
    args = parser.parse_args()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    models = {}
    for size in (1, args.megabytes):
        rows = torch.ones(size * 1024 * 1024 // 4 // ROW_FLOATS, ROW_FLOATS)
        model = models[size] = Reader()
        pl.fit(model, DataLoader(TensorDataset(rows), batch_size=64), num_workers=args.num_workers, **quiet)
        model.pss -= size
        uss = ", ".join(f"{value:.0f}" for value in model.uss)
        print(f"{size:6} MB of data: USS of the workers {uss} MB; all together {model.pss:.0f} MB")
    more = models[args.megabytes].pss - models[1].pss
    print(f"{args.megabytes - 1} MB more of data cost {args.num_workers} workers {more:.0f} MB together")


if __name__ == "__main__":
    main()
