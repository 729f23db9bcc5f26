"""DDP's options on two workers: the numbers of a hand-written loop, however gradients travel; collectives counted."""

import pytest
import torch
from models import Regression, assert_same_weights, fit, make_data, train_by_hand, weights_of
from torch import nn

import raylit as pl

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Counting(Regression):
    """Counts what its process sends while the second epoch trains."""

    hidden = 512
    """A layer that alone fills a small bucket."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 3))
        self.sent = []

    def on_train_batch_start(self, batch, batch_idx):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.start()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.profile.stop()
        names = [event.name for event in self.profile.events()]
        self.sent.append(sum(name == "gloo:all_reduce" for name in names))
        self.profile = None


def by_hand(model, **options):
    copy = type(model)()
    copy.load_state_dict(model.state_dict())
    train_by_hand(copy, make_data(48), batch_size=8, num_epochs=2, seed=5, **options)
    return weights_of(copy)


@pytest.mark.parametrize(
    "strategy",
    [
        pl.DDPStrategy(bucket_cap_mb=0.001, gradient_as_bucket_view=False, broadcast_buffers=False),
        pl.DDPStrategy(static_graph=True),
        pl.DDPStrategy(static_graph=True, find_unused_parameters=True),
    ],
    ids=["buckets", "static", "static-and-unused"],
)
def test_options_leave_the_numbers_as_they_are(strategy):
    model = Regression()
    expected = by_hand(model)
    fit(model, num_workers=2, strategy=strategy)
    assert_same_weights(weights_of(model), expected, **TOLERANCE)
