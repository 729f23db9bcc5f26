"""fit from end to end: limits, validation, checkpoints, early stopping, loggers, test of the best weights."""

import math

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, make_data, weights_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, IterableDataset

import raylit as pl


class Events(pl.DriverCallback):
    """Writes down what the coordinator tells, with the step at which it does."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, run):
        self.seen.append(("validation", run.state.progress.global_step))

    def on_train_epoch_end(self, run):
        self.seen.append(("epoch", run.state.progress.global_step))

    def on_train_end(self, run):
        self.seen.append(("end", run.state.progress.global_step))


# RegressionData has 6 training batches of 8.
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 2}, [("validation", 6), ("epoch", 6), ("validation", 12), ("epoch", 12), ("end", 12)]),
        (
            {"max_epochs": 2, "check_val_every_n_epoch": 2},
            [("epoch", 6), ("validation", 12), ("epoch", 12), ("end", 12)],
        ),
        (
            {"max_epochs": 1, "val_check_interval": 0.34},
            [("validation", 2), ("validation", 4), ("validation", 6), ("epoch", 6), ("end", 6)],
        ),
        ({"max_epochs": 1, "val_check_interval": 4}, [("validation", 4), ("epoch", 6), ("end", 6)]),
        ({"max_steps": 8}, [("validation", 6), ("epoch", 6), ("epoch", 8), ("end", 8)]),
        (
            {"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 1},
            [("validation", 3), ("epoch", 3), ("end", 3)],
        ),
        ({"max_epochs": 1, "limit_val_batches": 0}, [("epoch", 6), ("end", 6)]),
        ({"max_epochs": 1, "limit_train_batches": 0}, [("end", 0)]),
        ({"fast_dev_run": True}, [("validation", 1), ("epoch", 1), ("end", 1)]),
        ({"max_epochs": 1, "accumulate_grad_batches": 4}, [("validation", 2), ("epoch", 2), ("end", 2)]),
    ],
)
def test_validation_and_end_come_when_the_arguments_say(arguments, expected, quiet):
    events = Events()
    pl.fit(Regression(), RegressionData(), callbacks=[events], **quiet, **arguments)
    assert events.seen == expected


def test_an_interval_longer_than_the_epoch_is_an_error(quiet):
    with pytest.raises(pl.ConfigError, match="val_check_interval=7"):
        pl.fit(Regression(), RegressionData(), val_check_interval=7, **quiet)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_default_run_leaves_checkpoint_curves_and_metrics(num_workers, tmp_path):
    model = Regression()
    dm = RegressionData(batch_size=4 if num_workers else 8)
    trainer = pl.fit(model, dm, num_workers=num_workers, max_epochs=3, log_every_n_steps=2, enable_progress_bar=False)
    assert (trainer.current_epoch, trainer.global_step) == (3, 18)
    directory = tmp_path / "lightning_logs" / "version_0"
    assert trainer.logger.log_dir == trainer.log_dir == str(directory)
    names = {path.name for path in (directory / "checkpoints").glob("*.ckpt")}
    assert "epoch=2-step=18.ckpt" in names
    assert trainer.checkpoint_callback.best_model_path.startswith(str(directory / "checkpoints"))
    events = EventAccumulator(str(directory))
    events.Reload()
    losses = events.Scalars("train_loss")
    assert [event.step for event in losses] == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    assert [event.step for event in events.Scalars("val_loss")] == [5, 11, 17]
    assert events.Scalars("val_loss")[-1].value == pytest.approx(trainer.callback_metrics["val_loss"].item())
    if num_workers == 0:
        assert [event.value for event in losses] == pytest.approx(model.losses[1::2])
    assert trainer.logged_metrics.keys() >= {"train_loss", "val_loss"}


def test_the_checkpoint_holds_the_whole_run_and_reads_without_unpickling_code(tmp_path):
    model = Regression(optimizer="adam")
    trainer = pl.fit(model, RegressionData(batch_size=4), num_workers=2, max_epochs=2, enable_progress_bar=False)
    checkpoint = torch.load(trainer.checkpoint_callback.newest_model_path, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 12)
    assert_same_weights(checkpoint["state_dict"], weights_of(model))
    assert checkpoint["hyper_parameters"]["optimizer"] == "adam"
    assert checkpoint["optimizer_states"][0]["state"][0]["step"].item() == 12
    assert checkpoint["lr_schedulers"] == []
    assert any(key.startswith("ModelCheckpoint") for key in checkpoint["callbacks"])
    assert len(checkpoint["raylit"]["ranks"]) == 2


class Worsening(Regression):
    """Its validation loss is best at the second validation."""

    def on_validation_epoch_end(self):
        self.log("score", abs(self.current_epoch - 1.0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_early_stopping_stops_and_the_best_checkpoint_is_tested(num_workers, tmp_path):
    model = Worsening()
    best = pl.ModelCheckpoint(monitor="score", filename="{epoch}-{score:.1f}", save_last=True)
    trainer = pl.fit(
        model,
        RegressionData(),
        num_workers=num_workers,
        max_epochs=20,
        callbacks=[pl.EarlyStopping("score", patience=2), best],
        enable_progress_bar=False,
    )
    assert trainer.current_epoch == 4
    assert trainer.early_stopping_callback.stopped_epoch == 3
    assert best.best_model_path.endswith("epoch=1-score=0.0.ckpt")
    assert best.best_model_score == 0.0
    last_weights = weights_of(model)
    [result] = trainer.test(dataloaders=DataLoader(make_data(20, seed=2), batch_size=8), verbose=False)
    loaded = Worsening.load_from_checkpoint(best.best_model_path)
    [expected] = pl.test(loaded, RegressionData().loader_for_test(), logger=False, enable_progress_bar=False)
    assert result["test_loss"] == pytest.approx(expected["test_loss"])
    assert_same_weights(weights_of(model), weights_of(loaded))
    [as_it_was] = trainer.test(Worsening.load_from_checkpoint(best.best_model_path), datamodule=RegressionData())
    assert as_it_was["test_loss"] == pytest.approx(result["test_loss"])
    [last] = trainer.validate(ckpt_path="last", datamodule=RegressionData(), verbose=False)
    model.load_state_dict(last_weights)
    [current] = trainer.validate(model, datamodule=RegressionData(), verbose=False)
    assert last["val_loss"] == current["val_loss"]


class Scheduled(Regression):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.rates = []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        halve = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {
            "epoch": ([optimizer], [halve]),
            "step": {"optimizer": optimizer, "lr_scheduler": {"scheduler": halve, "interval": "step", "frequency": 3}},
            "plateau": {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "worse"}},
        }[self.kind]

    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def on_validation_epoch_end(self):
        self.log("worse", float(self.current_epoch))


@pytest.mark.parametrize(
    ("kind", "rates"), [("epoch", [1, 0.5, 0.25]), ("step", [1, 0.25, 0.0625]), ("plateau", [1, 1, 0.5])]
)
def test_schedulers_step_by_epoch_by_step_and_on_a_plateau(kind, rates, quiet):
    model = Scheduled(kind)
    pl.fit(model, RegressionData(), max_epochs=3, **{**quiet, "num_sanity_val_steps": 0})
    assert model.rates == rates


class Stream(IterableDataset):
    def __init__(self, num_samples):
        self.data = make_data(num_samples)

    def __iter__(self):
        return iter(self.data[index] for index in range(len(self.data)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterable_of_unknown_length_is_shared_out_and_ends(num_workers, quiet):
    model = Regression()
    loader = DataLoader(Stream(22), batch_size=4)
    arguments = {"num_workers": num_workers, "accumulate_grad_batches": 2, "limit_val_batches": 0, **quiet}
    trainer = pl.fit(model, loader, max_epochs=2, **arguments)
    # 6 batches: with two workers 3 of each, in windows of two
    assert trainer.global_step == (2 * 3 if num_workers == 0 else 2 * 2)
    assert len(model.losses) == (12 if num_workers == 0 else 6)


def test_precision_of_weights_and_autocast(quiet):
    class Types(Regression):
        def training_step(self, batch, batch_idx):
            self.seen = (batch[0].dtype, self(batch[0]).dtype, self.net[0].weight.dtype)
            return super().training_step(batch, batch_idx)

    expected = {
        "bf16-mixed": (torch.float32, torch.bfloat16, torch.float32),
        "64": (torch.float64, torch.float64, torch.float64),
        "bf16-true": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    }
    for precision, types in expected.items():
        model = Types()
        pl.fit(model, RegressionData(), precision=precision, max_epochs=1, **quiet)
        assert model.seen == types, precision
        assert math.isfinite(model.losses[-1])


def test_models_and_data_of_main_travel(tmp_path, run_script):
    """A script's own classes, a lambda and a closure, run as __main__."""
    output = run_script("""
        import torch, raylit as pl
        from torch.utils.data import DataLoader
        scale = 2.0
        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
                self.activation = lambda x: x * scale
                self.ranks = []
            def training_step(self, batch, batch_idx):
                self.ranks.append(self.global_rank)
                return self.activation(self.layer(batch)).pow(2).mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)
        if __name__ == "__main__":
            model = Net()
            data = DataLoader(torch.ones(16, 4), batch_size=4, collate_fn=lambda rows: torch.stack(rows))
            trainer = pl.fit(model, data, num_workers=2, max_epochs=2, logger=False, enable_checkpointing=False)
            print("ranks", model.ranks, "steps", trainer.global_step)
    """)
    assert "ranks [0, 0, 0, 0] steps 4" in output
