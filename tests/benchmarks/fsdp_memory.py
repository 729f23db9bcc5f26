"""What each of four workers holds of a model of 400 MB that is shared out: at rest, and at the worst moment.

    python tests/benchmarks/fsdp_memory.py [--optimizer AdamW] [--strategy ddp]

USS is the memory that nobody else shares, above what the process had before the model was built. A thread samples it;
gathered blocks, gradients, gloo's buffers, the writing of a checkpoint and the way back to the driver are all in it.
"""

import argparse
import shutil
import tempfile
import threading
from typing import Any

import torch
from memory import megabytes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

PHASES = ("build", "train", "save", "end")
WIDTH, NUM_BLOCKS = 1024, 12
"""A block has 8.4 million parameters, 33.6 MB; all of them 403 MB."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Peaks:
    """The most that the process has held above its start, by phase."""

    def __init__(self) -> None:
        self._base = megabytes()["uss"]
        self.phase = PHASES[0]
        self.of_phase: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def now(self) -> float:
        return megabytes()["uss"] - self._base

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(0.01):
            self.of_phase[self.phase] = max(self.of_phase.get(self.phase, 0.0), self.now())


class Model(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self._optimizer = optimizer
        self.blocks: Any = None

    def setup(self, stage: str) -> None:
        self._peaks = Peaks()

    def configure_model(self) -> None:
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(NUM_BLOCKS))

    def on_train_start(self) -> None:
        self._share = self._peaks.now()
        self._peaks.phase = "train"

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._peaks.phase = "save"

    def on_train_end(self) -> None:
        self._peaks.phase = "end"
        measured = (self._share, self._peaks.now(), dict(self._peaks.of_phase))
        self.ranks: list[Any] = [measured] * self.trainer.world_size
        torch.distributed.all_gather_object(self.ranks, measured)

    def teardown(self, stage: str) -> None:
        self._peaks.close()
        self.peak_of_end = self._peaks.of_phase.get("end", 0.0)
        del self._peaks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self._optimizer)(self.parameters(), lr=1e-4)
        return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--optimizer", default="SGD", help="AdamW: two more numbers for each parameter")
    args = parser.parse_args()
    directory = tempfile.mkdtemp()
    model = Model(args.optimizer)
    loader = DataLoader(TensorDataset(torch.randn(args.workers * 4 * 8, WIDTH)), batch_size=8)
    trainer = pl.Trainer(
        num_workers=args.workers,
        resources_per_worker={"CPU": 0.25},
        strategy=args.strategy,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[pl.ModelCheckpoint(every_n_train_steps=2)],
    )
    try:
        trainer.fit(model, loader)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    whole = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    print(f"the model: {whole:.0f} MiB of parameters; {args.strategy}, {args.workers} workers, {args.optimizer}")
    for rank, (share, at_end, peaks) in enumerate(model.ranks):
        phases = ", ".join(f"{phase} {peak:4.0f}" for phase, peak in peaks.items())
        print(f"rank {rank}: USS {share:4.0f} MB when built, {at_end:4.0f} MB after training; at most: {phases}")
    print(f"rank 0 while it hands the weights over: at most {model.peak_of_end:.0f} MB")


if __name__ == "__main__":
    main()
