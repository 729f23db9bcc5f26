"""Precision on the CPU, as far as torch's autocast goes: each against the loop that a user would write."""

import copy

import pytest
import torch
from models import Regression, assert_same_weights, batches, fit, make_data, weights_of
from torch import nn
from torch.nn import functional

import raylit as pl


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.seen = set()

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.seen.add((x.dtype, out.dtype, self.net[0].weight.dtype, torch.zeros(1).dtype))
        return functional.mse_loss(out, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ManualNet(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def mixed_by_hand(model, dtype, *, scaler=None, clip=None):
    optimizer = model.configure_optimizers()
    for _, _, (x, y) in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = functional.mse_loss(model.net(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return model


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_bf16_mixed_is_autocast(kind, precision):
    model = kind()
    by_hand = mixed_by_hand(copy.deepcopy(model), torch.bfloat16)
    fit(model, precision=precision)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert model.seen == {(torch.float32, torch.bfloat16, torch.float32, torch.float32)}


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("precision", [16, "16", "16-mixed"])
def test_16_mixed_is_autocast_with_a_gradient_scaler(kind, precision):
    model = kind()
    by_hand = mixed_by_hand(copy.deepcopy(model), torch.float16, scaler=torch.amp.GradScaler("cpu"))
    fit(model, precision=precision)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert model.seen == {(torch.float32, torch.float16, torch.float32, torch.float32)}


def test_gradients_are_unscaled_before_they_are_clipped():
    model = Net()
    by_hand = mixed_by_hand(copy.deepcopy(model), torch.float16, scaler=torch.amp.GradScaler("cpu"), clip=0.05)
    fit(model, precision=16, gradient_clip_val=0.05)
    assert_same_weights(weights_of(model), weights_of(by_hand))


@pytest.mark.parametrize("factor", [1.0, 1e38])
def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved(factor, tmp_path):
    class Overflowing(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                self.before = self.net[0].weight.detach().clone()
            elif self.trainer.global_step == 4:
                self.is_unmoved = torch.equal(self.net[0].weight, self.before)
            loss = super().training_step(batch, batch_idx) * 0.01
            return loss * (factor if self.trainer.global_step == 3 else 1.0)

    model = Overflowing()
    checkpointing = pl.ModelCheckpoint(dirpath=tmp_path)
    fit(model, precision=16, enable_checkpointing=True, callbacks=[checkpointing])
    assert model.is_unmoved == (factor > 1)
    saved = torch.load(checkpointing.best_model_path, weights_only=True)
    assert saved["scaler"]["scale"] == (2.0**15 if factor > 1 else 2.0**16)


@pytest.mark.parametrize(
    ("precision", "dtype"), [(64, torch.float64), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_true_precision_holds_for_weights_batches_and_new_tensors(precision, dtype, num_workers):
    model = Net()
    by_hand = copy.deepcopy(model).to(dtype)
    optimizer = by_hand.configure_optimizers()
    for _, _, (x, y) in batches():
        optimizer.zero_grad()
        functional.mse_loss(by_hand.net(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
    fit(model, precision=precision, num_workers=num_workers)
    exact = num_workers == 0
    tolerance = {} if exact else {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.02}
    assert_same_weights(weights_of(model), weights_of(by_hand), **tolerance)
    assert model.seen == {(dtype, dtype, dtype, dtype)}
    assert torch.get_default_dtype() == torch.float32


def test_16_true_trains_in_half_precision():
    model = Net()
    fit(model, precision="16-true", max_epochs=1)
    assert model.seen == {(torch.float16,) * 4}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_32_is_what_it_is_without_the_argument():
    model, other = Net(), Net()
    fit(model, precision="32-true")
    fit(other)
    assert_same_weights(weights_of(model), weights_of(other))


def test_evaluation_runs_in_the_same_precision(quiet):
    class Types(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("bits", float(torch.finfo(self(batch[0]).dtype).bits))

    (result,) = pl.validate(
        Types(), torch.utils.data.DataLoader(make_data(), batch_size=8), precision="bf16-mixed", num_workers=0, **quiet
    )
    assert result == {"bits": 16.0}


def test_an_unknown_precision_names_the_known_ones():
    with pytest.raises(pl.ConfigError, match="precision='fp8': must be one of 32, 64, 16, bf16"):
        pl.Trainer(precision="fp8")


def test_lbfgs_with_a_gradient_scaler_is_refused():
    class Module(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(pl.ConfigError, match="gradient scaler"):
        fit(Module(), precision=16)
