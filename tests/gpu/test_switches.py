"""Speed switches on a CUDA device: what they set, and that they train to the numbers without them.

    python -m pytest tests/gpu

on a machine with a GPU; with two of them gradients also travel over NCCL.
"""

import copy

import pytest
import torch
from models import Pictures, Regression, assert_same_weights, fit, images, weights_of

import raylit as pl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


class FusedPictures(Pictures):
    def __init__(self, *, fused=False):
        super().__init__()
        self.fused = fused

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)


def trained(model, **arguments):
    fit(model, data=images(), accelerator="gpu", **arguments)
    return weights_of(model)


def test_channels_last_holds_for_weights_and_batches_on_the_device():
    model = FusedPictures()
    expected = trained(copy.deepcopy(model))
    assert_same_weights(trained(model, channels_last=True), expected, **TOLERANCE)
    assert model.layouts == {(True, True)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_compiled_module_trains_to_the_same_numbers(precision):
    model = Regression(optimizer="adam")
    plain = copy.deepcopy(model)
    fit(plain, accelerator="gpu", precision=precision)
    fit(model, accelerator="gpu", precision=precision, compile=True)
    assert_same_weights(weights_of(model), weights_of(plain), rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_fused_optimizer_is_scaled_and_clipped_like_another(clip):
    expected = trained(FusedPictures(), precision=16, gradient_clip_val=clip)
    actual = trained(FusedPictures(fused=True), precision=16, gradient_clip_val=clip)
    assert_same_weights(actual, expected, **TOLERANCE)


@pytest.mark.parametrize(("given", "precision"), [("high", "tf32"), ("highest", "ieee")])
def test_tf32_is_on_for_the_runs_length(given, precision):
    class Asks(Regression):
        def on_train_start(self):
            self.precision = torch.backends.cuda.matmul.fp32_precision

    before = torch.get_float32_matmul_precision()
    model = Asks()
    fit(model, accelerator="gpu", float32_matmul_precision=given, max_epochs=1)
    assert model.precision in (precision, "none" if given == "highest" else precision)
    assert torch.get_float32_matmul_precision() == before


def test_weights_trained_on_the_device_are_written_from_there(tmp_path):
    model, other = Regression(), Regression()
    fit(model, accelerator="gpu", max_epochs=1).save_weights(tmp_path / "w.safetensors")
    other.load_weights(tmp_path / "w.safetensors")
    assert_same_weights(weights_of(other), weights_of(model))


@pytest.mark.cluster
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", [pl.DDPStrategy(ddp_comm_hook="bf16"), pl.DDPStrategy(static_graph=True)])
def test_gradients_travel_between_devices(strategy):
    model = Regression()
    expected = copy.deepcopy(model)
    fit(expected, accelerator="gpu", num_workers=0)
    fit(model, accelerator="gpu", num_workers=2, strategy=strategy)
    assert_same_weights(weights_of(model), weights_of(expected), rtol=2e-2, atol=2e-3)
