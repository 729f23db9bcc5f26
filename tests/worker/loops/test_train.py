"""The last accumulation window of an epoch of unknown length takes an optimizer step like any other."""

import csv

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import raylit as pl

BATCHES = (torch.arange(24.0)[:, None] / 24).split(4)


class Stream(IterableDataset):
    """Stream of the first `num_batches` of `BATCHES`."""

    def __init__(self, num_batches):
        self.num_batches = num_batches

    def __iter__(self):
        return iter(BATCHES[: self.num_batches])


class TooLong(Stream):
    def __len__(self):
        return self.num_batches + 3


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
        with torch.no_grad():
            self.net.weight.fill_(0.5)
            self.net.bias.fill_(0.1)

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch) - 1).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Counts(pl.Callback):
    def __init__(self, ends_epoch_at=None):
        self.ends_epoch_at = ends_epoch_at
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        return -1 if batch_idx == self.ends_epoch_at else None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.global_step, round(trainer.optimizers[0].param_groups[0]["lr"], 6)))


def by_hand(windows):
    """The weight and bias after a step for each window, which is a list of batches that each count alike."""
    model = Line()
    rate = 0.1
    for number, (window, size) in enumerate(windows):
        model.zero_grad()
        for batch in window:
            ((model.net(batch) - 1).square().mean() / size).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * 0.5**number * parameter.grad
    return [parameter.detach() for parameter in model.parameters()]


def run(tmp_path, data, *, num_workers=0, callback=None, **arguments):
    counts, model = callback or Counts(), Line()
    trainer = pl.Trainer(
        num_workers=num_workers,
        accumulate_grad_batches=2,
        callbacks=counts,
        logger=pl.CSVLogger(str(tmp_path), name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "log_every_n_steps": 2, **arguments},
    )
    trainer.fit(model, DataLoader(data, batch_size=None))
    return trainer, model, counts.seen


def logged_steps(tmp_path):
    with open(tmp_path / "metrics.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if not row["goodput/fraction"]]


@pytest.mark.parametrize("kind", [Stream, TooLong])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_short_last_window_of_a_stream_takes_an_optimizer_step(kind, num_workers, tmp_path):
    """Three batches of each worker are two windows; the second one has a single batch."""
    trainer, model, seen = run(tmp_path, kind(6 if num_workers else 3), num_workers=num_workers)
    assert seen == [(0, 0.1), (1, 0.05), (2, 0.025)]
    assert trainer.global_step == 2
    assert logged_steps(tmp_path) == [1]
    windows = [(BATCHES[0:2], 2), (BATCHES[2:3], 2)]
    if num_workers:  # batches 0, 2 and 4 of one rank, 1, 3 and 5 of the other
        windows = [(BATCHES[0:4], 4), (BATCHES[4:6], 4)]
    for parameter, expected in zip(model.parameters(), by_hand(windows), strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


def test_the_window_count_continues_in_the_next_epoch(tmp_path):
    trainer, _, seen = run(tmp_path, Stream(3), max_epochs=3, log_every_n_steps=3)
    assert [step for step, _ in seen] == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert trainer.global_step == 6
    assert logged_steps(tmp_path) == [2, 5]


def test_a_hook_that_ends_the_epoch_inside_a_window_still_takes_its_optimizer_step(tmp_path):
    trainer, model, seen = run(tmp_path, Stream(6), callback=Counts(ends_epoch_at=3))
    assert [step for step, _ in seen] == [0, 1, 1]
    assert trainer.global_step == 2
    assert logged_steps(tmp_path) == [1]
    for parameter, expected in zip(model.parameters(), by_hand([(BATCHES[0:2], 2), (BATCHES[2:3], 2)]), strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize(("num_batches", "steps"), [(3, [0, 1, 2]), (4, [0, 1, 1, 2])])
def test_max_steps_counts_the_last_window(num_batches, steps, tmp_path):
    trainer, _, seen = run(tmp_path, Stream(num_batches), max_epochs=5, max_steps=2)
    assert [step for step, _ in seen] == steps
    assert (trainer.current_epoch, trainer.global_step) == (1, 2)
