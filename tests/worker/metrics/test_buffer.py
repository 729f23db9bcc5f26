"""self.log: names, reductions and steps, over batches and ranks."""

import copy
import math

import pytest
import torch
from models import Regression, RegressionData, make_data
from torch.utils.data import DataLoader

import raylit as pl


class Logs(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("size", float(len(batch[0])), on_step=True, on_epoch=True, prog_bar=True)
        self.log("smallest", loss, on_step=False, on_epoch=True, reduce_fx="min")
        self.log("count", len(batch[0]), on_step=False, on_epoch=True, reduce_fx=torch.sum)
        self.log("spread", loss, on_step=False, on_epoch=True, reduce_fx=lambda values: values.max() - values.min())
        if self.global_rank == 0:
            self.log("only_first", torch.tensor([2.0]), on_step=True)
        return loss

    def on_train_epoch_end(self):
        self.log("rank", float(self.global_rank))

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": 1.0, "num": len(batch[0])}, on_epoch=True, reduce_fx="sum")


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_reductions_over_batches_and_ranks(num_workers, quiet):
    world_size = max(1, num_workers)
    model = Logs()
    dm = RegressionData(batch_size=12 // world_size, num_train=44, num_val=21)
    trainer = pl.fit(model, dm, num_workers=num_workers, max_epochs=1, **quiet)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["count"] == 44
    assert metrics["num"] == 21
    assert metrics["only_first"] == 2.0
    assert metrics["rank"] == pytest.approx((world_size - 1) / 2)
    assert metrics["smallest"] <= min(model.losses)
    assert metrics["spread"] >= max(model.losses) - min(model.losses) - 1e-6
    sizes = {1: [12, 12, 12, 8], 2: [6] * 6 + [4, 4], 3: [4] * 11}[world_size]
    assert metrics["size_epoch"] == metrics["size"] == pytest.approx(sum(size * size for size in sizes) / 44)
    assert metrics["size_step"] == pytest.approx({1: 8, 2: 4, 3: 4}[world_size])
    assert trainer.progress_bar_metrics.keys() == {"size_step", "size_epoch"}


class Steps(pl.DriverCallback):
    def __init__(self):
        self.seen = []

    def on_step_metrics(self, run):
        self.seen.append((run.state.log_step, run.state.callback_metrics["train_loss"]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_step_metrics_arrive_at_every_logging_step_as_the_mean_over_ranks(num_workers, quiet):
    steps = Steps()
    model = Regression()
    one_process = copy.deepcopy(model)
    dm = RegressionData(batch_size=8 // max(1, num_workers), num_train=48)
    pl.fit(model, dm, num_workers=num_workers, max_epochs=2, log_every_n_steps=3, callbacks=[steps], **quiet)
    pl.fit(one_process, RegressionData(batch_size=8, num_train=48), max_epochs=2, **quiet)
    assert [step for step, _ in steps.seen] == [2, 5, 8, 11]
    assert [loss for _, loss in steps.seen] == pytest.approx([one_process.losses[i] for i in (2, 5, 8, 11)])


def test_several_validation_loaders_have_separate_metrics(quiet):
    class Two(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("size", float(len(batch[0])))
            self.log("both", float(dataloader_idx), add_dataloader_idx=False)

    loaders = [DataLoader(make_data(8), batch_size=4), DataLoader(make_data(6), batch_size=2)]
    first, second = pl.Trainer(num_workers=2, **quiet).validate(Two(), loaders, verbose=False)
    assert first == {"size/dataloader_idx_0": 4.0, "both": pytest.approx(3 / 7)}
    assert second == {"size/dataloader_idx_1": 2.0}


class Masked(Regression):
    """Of each batch's samples only so many count; the loss of none at all is nan, as a mean over nothing is."""

    values, num_unmasked, size_of = (5.0, 8.0, 100.0, torch.nan), (2, 2, 0, 0), int

    def log_masked(self, place):
        value, size = self.values[place], self.size_of(self.num_unmasked[place])
        self.log("v", value, batch_size=size, on_step=False, on_epoch=True)
        self.log("as_tensor", torch.tensor(value), batch_size=size, on_step=False, on_epoch=True)
        self.log("empty", value, batch_size=0, on_step=False, on_epoch=True)

    def training_step(self, batch, batch_idx):
        self.log_masked(batch_idx * self.trainer.world_size + self.global_rank)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log_masked(batch_idx * self.trainer.world_size + self.global_rank)

    def on_validation_epoch_end(self):
        self.seen = self.trainer.callback_metrics


class MaskedByTensors(Masked):
    size_of = staticmethod(torch.tensor)


@pytest.mark.parametrize("module", [Masked, MaskedByTensors])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_of_size_0_is_not_counted(module, num_workers, quiet):
    loader = DataLoader(make_data(16), batch_size=4)
    model = module()
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=1, num_sanity_val_steps=0, **quiet)
    trainer.fit(model, loader, loader)
    trained = trainer.callback_metrics
    [validated] = trainer.validate(model, loader, verbose=False)
    for metrics in (trained, validated):
        assert float(metrics["v"]) == float(metrics["as_tensor"]) == 6.5  # (5 * 2 + 8 * 2) / 4
        assert math.isnan(metrics["empty"])
    # The hook at the epoch's end sees rank 0's own batches.
    assert model.seen["v"] == (6.5 if num_workers == 0 else 5.0)
    assert math.isnan(model.seen["empty"])


@pytest.mark.parametrize(
    ("value", "arguments", "message"),
    [
        ("text", {}, "must be a number"),
        (torch.zeros(3), {}, "must have one element"),
        (1.0, {"reduce_fx": "median"}, "reduce_fx='median'"),
    ],
)
def test_logging_values_or_arguments_that_are_not_allowed_is_an_error(value, arguments, message, quiet):
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            self.log("x", value, **arguments)
            return super().training_step(batch, batch_idx)

    with pytest.raises(pl.ConfigError, match=message):
        pl.fit(Wrong(), RegressionData(), max_epochs=1, **quiet)


def test_logging_one_name_in_two_ways_is_an_error(quiet):
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            self.log("x", 1.0, prog_bar=bool(batch_idx))
            return super().training_step(batch, batch_idx)

    with pytest.raises(pl.ConfigError, match="other arguments than before"):
        pl.fit(Wrong(), RegressionData(), max_epochs=1, **quiet)
