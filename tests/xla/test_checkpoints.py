"""Checkpoints of XLA runs: tensors on the CPU, read on other devices, and resumed with the same bits."""

import pytest
import torch
from models import make_data
from torch.utils.data import DataLoader
from xla.xla_models import QUIET, Alternating, Manual, Regression, fit, max_difference, require_xla

import raylit as pl

require_xla()


def save_in_epoch(path, *, at_batch):
    """A callback that saves the run after a batch of its second epoch."""

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == at_batch:
                trainer.save_checkpoint(path)

    return Saving()


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Regression, {}),
        (Regression, {"accumulate_grad_batches": 2}),
        (Regression, {"strategy": "fsdp"}),
        (Alternating, {}),
        (Manual, {}),
    ],
    ids=["plain", "inside_a_window", "fsdp", "two_optimizers", "manual"],
)
def test_a_run_resumed_inside_an_epoch_has_the_same_bits(tmp_path, kind, arguments):
    path = tmp_path / "inside.ckpt"
    whole = kind()
    whole.net[2].p = 0.3  # dropout draws from the device's generator
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    fit(whole, max_epochs=3, callbacks=[save_in_epoch(path, at_batch=2)], **arguments)
    resumed = kind()
    resumed.net[2].p = 0.3
    resumed.load_state_dict(start)
    fit(resumed, max_epochs=3, seed=99, ckpt_path=path, **arguments)
    assert max_difference(whole, resumed) == 0


@pytest.mark.timeout(300)
def test_two_actors_resume_with_the_same_bits(tmp_path):
    path = tmp_path / "inside.ckpt"
    whole = Regression(dropout=0.3)
    fit(whole, max_epochs=3, num_workers=2, callbacks=[save_in_epoch(path, at_batch=2)])
    resumed = Regression(dropout=0.3)
    fit(resumed, max_epochs=3, num_workers=2, seed=99, ckpt_path=path)
    assert max_difference(whole, resumed) == 0


def test_a_checkpoint_goes_from_xla_to_the_cpu_and_back(tmp_path):
    whole = Regression()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    fit(whole, max_epochs=4)
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    model = Regression()
    model.load_state_dict(start)
    path = None
    for max_epochs, accelerator in ((1, "xla"), (2, "cpu"), (3, "xla"), (4, "cpu")):
        trainer = fit(model, max_epochs=max_epochs, accelerator=accelerator, ckpt_path=path, **saving)
        path = trainer.checkpoint_callback.best_model_path or trainer.checkpoint_callback.last_model_path
        checkpoint = torch.load(path, weights_only=True)  # XLA's own tensors would come back on XLA
        assert {tensor.device.type for tensor in tensors_in(checkpoint)} == {"cpu"}
        assert type(next(tensors_in(checkpoint["state_dict"]))) is torch.Tensor
        model = Regression()
    last = Regression.load_from_checkpoint(path)
    assert max_difference(whole, last) < 1e-6


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.timeout(300))])
def test_the_best_weights_are_tested_and_loaded(tmp_path, num_workers):
    data = make_data(20, seed=2)
    val = DataLoader(data, batch_size=8)
    saving = pl.ModelCheckpoint(tmp_path / "saved", monitor="val_loss", save_last=True)
    model = Regression()
    trainer = fit(
        model, val=val, num_workers=num_workers, max_epochs=3, enable_checkpointing=True, callbacks=[saving],
        logger=pl.loggers.CSVLogger(tmp_path), log_every_n_steps=1,
    )  # fmt: skip
    (tested,) = trainer.test(dataloaders=val, ckpt_path="best")
    assert tested["val_loss"] == pytest.approx(float(saving.best_model_score), abs=1e-6)
    best = Regression.load_from_checkpoint(saving.best_model_path)
    (again,) = pl.Trainer(**{**QUIET, "accelerator": "cpu"}).test(best, val)
    assert again["val_loss"] == pytest.approx(tested["val_loss"], abs=1e-6)
