"""Modules for XLA, whose steps read nothing from the device, and the loop by hand that they are compared with."""

import copy

import pytest
import torch
from models import batches, make_data
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl

QUIET = {
    "accelerator": "xla",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def require_xla() -> None:
    """Skip the module that calls this where torch_xla cannot be imported."""
    pytest.importorskip("torch_xla", reason="needs torch_xla, which runs in a venv of its own", exc_type=ImportError)


class Regression(pl.LightningModule):
    def __init__(self, dropout=0.0, optimizer="adam", width=16):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))
        self.lr = 0.02

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", functional.mse_loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        if self.hparams.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Alternating(Regression):
    """Two optimizers that take turns within each batch, each with half of the layers."""

    def training_step(self, batch, batch_idx, optimizer_idx):
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.05), torch.optim.Adam(self.net[3].parameters(), lr=0.01)]


class Manual(Regression):
    """Manual optimization: the same steps as those of `Alternating`, by the module's own calls."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = functional.mse_loss(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    configure_optimizers = Alternating.configure_optimizers


def fit(model, *, num_samples=48, batch_size=8, max_epochs=2, num_workers=0, seed=5, val=None, ckpt_path=None, **more):
    """Train on what `models.batches` yields, in batches of `batch_size` over all workers."""
    loader = DataLoader(make_data(num_samples), batch_size=batch_size // max(1, num_workers), shuffle=True)
    torch.manual_seed(seed)
    without = {"limit_val_batches": 0} if val is None else {}
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=max_epochs, **{**QUIET, **without, **more})
    trainer.fit(model, loader, val, ckpt_path=ckpt_path)
    return trainer


def train_by_hand(model, *, clip=None, clip_value=None, accumulate=1, epochs=2):
    """Train a copy of the model on the CPU by a plain loop, and return it."""
    model = copy.deepcopy(model)
    optimizers = model.configure_optimizers()
    for _, batch_idx, (x, y) in batches(epochs=epochs):
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            (functional.mse_loss(model.net(x), y) / accumulate).backward()
            if (batch_idx + 1) % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if clip_value is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip_value)
            optimizer.step()
            model.zero_grad()
    return model


def max_difference(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
