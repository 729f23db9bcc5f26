"""FSDP on two workers in steps that are more than a loss: the numbers are those of plain loops in one process."""

import pytest
import torch
from models import assert_same_weights, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

WIDTH = 72
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
OFF = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"),
    False,
)


class Block(nn.Module):
    """With a scale that is a single number, as ReZero has one."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.scale * self.down(torch.relu(self.up(x)))


def network(num_in=8, num_out=3):
    return nn.Sequential(nn.Linear(num_in, WIDTH), Block(), Block(), nn.Linear(WIDTH, num_out))


def data(num_samples=48):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 8, generator=generator)
    return TensorDataset(x, x[:, :3].sin())


def loader(num_samples=48, batch_size=8):
    return DataLoader(data(num_samples), batch_size=batch_size)


class Net(pl.LightningModule):
    def __init__(self, **hparams):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(7)
        self.net = network()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def loss(self, x, y):
        return functional.mse_loss(self.temperature * self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(model, *, strategy="fsdp", num_workers=2, loader=loader, **arguments):
    trainer = pl.Trainer(num_workers=num_workers, strategy=strategy, **{**OFF, "max_epochs": 2, **arguments})
    trainer.fit(model, loader())
    return trainer


def by_hand(model, *, num_samples=48, num_workers=2, share=lambda number: 1.0, clip=None):
    """`share`: of the ranks, how many take part in global batch `number`."""
    optimizer = model.configure_optimizers()
    x, y = data(num_samples).tensors
    size = 8 * num_workers
    for _ in range(2):
        for number, start in enumerate(range(0, num_samples, size)):
            optimizer.zero_grad()
            own = [slice(start + rank, start + size, num_workers) for rank in share(number)]
            ...
            optimizer.step()
    return weights_of(model)
