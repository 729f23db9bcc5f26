"""What a user of Lightning 2.6 reads of a Trainer: the same names, in the driver and in hooks."""

import csv

import pytest
import torch
from models import Regression, RegressionData

import raylit as pl

ASKED = {
    "max_epochs": 2,
    "min_epochs": 1,
    "max_steps": 9,
    "min_steps": 3,
    "limit_train_batches": 5,
    "limit_val_batches": 1.0,
    "limit_test_batches": 2,
    "limit_predict_batches": 0.5,
    "overfit_batches": 0.0,
    "num_sanity_val_steps": 0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 7,
    "gradient_clip_val": 0.5,
    "gradient_clip_algorithm": "value",
    "precision": "32-true",
    "default_root_dir": "here",
    "accumulate_grad_batches": 2,
}
PLACE = {
    "is_global_zero": True,
    "global_rank": 0,
    "local_rank": 0,
    "node_rank": 0,
    "num_nodes": 1,
    "num_devices": 1,
    "world_size": 1,
    "fast_dev_run": False,
}


class Reads(Regression):
    def on_train_epoch_end(self):
        self.read = {name: getattr(self.trainer, name) for name in [*ASKED, *PLACE]}
        self.validates = self.trainer.enable_validation
        self.trainer.print(f"epoch {self.trainer.current_epoch} is over")


def test_the_trainer_and_the_view_of_hooks_say_what_was_asked_for(quiet, capsys):
    model, data = Reads(), RegressionData(num_val=24)
    bar, stop = pl.TQDMProgressBar(), pl.EarlyStopping("val_loss")
    trainer = pl.Trainer(num_workers=0, callbacks=[bar, stop], **{**quiet, "enable_progress_bar": True}, **ASKED)
    trainer.fit(model, data)
    assert model.read == {**ASKED, **PLACE}
    assert {name: getattr(trainer, name) for name in [*ASKED, *PLACE]} == {**ASKED, **PLACE}
    assert model.validates is trainer.enable_validation is True
    assert (trainer.num_training_batches, trainer.num_val_batches) == (5, [3])
    assert (trainer.model, trainer.datamodule) == (model, data)
    assert (trainer.progress_bar_callback, trainer.early_stopping_callbacks) == (bar, [stop])
    assert (trainer.checkpoint_callback, trainer.checkpoint_callbacks) == (None, [])
    assert trainer.sanity_checking is False
    trainer.print("in the driver")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(("epoch", "in the"))] == [
        "epoch 0 is over",
        "epoch 1 is over",
        "in the driver",
    ]


def test_what_lives_in_the_driver_says_so_in_hooks(quiet):
    class Asking(Regression):
        def on_train_start(self):
            assert not hasattr(self.trainer, "checkpoint_callback")
            assert not hasattr(self.trainer, "no_such_thing")
            _ = self.trainer.checkpoint_callback.best_model_path

    with pytest.raises(AttributeError, match=r"checkpoint_callback: it lives in the driver.*DriverCallback"):
        pl.fit(Asking(), RegressionData(), num_workers=0, max_epochs=1, **quiet)


def test_init_module_makes_weights_of_the_runs_type():
    with pl.Trainer(num_workers=0, precision="64-true").init_module():
        assert {parameter.dtype for parameter in Regression().parameters()} == {torch.float64}
    with pl.Trainer(num_workers=0, precision="bf16-mixed").init_module():
        assert {parameter.dtype for parameter in Regression().parameters()} == {torch.float32}
    trainer = pl.Trainer(num_workers=2, strategy="fsdp")
    with trainer.init_module(empty_init=True):
        assert Regression().device.type == "meta"
    with trainer.init_module():
        assert Regression().device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "alternative"),
    [
        ({"plugins": []}, "say precision=, strategy="),
        ({"barebones": True}, "say logger=False, enable_checkpointing=False"),
        ({"enable_autolog_hparams": False}, r"save_hyperparameters\(logger=False\)"),
        ({"row_log_interval": 10}, "it is log_every_n_steps"),
    ],
)
def test_an_argument_that_is_none_here_names_what_to_say(arguments, alternative):
    with pytest.raises(pl.UnknownArgumentError, match=alternative):
        pl.Trainer(**arguments)
    pl.Trainer(plugins=None, barebones=False, enable_autolog_hparams=True, num_workers=0)


class Watches(pl.Callback):
    """What hooks at an epoch's end find in callback_metrics."""

    def __init__(self):
        self.of_training, self.of_validation = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.of_training.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def on_validation_epoch_end(self, trainer, pl_module):
        self.of_validation.append(trainer.callback_metrics["val_loss"].item())


class LogsBoth(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_epoch=True, on_step=False, reduce_fx="max")
        return loss


def test_hooks_at_an_epochs_end_find_the_epochs_values(quiet):
    model, watches = LogsBoth(), Watches()
    data = RegressionData(batch_size=8, num_train=24, num_val=16)
    trainer = pl.Trainer(num_workers=0, max_epochs=2, num_sanity_val_steps=0, callbacks=watches, **quiet)
    trainer.fit(model, data)
    for epoch, found in enumerate(watches.of_training):
        losses = model.losses[3 * epoch : 3 * epoch + 3]
        assert found["loss"] == found["loss_epoch"] == pytest.approx(sum(losses) / 3)
        assert found["loss_step"] == found["train_loss"] == pytest.approx(losses[-1])
        assert found["largest"] == pytest.approx(max(losses))
        assert found["val_loss"] == pytest.approx(watches.of_validation[epoch])
    assert watches.of_validation[-1] == pytest.approx(trainer.callback_metrics["val_loss"].item())


def test_an_evaluation_after_a_fit_is_at_its_end(quiet):
    class Stands(Regression):
        def on_test_start(self):
            self.step = self.trainer.global_step

    model, data = Stands(), RegressionData()
    trainer = pl.Trainer(num_workers=0, max_epochs=2, **{**quiet, "logger": pl.CSVLogger("logs")})
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    trainer.validate(model, data, verbose=False)
    assert (trainer.global_step, trainer.current_epoch, model.step) == (12, 2, 12)
    with open(f"{trainer.log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], float(row["epoch"])) for row in rows if row["test_loss"]] == [("12", 2.0)]
