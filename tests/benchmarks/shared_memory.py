"""What an in-memory data set costs: each worker's unique memory (USS) and the host's, with and without the data.

python tests/benchmarks/shared_memory.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

ROW_FLOATS = 1024


def own_megabytes() -> float:
    """Unique set size of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def host_megabytes() -> float:
    """Memory in use, the page cache not counted but shared memory is."""
    fields = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    return (fields["MemTotal"] - fields["MemAvailable"]) / 1024


class Reader(pl.LightningModule):
    """Reads every sample once; every rank's unique memory is gathered at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(ROW_FLOATS, 1)
        self.megabytes: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).mean()

    def on_train_end(self) -> None:
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, own_megabytes())
        self.megabytes = gathered

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--num-workers", type=int, default=4)
    args = parser.parse_args()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    for megabytes in (1, args.megabytes):
        rows = torch.ones(megabytes * 1024 * 1024 // 4 // ROW_FLOATS, ROW_FLOATS)
        model = Reader()
        before = host_megabytes()
        pl.fit(model, DataLoader(TensorDataset(rows), batch_size=64), num_workers=args.num_workers, **quiet)
        uss = ", ".join(f"{value:.0f}" for value in model.megabytes)
        print(f"{megabytes:6} MB of data: USS of the workers {uss} MB; host +{host_megabytes() - before:.0f} MB")


if __name__ == "__main__":
    main()
