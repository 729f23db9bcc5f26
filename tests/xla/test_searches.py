"""Searches, sweeps and the first example on XLA."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from models import make_data
from torch.utils.data import DataLoader
from xla.xla_models import QUIET, Regression, require_xla

import raylit as pl

require_xla()


class Data(pl.DataModule):
    def __init__(self, batch_size=8):
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(make_data(48), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(make_data(48), batch_size=self.batch_size)


def test_a_learning_rate_is_found():
    model = Regression()
    trainer = pl.Trainer(**QUIET, max_epochs=1)
    found = trainer.tuner.lr_find(model, datamodule=Data(), min_lr=1e-5, max_lr=10.0, num_training=30)
    assert 1e-5 < found.suggestion() < 10
    assert model.lr == found.suggestion()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_batch_size_is_found():
    data = Data()
    found = pl.Trainer(**QUIET).tuner.scale_batch_size(Regression(), datamodule=data, init_val=4, max_trials=3)
    assert data.batch_size == found == 16


@pytest.mark.timeout(300)
def test_a_sweep_trains_each_trial_on_xla(tmp_path):
    from ray import tune

    def build(config):
        model = Regression()
        model.lr = config["lr"]
        return model, Data()

    space = {"lr": tune.grid_search([0.0001, 0.03])}
    torch.manual_seed(1)
    result = pl.sweep(
        build, space, metric="val_loss", num_workers=1, max_concurrent=1, max_epochs=3, default_root_dir=tmp_path,
        **{**QUIET, "enable_checkpointing": True},
    )  # fmt: skip
    assert [trial.error for trial in result.trials] == [None, None]
    assert result.best_config["lr"] == 0.03


@pytest.mark.timeout(300)
def test_the_digits_example_learns_on_xla(tmp_path):
    example = pathlib.Path(__file__).parents[2] / "examples" / "digits.py"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_USE_SPMD"}
    done = subprocess.run(
        [sys.executable, str(example), "--accelerator", "xla", "--num-workers", "1", "--max-epochs", "8"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    accuracy = re.search(r"^test accuracy: (\S+)$", done.stdout, re.MULTILINE)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) > 0.9
