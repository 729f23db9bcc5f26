"""Parameters that a loss does not depend on: the numbers of a plain loop, where nothing was said of the strategy."""

import copy

import pytest
import torch
from models import assert_same_weights, make_data, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Heads(pl.LightningModule):
    """Which head a batch uses depends on `uses`: a function of the batch's number in the run."""

    def __init__(self, uses, *, num_optimizers=1):
        super().__init__()
        self.uses, self.num_optimizers = uses, num_optimizers
        self.body = nn.Linear(8, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 3) for _ in range(3)])
        self.num_done = 0

    def loss(self, batch, number):
        x, y = batch
        body = self.body(x)
        return functional.mse_loss(sum(self.heads[index](body) for index in self.uses(number)), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch, self.num_done)
        self.num_done += 1
        return loss

    def configure_optimizers(self):
        # With a decay and a momentum a gradient of zero is not the same as none.
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.5)


class OwnStep(Heads):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class ByHand(Heads):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Alternating(Heads):
    """Two optimizers, of which the second has a head that is never used."""

    def training_step(self, batch, batch_idx, optimizer_idx):
        return self.loss(batch, batch_idx)

    def configure_optimizers(self):
        first = [*self.body.parameters(), *self.heads[0].parameters()]
        second = [*self.heads[1].parameters(), *self.heads[2].parameters()]
        return [torch.optim.AdamW(part, lr=0.05, weight_decay=0.5) for part in (first, second)]


def by_hand(model, *, num_epochs=2, accumulate=1):
    optimizers = model.configure_optimizers()
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    loader = DataLoader(make_data(48), batch_size=8)
    for epoch in range(num_epochs):
        for index, batch in enumerate(loader):
            number = index if len(optimizers) > 1 else epoch * len(loader) + index
            for optimizer in optimizers:
                if index % accumulate == 0:
                    model.zero_grad()
                (model.loss(batch, number) / accumulate).backward()
                if (index + 1) % accumulate == 0:
                    optimizer.step()
    return weights_of(model)


def fit(model, *, num_workers=2, max_epochs=2, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"enable_checkpointing": False, **quiet, **arguments}
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=max_epochs, **arguments)
    trainer.fit(model, DataLoader(make_data(48), batch_size=8 // max(1, num_workers)))


def first_only(number):
    return [0]


def later_less(number):
    """All in the first steps, then two heads, then others."""
    return [0, 1, 2] if number < 2 else [0, 1] if number < 8 else [2]


@pytest.mark.parametrize(
    ("kind", "uses", "accumulate"),
    [
        (Heads, first_only, 1),
        (Heads, first_only, 3),
        (Heads, later_less, 1),
        (Heads, later_less, 2),
        (OwnStep, later_less, 1),
        (OwnStep, first_only, 2),
        (ByHand, first_only, 1),
        (Alternating, lambda number: [0, 1], 1),
    ],
)
@pytest.mark.filterwarnings("ignore:the loss does not depend on")
def test_unused_parameters_train_as_in_a_plain_loop(kind, uses, accumulate):
    torch.manual_seed(0)
    model = kind(uses)
    expected = by_hand(copy.deepcopy(model), accumulate=accumulate)
    fit(model, accumulate_grad_batches=accumulate)
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


class ByRank(Heads):
    """The ranks use different heads, in small buckets: some gradients are on their way before others are missed."""

    def training_step(self, batch, batch_idx):
        self.num_done += 1
        use = [0, 1, 2] if self.num_done <= 2 else [0, self.global_rank]
        x, y = batch
        body = self.body(x)
        return functional.mse_loss(sum(self.heads[index](body) for index in use), y)


@pytest.mark.filterwarnings("ignore:the loss does not depend on")
@pytest.mark.parametrize("bucket_cap_mb", [None, 0.0001])
def test_ranks_that_leave_out_different_parameters(bucket_cap_mb):
    torch.manual_seed(0)
    model = ByRank(None)
    single = copy.deepcopy(model)
    optimizer = single.configure_optimizers()
    loader = DataLoader(make_data(48), batch_size=8)
    for number in range(12):
        x, y = list(loader)[number % 6]
        optimizer.zero_grad()
        for rank in range(2):
            use = [0, 1, 2] if number < 2 else [0, rank]
            body = single.body(x[rank::2])
            loss = functional.mse_loss(sum(single.heads[index](body) for index in use), y[rank::2])
            (loss / 2).backward()
        optimizer.step()
    fit(model, strategy=pl.DDPStrategy(find_unused_parameters="auto", bucket_cap_mb=bucket_cap_mb))
    assert_same_weights(weights_of(model), weights_of(single), **TOLERANCE)


@pytest.mark.filterwarnings("default:the loss does not depend on")
def test_unused_parameters_are_named_once(capfd):
    torch.manual_seed(0)
    fit(Heads(first_only))
    told = capfd.readouterr().err
    assert told.count("the loss does not depend on") == 1
    assert all(f"heads.{index}.weight, heads.{index}.bias" in told for index in (1, 2))


def test_unused_parameters_are_an_error_with_strategy_ddp():
    with pytest.raises(pl.ModuleError, match=r"depend on heads\.1\.weight, heads\.1\.bias, heads\.2"):
        fit(Heads(first_only), strategy="ddp")


def test_no_warning_if_all_parameters_are_used(capfd):
    fit(Heads(lambda number: [0, 1, 2]))
    assert "does not depend" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss does not depend on")
def test_a_resumed_run_with_unused_parameters_has_the_same_bits(tmp_path):
    def trained(directory, **arguments):
        torch.manual_seed(0)
        model = Heads(first_only)
        fit(model, num_workers=3, enable_checkpointing=True, default_root_dir=directory, **arguments)
        return weights_of(model)

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", max_epochs=1)
    resumed = trained(tmp_path / "parts", resume="auto")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
