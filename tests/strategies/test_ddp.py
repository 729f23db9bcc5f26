"""DDP's options on two workers: the numbers of a hand-written loop, however gradients travel; collectives counted."""

import copy

import pytest
import torch
from models import Regression, assert_same_weights, fit, make_data, train_by_hand, weights_of
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.checkpoint import checkpoint

import raylit as pl

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def by_hand(model, **options):
    """The weights after two epochs of a plain loop from the same start."""
    train_by_hand(model, make_data(48), batch_size=8, num_epochs=2, seed=5, **options)
    return weights_of(model)


def noting(state, bucket):
    """A hook of the user's that tells each parameter how often it was sent, and in which bucket."""
    for parameter in bucket.parameters():
        parameter.num_sent = getattr(parameter, "num_sent", 0) + 1
        parameter.bucket = bucket.index()
    return default_hooks.allreduce_hook(state, bucket)


class Noting(Regression):
    def __init__(self):
        super().__init__()
        self.sent = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.sent.append(max(getattr(parameter, "num_sent", 0) for parameter in self.parameters()))
        self.num_buckets = len({parameter.bucket for parameter in self.parameters() if hasattr(parameter, "bucket")})


def test_accumulated_gradients_are_not_synced_before_the_window_ends():
    model = Noting()
    expected = by_hand(copy.deepcopy(model), accumulate=3)
    fit(model, num_workers=2, accumulate_grad_batches=3, strategy=pl.DDPStrategy(ddp_comm_hook=noting))
    assert model.sent == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


@pytest.mark.parametrize(("size", "num_buckets"), [(None, 1), (0.0001, 2)])
def test_gradients_are_sent_in_buckets_of_the_requested_size(size, num_buckets):
    model = Noting()
    expected = by_hand(copy.deepcopy(model))
    options = {"gradient_as_bucket_view": False, "broadcast_buffers": False}
    fit(model, num_workers=2, strategy=pl.DDPStrategy(bucket_cap_mb=size, ddp_comm_hook=noting, **options))
    assert model.num_buckets == num_buckets
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


class Looking(Regression):
    """The coarsest type that has every gradient which an optimizer has seen."""

    kind_of_gradients = "bf16"

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            if not torch.equal(parameter.grad, parameter.grad.bfloat16().float()):
                is_fp16 = torch.equal(parameter.grad, parameter.grad.half().float())
                self.kind_of_gradients = "fp16" if is_fp16 and self.kind_of_gradients is not None else None


class LookingByHand(Looking):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("kind", [Looking, LookingByHand])
@pytest.mark.parametrize("hook", ["bf16", "fp16", default_hooks.bf16_compress_hook, None])
def test_compressed_gradients_give_nearly_the_same_result(kind, hook):
    model = kind()
    expected = by_hand(copy.deepcopy(model) if kind is Looking else as_looking(model))
    fit(model, num_workers=2, strategy=pl.DDPStrategy(ddp_comm_hook=hook))
    name = hook if isinstance(hook, str) or hook is None else "bf16"
    assert model.kind_of_gradients == name
    assert_same_weights(weights_of(model), expected, rtol=2e-2, atol=2e-3)


def as_looking(model):
    other = Looking()
    other.load_state_dict(model.state_dict())
    return other


class Static(Regression):
    """A layer that is run twice and recomputed, which torch's DDP takes in a static graph only; a layer never used."""

    def __init__(self, result="tensor"):
        super().__init__()
        self.again = nn.Linear(8, 8)
        self.spare = nn.Linear(2, 2)
        self.result = result

    def forward(self, x):
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.again, x, use_reentrant=True)
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.result == "tensor" else pl.TrainResult(loss)


@pytest.mark.parametrize("result", ["tensor", "TrainResult"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_static_graph_may_recompute_layers_and_leave_some_out(result, accumulate):
    model = Static(result)
    expected = by_hand(copy.deepcopy(model), accumulate=accumulate)
    strategy = pl.DDPStrategy(static_graph=True, find_unused_parameters=accumulate > 1)
    fit(model, num_workers=2, strategy=strategy, accumulate_grad_batches=accumulate)
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_cap_mb": 0}, r"DDPStrategy\(bucket_cap_mb=0\): must be a size in MiB above 0"),
        ({"static_graph": "yes"}, r"DDPStrategy\(static_graph='yes'\): must be True or False"),
        ({"ddp_comm_hook": "bf17"}, r"DDPStrategy\(ddp_comm_hook='bf17'\): must be 'bf16', 'fp16' or a hook"),
        ({"ddp_comm_state": 3}, "ddp_comm_state or ddp_comm_wrapper but no ddp_comm_hook"),
        ({"ddp_comm_hook": "bf16", "ddp_comm_wrapper": 3}, "ddp_comm_wrapper=3"),
    ],
)
def test_options_that_cannot_work_are_refused_where_they_are_given(options, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.DDPStrategy(**options)


def test_a_communication_hook_without_ddp_buckets_is_refused():
    with pytest.raises(pl.ConfigError, match="use 'bf16' or 'fp16', which work there too"):
        fit(LookingByHand(), num_workers=2, strategy=pl.DDPStrategy(ddp_comm_hook=noting))


def test_a_communication_hook_that_cannot_be_pickled_is_named_in_the_error():
    with pytest.raises(pl.ConfigError, match=r"DDPStrategy\(.*cannot travel to the workers"):
        fit(Regression(), num_workers=2, strategy=pl.DDPStrategy(ddp_comm_hook=noting, ddp_comm_state=(x for x in "a")))


def test_ddp_with_one_worker_is_a_plain_fit():
    model = Regression()
    expected = by_hand(copy.deepcopy(model))
    fit(model, num_workers=0, strategy=pl.DDPStrategy(ddp_comm_hook="fp16"))
    assert_same_weights(weights_of(model), expected)
