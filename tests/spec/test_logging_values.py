"""self.log: what is read is what a loop by hand computes, for every reduction, form and number of workers."""

import math

import numpy as np
import pytest
import torch
from models import Regression, make_data
from torch.utils.data import DataLoader

import raylit as pl

NUM_SAMPLES = 44


def first_column(num=NUM_SAMPLES):
    return make_data(num).tensors[0][:, 0]


WAYS = {
    "mean": "mean",
    "sum": "sum",
    "min": min,
    "max": torch.max,
    "spread": lambda values: values.max() - values.min(),
    "last": lambda values: values[-1],
}


class Reductions(Regression):
    """Logs the largest first column of every batch in every way."""

    def test_step(self, batch, batch_idx):
        for name, reduce_fx in WAYS.items():
            self.log(name, batch[0][:, 0].max(), reduce_fx=reduce_fx)
        self.log("even", float(batch_idx % 2), batch_size=1)
        self.log("size", len(batch[0]), on_step=True, on_epoch=True)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_every_reduction_is_that_of_a_single_process(num_workers, quiet):
    loader = DataLoader(make_data(NUM_SAMPLES), batch_size=5)
    (results,) = pl.Trainer(num_workers=num_workers, **quiet).test(Reductions(), loader, verbose=False)
    values = torch.stack([x[:, 0].max() for x, _ in loader]).double()
    sizes = torch.tensor([float(len(x)) for x, _ in loader])
    expected = {
        "mean": (values * sizes).sum() / sizes.sum(),
        "sum": values.sum(),
        "min": values.min(),
        "max": values.max(),
        "spread": values.max() - values.min(),
        "last": values[-1],
        "size_epoch": (sizes * sizes).sum() / sizes.sum(),
    }
    even = results.pop("even")
    assert results == {name: pytest.approx(value.item(), abs=1e-6) for name, value in expected.items()}
    if num_workers < 2:  # batch_idx counts a worker's own batches
        assert even == pytest.approx(4 / 9)


class StepForms(Regression):
    def training_step(self, batch, batch_idx):
        x = batch[0][:, 0]
        self.log("mean", x.mean(), on_step=True, on_epoch=True)
        self.log("sum", x.sum(), reduce_fx="sum", on_epoch=True)
        self.log("min", x.min(), reduce_fx="min", on_epoch=True)
        self.log("custom", x.sum(), reduce_fx=lambda values: values.sum(), on_epoch=True)
        return super().training_step(batch, batch_idx)

    validation_step = pl.LightningModule.validation_step


class Steps(pl.DriverCallback):
    def __init__(self):
        self.seen = []

    def on_step_metrics(self, run):
        self.seen.append(dict(run.state.callback_metrics))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_step_forms_are_reduced_over_the_workers_as_asked(num_workers, quiet):
    """Two workers share batches of 8; a function of the epoch's values leaves a step's alone: their mean."""
    steps = Steps()
    loader = DataLoader(make_data(48), batch_size=8 // max(1, num_workers), shuffle=False)
    trainer = pl.fit(
        StepForms(), loader, num_workers=num_workers, max_epochs=1, log_every_n_steps=1, callbacks=[steps], **quiet
    )
    x = first_column(48)
    batches = x.reshape(6, 8)
    for seen, batch in zip(steps.seen, batches, strict=True):
        assert seen["mean_step"] == pytest.approx(batch.mean().item(), abs=1e-6)
        assert seen["sum_step"] == pytest.approx(batch.sum().item(), abs=1e-5)
        assert seen["min_step"] == pytest.approx(batch.min().item())
        assert seen["custom_step"] == pytest.approx(batch.sum().item() / max(1, num_workers), abs=1e-5)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["mean_epoch"] == metrics["mean"] == pytest.approx(x.mean().item(), abs=1e-6)
    assert metrics["sum_epoch"] == pytest.approx(x.sum().item(), abs=1e-5)
    assert metrics["min_epoch"] == pytest.approx(x.min().item())
    assert metrics["custom_epoch"] == pytest.approx(x.sum().item(), abs=1e-5)


class Partial(Regression):
    """Keys that only some workers, or some batches, log."""

    def test_step(self, batch, batch_idx):
        if self.global_rank == 1 or self.trainer.world_size == 1:
            self.log("of_one_rank", float(len(batch[0])))
        if batch_idx == 1:
            self.log("of_one_batch", batch[0][:, 0].mean())
        self.log("zero_only", float(self.global_rank + 1), rank_zero_only=True)
        self.log("shown", 1.0, prog_bar=self.global_rank == 1)

    validation_step = test_step


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_key_is_reduced_over_those_that_logged_it(num_workers, quiet):
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    (results,) = trainer.test(Partial(), DataLoader(make_data(24), batch_size=4), verbose=False)
    assert results["of_one_rank"] == 4.0
    assert results["zero_only"] == 1.0
    rows = first_column(24).reshape(6, 4)[num_workers : 2 * num_workers]
    assert results["of_one_batch"] == pytest.approx(rows.mean().item(), abs=1e-6)
    assert ("shown" in trainer.progress_bar_metrics) == (num_workers > 1)


def test_a_value_logged_in_some_batches_is_reported_once(quiet):
    class Seldom(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                self.log("seldom", float(batch_idx))
            return super().training_step(batch, batch_idx)

    class Seen(pl.Logger):
        def __init__(self):
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

    logger = Seen()
    loader = DataLoader(make_data(48), batch_size=8)
    quiet["logger"] = logger
    trainer = pl.fit(Seldom(), loader, loader, max_epochs=2, log_every_n_steps=1, limit_val_batches=1, **quiet)
    assert [step for step, metrics in logger.rows if "seldom" in metrics] == [2, 8]
    assert trainer.callback_metrics["seldom"].item() == 2.0


VALUES = {
    "float": (1.5, 1.5),
    "int": (3, 3.0),
    "bool": (True, 1.0),
    "integer tensor": (torch.tensor(7), 7.0),
    "bool tensor": (torch.tensor(True), 1.0),
    "half": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "one element": (torch.tensor([2.0]), 2.0),
    "numpy": (np.float32(0.25), 0.25),
    "infinity": (math.inf, math.inf),
}


def test_any_number_can_be_logged(quiet):
    class Numbers(Regression):
        def test_step(self, batch, batch_idx):
            for name, (value, _) in VALUES.items():
                self.log(name, value, on_step=True, on_epoch=True)
            self.log("nan", math.nan if batch_idx else 0.0)
            self.log("nan_min", torch.tensor(math.nan if batch_idx else 0.0), reduce_fx="min")

    (results,) = pl.Trainer(**quiet).test(Numbers(), DataLoader(make_data(8), batch_size=4), verbose=False)
    assert math.isnan(results.pop("nan"))
    assert math.isnan(results.pop("nan_min"))
    assert results == {f"{name}_epoch": value for name, (_, value) in VALUES.items()}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2), "must have one element"),
        ({"a": 1.0}, "for a dict there is self.log_dict"),
        ([1.0, 2.0], "must be a number"),
        (None, "must be a number"),
    ],
)
def test_what_is_no_number_is_an_error(value, message, quiet):
    class Wrong(Regression):
        def test_step(self, batch, batch_idx):
            self.log("x", value)

    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(**quiet).test(Wrong(), DataLoader(make_data(8), batch_size=4), verbose=False)


def test_a_later_value_of_another_shape_is_an_error_that_names_it(quiet):
    class Wrong(Regression):
        def test_step(self, batch, batch_idx):
            self.log("x", torch.zeros(batch_idx + 1))

    with pytest.raises(pl.ConfigError, match=r"self.log\('x'\)"):
        pl.Trainer(**quiet).test(Wrong(), DataLoader(make_data(8), batch_size=4), verbose=False)


def test_the_graph_of_a_value_is_let_go(quiet):
    class Graph(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("kept", loss, enable_graph=True, sync_dist=True, sync_dist_group=None, on_epoch=True)
            return loss

    loader = DataLoader(make_data(8), batch_size=4)
    trainer = pl.fit(Graph(), loader, loader, max_epochs=1, **quiet)
    assert not trainer.callback_metrics["kept"].requires_grad


def test_one_name_in_training_and_validation_is_the_value_of_each_in_its_turn(quiet):
    class Same(Regression):
        def training_step(self, batch, batch_idx):
            self.log("x", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("x", 2.0, prog_bar=True)

    class Seen(pl.DriverCallback):
        def __init__(self):
            self.values = []

        def on_validation_end(self, run):
            self.values.append(run.state.callback_metrics["x"])

        def on_train_epoch_end(self, run):
            self.values.append(run.state.callback_metrics["x"])

    seen = Seen()
    loader = DataLoader(make_data(8), batch_size=4)
    pl.fit(Same(), loader, loader, max_epochs=2, callbacks=[seen], **quiet)
    assert seen.values == [2.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "validation_epoch_end"])
def test_a_hook_at_the_epochs_end_has_the_last_word_on_a_name(hook, num_workers, quiet):
    class Twice(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("x", 1.0, prog_bar=True)
            self.log("y", 1.0)

    setattr(Twice, hook, lambda self, *outputs: self.log("x", 2.0))
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    (results,) = trainer.validate(Twice(), DataLoader(make_data(8), batch_size=4), verbose=False)
    assert results == {"x": 2.0, "y": 1.0}


WHERE_NOTHING_IS_COLLECTED = [
    "setup",
    "configure_optimizers",
    "on_fit_start",
    "on_validation_end",
    "on_train_end",
    "on_fit_end",
]


@pytest.mark.parametrize("hook", WHERE_NOTHING_IS_COLLECTED)
def test_logging_where_nothing_is_collected_is_an_error(hook, quiet):
    model = Regression()

    def logging(*args):
        model.log("x", 1.0)
        return getattr(Regression, hook)(model, *args)

    setattr(model, hook, logging)
    loader = DataLoader(make_data(8), batch_size=4)
    with pytest.raises(pl.ConfigError, match="where nothing is collected"):
        pl.fit(model, loader, loader, max_epochs=1, **quiet)


def test_logging_in_prediction_is_an_error(quiet):
    class Wrong(Regression):
        def predict_step(self, batch, batch_idx):
            self.log("x", 1.0)

    with pytest.raises(pl.ConfigError, match="nor in prediction"):
        pl.Trainer(**quiet).predict(Wrong(), DataLoader(make_data(8), batch_size=4))


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end", "on_validation_epoch_end"])
def test_on_step_outside_of_a_batch_is_an_error(hook, quiet):
    model = Regression()
    setattr(model, hook, lambda: model.log("x", 1.0, on_step=True))
    loader = DataLoader(make_data(8), batch_size=4)
    with pytest.raises(pl.ConfigError, match="outside of a batch"):
        pl.fit(model, loader, loader, max_epochs=1, **quiet)


def test_hooks_of_batches_and_epochs_log_in_their_own_default_form(quiet):
    class Hooks(Regression):
        def on_train_start(self):
            self.log("train_start", 1.0)

        def on_train_epoch_start(self):
            self.log("epoch_start", 2.0)

        def on_train_batch_start(self, batch, batch_idx):
            self.log("batch_start", float(batch_idx))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("batch_end", float(batch_idx))

        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            self.log("val_batch_end", float(batch_idx))

    loader = DataLoader(make_data(16), batch_size=4)
    trainer = pl.fit(Hooks(), loader, loader, max_epochs=1, log_every_n_steps=1, **quiet)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    metrics = {name: value for name, value in metrics.items() if "loss" not in name}
    assert metrics == {
        "train_start": 1.0,
        "epoch_start": 2.0,
        "batch_start": 3.0,
        "batch_end": 3.0,
        "val_batch_end": 1.5,
    }


def test_a_name_with_a_loaders_index_is_left_to_the_loaders(quiet):
    class Wrong(Regression):
        def test_step(self, batch, batch_idx):
            self.log("x/dataloader_idx_0", 1.0)

    with pytest.raises(pl.ConfigError, match="dataloader_idx"):
        pl.Trainer(**quiet).test(Wrong(), DataLoader(make_data(8), batch_size=4), verbose=False)


def test_more_values_than_are_kept_are_added_up_right(quiet):
    class Many(Regression):
        def test_step(self, batch, batch_idx):
            self.log("mean", float(batch_idx))
            self.log("last", float(batch_idx), reduce_fx=lambda kept: kept[-1] + len(kept))
            self.log("max", float(batch_idx), reduce_fx="max")

    (results,) = pl.Trainer(**quiet).test(Many(), DataLoader(torch.zeros(600, 8)), verbose=False)
    assert results == {"mean": 299.5, "last": 599.0 + 600, "max": 599.0}
