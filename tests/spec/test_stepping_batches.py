"""`trainer.estimated_stepping_batches`: how long a fit will be, for schedulers that have to know."""

import math

import pytest
import torch
from models import Regression, make_data
from torch.utils.data import DataLoader, IterableDataset

import raylit as pl


class Estimating(Regression):
    """Asks in `setup` and `configure_optimizers`, and steps a schedule of just that length."""

    def setup(self, stage=None):
        self.estimates = [self.trainer.estimated_stepping_batches] if stage == "fit" else []

    def configure_optimizers(self):
        self.estimates.append(self.trainer.estimated_stepping_batches)
        optimizer = super().configure_optimizers()
        if math.isinf(self.estimates[-1]):
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.estimates[-1])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_end(self):
        self.steps = self.global_step


@pytest.fixture
def quiet(quiet):
    return {**quiet, "limit_val_batches": 0}


def estimated(trainer, *, loader=None):
    model = Estimating()
    trainer.fit(model, DataLoader(make_data(44), batch_size=4) if loader is None else loader)
    assert model.estimates == [trainer.estimated_stepping_batches] * 2
    return model


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 3}, 33),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 6),
        ({"max_epochs": 4, "accumulate_grad_batches": {1: 2, 2: 5}}, 11 + 6 + 3 + 3),
        ({"max_epochs": 2, "accumulate_grad_batches": {1: 2, 7: 5}}, 11 + 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 10),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "overfit_batches": 2}, 4),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 7}, 7),
    ],
)
def test_the_estimate_is_what_the_fit_then_takes(arguments, expected, quiet):
    model = estimated(pl.Trainer(num_workers=0, **arguments, **quiet))
    assert (model.estimates[0], model.steps) == (expected, expected)


def test_each_of_several_workers_counts_its_own_share(quiet):
    trainer = pl.Trainer(num_workers=2, max_epochs=2, accumulate_grad_batches=2, **quiet)
    model = estimated(trainer)
    assert (model.estimates[0], model.steps) == (6, 6)  # 11 batches are 6 for a worker, in 3 windows
    trainer.test(model, DataLoader(make_data(8), batch_size=4), verbose=False)
    assert trainer.estimated_stepping_batches == 6


class Endless(IterableDataset):
    def __iter__(self):
        return iter(make_data(40))


@pytest.mark.parametrize(("max_steps", "expected"), [(-1, math.inf), (5, 5)])
def test_data_without_a_length_leaves_the_limit_in_steps(max_steps, expected, quiet):
    trainer = pl.Trainer(num_workers=0, max_epochs=2, max_steps=max_steps, **quiet)
    assert estimated(trainer, loader=DataLoader(Endless(), batch_size=4)).estimates[0] == expected


def test_it_is_a_clear_error_where_there_is_no_fit(quiet):
    trainer = pl.Trainer(num_workers=0, **quiet)
    with pytest.raises(pl.ConfigError, match=r"read self\.trainer\.estimated_stepping_batches in the module's setup"):
        _ = trainer.estimated_stepping_batches

    class Asking(Regression):
        def setup(self, stage=None):
            _ = self.trainer.estimated_stepping_batches

    with pytest.raises(pl.ConfigError, match="there is none in test"):
        trainer.test(Asking(), DataLoader(make_data(8)), verbose=False)
