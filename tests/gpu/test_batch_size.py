"""The search for a batch size on a CUDA device, whose errors of memory are real."""

import pytest
import torch
from torch.utils.data import DataLoader

import raylit as pl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Allocates(pl.LightningModule):
    """Takes a megabyte of the device for each sample of a batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batch_size = 1

    def training_step(self, batch, batch_idx):
        taken = torch.zeros(len(batch), 250_000, device=self.device)
        return self.layer(batch).mean() + taken[0, 0]

    def train_dataloader(self):
        return DataLoader(torch.ones(512, 1), batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_device_is_empty_after_sizes_that_were_too_large(num_workers, quiet):
    trainer = pl.Trainer(num_workers=num_workers, accelerator="gpu", **quiet)
    size = trainer.tuner.scale_batch_size(Allocates(), init_val=16, memory_limit_bytes=200_000_000)
    assert (size, trainer.tuner.batch_sizes.results["status"][-1]) == (128, "too large")
    assert "out of memory" in trainer.tuner.batch_sizes.results["error"][-1]
    assert torch.cuda.memory_allocated() == 0
    assert torch.empty(400_000_000, dtype=torch.uint8, device="cuda").numel() == 400_000_000
