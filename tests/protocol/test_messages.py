"""Messages keep their tensors through pickling, which does not copy them."""

import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from raylit.protocol.messages import Start, Stepped, Weights, copy_tensors, pack, unpack
from raylit.protocol.state import Progress


def travel(message):
    """The message, unpickled from the buffers of the pickled one, as in Ray's object store."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(pickled, buffers=buffers), len(pickled)


def test_a_large_tensor_is_not_copied():
    tensor = torch.randn(1000, 1000)
    arrived, num_pickled = travel(Weights(state_dict={"net": {"weight": tensor}}))
    assert arrived.state_dict["net"]["weight"].data_ptr() == tensor.data_ptr()
    assert torch.equal(arrived.state_dict["net"]["weight"], tensor)
    assert num_pickled < 2000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6)[:, ::2],
        torch.tensor(3.0),
        torch.empty(0, 3),
        torch.randn(3).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.randn(4).to_sparse(),
        nn.Parameter(torch.randn(2)),
    ],
    ids=["strided", "scalar", "empty", "bfloat16", "bool", "sparse", "parameter"],
)
def test_every_kind_of_tensor_arrives(tensor):
    arrived, _ = travel(Start(stage="fit", checkpoint=OrderedDict(states=[(tensor, 1)])))
    assert type(arrived.checkpoint) is OrderedDict
    result, number = arrived.checkpoint["states"][0]
    assert number == 1
    assert type(result) is type(tensor)
    assert result.dtype == tensor.dtype
    assert torch.equal(result.to_dense(), tensor.to_dense())


def test_copied_tensors_have_memory_of_their_own():
    tensor = torch.zeros(3)
    start = Start(stage="test", checkpoint={"state": [tensor]}, progress=Progress(epoch=2))
    copied = copy_tensors(start)
    copied.checkpoint["state"][0].fill_(1.0)
    assert tensor.tolist() == [0.0, 0.0, 0.0]
    assert (copied.stage, copied.progress) == ("test", start.progress)
    stepped = Stepped(progress=Progress(), metrics={})
    assert copy_tensors(stepped) is stepped


def test_packed_values_are_restored():
    states = [{"buffer": torch.arange(3), "name": "a"}]
    (restored,) = unpack(pickle.loads(pickle.dumps(pack(states))))
    assert restored["buffer"].tolist() == [0, 1, 2]
    assert restored["name"] == "a"
