"""A checkpoint that goes on with other settings of its optimizers."""

import pytest
import torch
from models import Regression, RegressionData

import raylit as pl
from raylit.callbacks.perturbed import PerturbedHyperparameters


class Momentum(Regression):
    def __init__(self, lr, momentum, factor=None):
        super().__init__()
        self.settings = (lr, momentum, factor)
        self.rates = []

    def configure_optimizers(self):
        lr, momentum, factor = self.settings
        optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=momentum)
        if factor is None:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=factor)]

    def on_train_epoch_start(self):
        group = self.optimizers().param_groups[0]
        self.rates.append((group["lr"], group["momentum"]))
        self.buffers_before = [state["momentum_buffer"].clone() for state in self.optimizers().state.values()]


def fitted(quiet, path, model, *, max_epochs, **arguments):
    trainer = pl.Trainer(num_workers=0, max_epochs=max_epochs, **arguments, **quiet)
    trainer.fit(model, RegressionData(), ckpt_path=path if path.exists() else None)
    if not path.exists():
        trainer.save_checkpoint(path)
    return model


@pytest.mark.parametrize(("factor", "expected"), [(None, [(0.002, 0.5)] * 2), (0.5, [(0.0005, 0.5), (0.00025, 0.5)])])
def test_new_settings_win_and_the_state_is_kept(quiet, tmp_path, factor, expected):
    path = tmp_path / "a.ckpt"
    saving = pl.ModelCheckpoint(dirpath=tmp_path, filename="a")
    donor = fitted({**quiet, "enable_checkpointing": saving}, path, Momentum(0.01, 0.9, factor), max_epochs=2)
    assert path.exists()
    assert donor.rates[-1] == pytest.approx((0.01 * (factor or 1.0), 0.9))
    model = Momentum(0.002, 0.5, factor)
    fitted(quiet, path, model, max_epochs=4, callbacks=PerturbedHyperparameters())
    assert model.rates == [pytest.approx(pair) for pair in expected]
    assert any(buffer.abs().max() > 0 for buffer in model.buffers_before)


def test_without_it_the_checkpoints_settings_are_restored(quiet, tmp_path):
    path = tmp_path / "a.ckpt"
    saving = pl.ModelCheckpoint(dirpath=tmp_path, filename="a")
    fitted({**quiet, "enable_checkpointing": saving}, path, Momentum(0.01, 0.9), max_epochs=1)
    model = fitted(quiet, path, Momentum(0.002, 0.5), max_epochs=2)
    assert model.rates == [(0.01, 0.9)]
