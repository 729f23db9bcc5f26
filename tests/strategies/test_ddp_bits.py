"""Runs that are resumed end with the bits of those that were not, with any number of workers."""

import pytest
import torch
from models import Regression, RegressionData, weights_of

import raylit as pl


def trained(directory, *, max_epochs, num_workers, strategy, resume=None, **arguments):
    torch.manual_seed(2)
    model = Regression(width=64, optimizer="adam")
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=max_epochs,
        default_root_dir=directory,
        strategy=strategy,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        limit_val_batches=0,
        **arguments,
    )
    trainer.fit(model, RegressionData(batch_size=2), ckpt_path=resume)
    return weights_of(model)


@pytest.mark.parametrize(
    ("num_workers", "strategy"),
    [
        (3, "auto"),
        pytest.param(4, pl.DDPStrategy(bucket_cap_mb=0.001), marks=pytest.mark.slow),
        pytest.param(3, pl.DDPStrategy(static_graph=True), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_of_several_workers_has_the_bits_of_an_uninterrupted_one(num_workers, strategy, tmp_path):
    whole = trained(tmp_path / "whole", max_epochs=2, num_workers=num_workers, strategy=strategy)
    trained(tmp_path / "parts", max_epochs=1, num_workers=num_workers, strategy=strategy)
    resumed = trained(tmp_path / "parts", max_epochs=2, num_workers=num_workers, strategy=strategy, resume="auto")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
