"""From the meta device to numbers, in this process: those of a plain build, or an error that says what is missing."""

import pytest
import torch
from torch import nn

from raylit.errors import ModuleError
from raylit.strategies.fsdp.meta_init import BuildOrder, MetaInitializer


def materialized(build):
    order = BuildOrder()
    with torch.device("meta"), order.recording():
        module = build()
    torch.manual_seed(3)
    materializer = MetaInitializer(module, owners=order.owners)
    for part in order.sort_modules(module):
        materializer.materialize(part)
    return module


class Tied(nn.Module):
    """Built in another order than it is listed in, with a weight of two owners."""

    def __init__(self):
        super().__init__()
        head = nn.Linear(6, 5, bias=False)
        self.embedding = nn.Embedding(5, 6, padding_idx=0)
        self.attention = nn.MultiheadAttention(6, 2)
        self.norm = nn.BatchNorm1d(6)
        self.layers = nn.Sequential(nn.LSTM(6, 6), nn.Conv1d(6, 6, 3), nn.LayerNorm(6))
        self.head = head
        self.head.weight = self.embedding.weight


def test_initialization_from_meta_draws_the_numbers_of_a_plain_build():
    torch.manual_seed(3)
    expected = Tied()
    module = materialized(Tied)
    assert module.head.weight is module.embedding.weight
    assert module.state_dict().keys() == expected.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Forgetful(Scale):
    def reset_parameters(self): ...


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Scale, r"Scale has scale but no reset_parameters\(\)"),
        (Forgetful, "Forgetful.reset_parameters leaves scale without numbers"),
    ],
)
def test_parameters_without_initialization_are_named_in_the_error(build, message):
    with pytest.raises(ModuleError, match=message):
        materialized(lambda: nn.Sequential(nn.Linear(2, 2), build()))
