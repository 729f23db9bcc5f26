"""Hooks are called in Lightning's order, and the attributes that they set are returned to the driver."""

import os

import pytest
import torch
from models import Regression, RegressionData, make_data
from torch.utils.data import DataLoader

import raylit as pl

MODULE_HOOKS = [
    name
    for name in dir(pl.LightningModule)
    if (name.startswith("on_") and "checkpoint" not in name and name != "on_exception")
    or name in ("setup", "teardown", "prepare_data", "configure_model", "configure_optimizers")
    or name in ("training_step", "validation_step", "test_step", "predict_step")
    or name == "transfer_batch_to_device"
]


class Recorder(Regression):
    """Records the name of every hook that is called."""

    def __init__(self):
        super().__init__()
        self.calls = []


def _recording(name):
    def hook(self, *args, **kwargs):
        self.calls.append(name)
        return getattr(super(Recorder, self), name)(*args, **kwargs)

    return hook


for _name in MODULE_HOOKS:
    setattr(Recorder, _name, _recording(_name))

TRANSFER = ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]
BATCH = [
    *TRANSFER,
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]
VALIDATION_BATCH = [*TRANSFER, "on_validation_batch_start", "validation_step", "on_validation_batch_end"]
VALIDATION = [
    "on_validation_model_eval",
    "on_validation_start",
    "on_validation_epoch_start",
    *VALIDATION_BATCH,
    "on_validation_epoch_end",
    "on_validation_end",
    "on_validation_model_train",
]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_hooks_of_fit_run_in_lightnings_order(num_workers, quiet):
    model = Recorder()
    dm = RegressionData(batch_size=24, num_val=20)
    pl.fit(model, dm, num_workers=num_workers, max_epochs=1, limit_val_batches=1, **quiet)
    # prepare_data runs on the same object here, in the one process that there is.
    assert model.calls == [
        "prepare_data",
        "setup",
        "configure_model",
        "configure_optimizers",
        "on_fit_start",
        "on_sanity_check_start",
        *VALIDATION,
        "on_sanity_check_end",
        "on_train_start",
        "on_train_epoch_start",
        *BATCH,
        *BATCH,
        *VALIDATION,
        "on_train_epoch_end",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ]


def test_hooks_of_test_and_predict(quiet):
    model = Recorder()
    trainer = pl.Trainer(**quiet)
    trainer.test(model, DataLoader(make_data(4), batch_size=4), verbose=False)
    assert model.calls == [
        "prepare_data",
        "setup",
        "configure_model",
        "on_test_model_eval",
        "on_test_start",
        "on_test_epoch_start",
        *TRANSFER,
        "on_test_batch_start",
        "test_step",
        "on_test_batch_end",
        "on_test_epoch_end",
        "on_test_end",
        "on_test_model_train",
        "teardown",
    ]
    model.calls.clear()
    trainer.predict(model, DataLoader(make_data(4), batch_size=4))
    assert model.calls[3:-1] == [
        "on_predict_model_eval",
        "on_predict_start",
        "on_predict_epoch_start",
        *TRANSFER,
        "on_predict_batch_start",
        "predict_step",
        "on_predict_batch_end",
        "on_predict_epoch_end",
        "on_predict_end",
        "on_predict_model_train",
    ]


class Modes(Regression):
    def __init__(self):
        super().__init__()
        self.modes = {}
        self.net[0].eval()

    def _look(self, where):
        self.modes[where] = (self.training, self.net[0].training, self.net[1].training, torch.is_grad_enabled())

    def training_step(self, batch, batch_idx):
        self._look(f"train {self.current_epoch}")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._look("validation")
        super().validation_step(batch, batch_idx)


def test_modes_and_gradients_are_switched_for_validation_and_back_again(quiet):
    model = Modes()
    pl.fit(model, RegressionData(), max_epochs=2, **quiet)
    # A part that the user has put into eval mode stays frozen in it.
    assert model.modes["train 0"] == model.modes["train 1"] == (True, False, True, True)
    assert model.modes["validation"] == (False, False, False, False)


class Epochs(pl.Callback):
    def __init__(self):
        self.seen = []
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append((trainer.current_epoch, trainer.global_step, trainer.callback_metrics["train_loss"].item()))

    def setup(self, trainer, pl_module, stage):
        self.states.append((stage, trainer.world_size, type(trainer).__name__))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_attributes_set_in_hooks_are_readable_after_the_run(num_workers, quiet):
    model, callback = Regression(), Epochs()
    dm = RegressionData(batch_size=4 if num_workers else 8)
    trainer = pl.fit(model, dm, num_workers=num_workers, max_epochs=2, callbacks=[callback], **quiet)
    assert len(model.losses) == 12
    assert [entry[:2] for entry in callback.seen] == [(0, 6), (1, 12)]
    assert callback.states == [("fit", max(1, num_workers), "TrainerView")]
    assert trainer.callbacks == [callback]


class Grower(Regression):
    def setup(self, stage):
        self.extra = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.extra(super().forward(x))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_layers_added_in_setup_are_returned_to_the_driver(num_workers, quiet):
    model = Grower()
    pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, **quiet)
    assert model(torch.randn(2, 8)).shape == (2, 3)


class PerProcess(pl.DataModule):
    """Writes a file for each call of prepare_data and setup, named by process."""

    def __init__(self, directory):
        self.directory = directory

    def _leave(self, name):
        (self.directory / f"{name}-{os.getpid()}").write_text(str(len(list(self.directory.glob("prepare-*")))))

    def prepare_data(self):
        self._leave("prepare")

    def setup(self, stage):
        self._leave(f"setup-{stage}")

    def train_dataloader(self):
        return DataLoader(make_data(8), batch_size=4)


def test_prepare_data_runs_once_per_host_before_any_setup(tmp_path, quiet):
    model = Regression()
    pl.fit(model, PerProcess(tmp_path), num_workers=3, max_epochs=1, limit_val_batches=0, **quiet)
    assert len(list(tmp_path.glob("prepare-*"))) == 1
    setups = list(tmp_path.glob("setup-fit-*"))
    assert len(setups) == 3
    assert all(path.read_text() == "1" for path in setups)


def test_on_train_batch_start_can_end_the_epoch(quiet):
    class Short(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    model = Short()
    trainer = pl.fit(model, RegressionData(), max_epochs=2, **quiet)
    assert trainer.global_step == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_should_stop_ends_the_training_on_all_ranks(num_workers, quiet):
    class Stopper(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3 and trainer.is_global_zero:
                trainer.should_stop = True

    trainer = pl.fit(
        Regression(),
        RegressionData(batch_size=2),
        num_workers=num_workers,
        callbacks=Stopper(),
        max_epochs=5,
        log_every_n_steps=2,
        **quiet,
    )
    # One process stops at once, several at the next logging step, where they agree on it.
    assert trainer.global_step == (3 if num_workers == 0 else 4)
    assert trainer.current_epoch == 1
