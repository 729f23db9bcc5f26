"""channels_last: weights and batches lie in memory as the fast kernels want them, and train to the same numbers."""

import copy

import pytest
import torch
from models import Pictures, batches, fit, images
from torch.utils.data import DataLoader

import raylit as pl


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_is_the_same_in_another_layout(num_workers):
    model, data = Pictures(), images()
    by_hand = copy.deepcopy(model)
    fit(model, data=data, num_workers=num_workers, channels_last=True, sync_batchnorm=True)
    optimizer = by_hand.configure_optimizers()
    for _, _, batch in batches(data=data):
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
    assert model.layouts == {(True, True)}
    assert by_hand.layouts == {(False, False)}
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-5)


def test_afterwards_the_module_is_laid_out_as_usual(quiet):
    model, loader = Pictures(), DataLoader(images(), batch_size=8)
    outputs = pl.predict(model, loader, num_workers=0, channels_last=True, **quiet)
    assert model.net[0].weight.is_contiguous()
    torch.testing.assert_close(outputs, pl.predict(model, loader, num_workers=0, **quiet))


def test_what_is_no_switch_is_refused():
    with pytest.raises(pl.ConfigError, match="channels_last='yes': must be True or False"):
        pl.Trainer(channels_last="yes")
