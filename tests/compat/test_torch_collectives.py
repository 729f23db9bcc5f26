"""Collectives of all ranks are seen by the name that they have in torch.distributed; what is in pairs is not."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives

from raylit.compat import torch_collectives
from raylit.compat.torch_collectives import CollectiveWatch

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated"),
]


def rows():
    return [torch.zeros(2)]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: dist.all_reduce(torch.ones(2)), "all_reduce of (2,) float32"),
        (lambda: dist.all_gather(rows(), torch.ones(2)), "all_gather of (2,) float32"),
        (
            lambda: dist.all_gather_into_tensor(torch.zeros(2), torch.ones(2)),
            "all_gather_into_tensor of (2,) float32",
        ),
        (lambda: dist.broadcast(torch.ones(2), src=0), "broadcast"),
        (lambda: dist.reduce(torch.ones(2), dst=0), "reduce"),
        (lambda: dist.gather(torch.ones(2), rows(), dst=0), "gather"),
        (lambda: dist.scatter(torch.ones(2), rows(), src=0), "scatter"),
        (lambda: dist.reduce_scatter_tensor(torch.zeros(2), torch.ones(2)), "reduce_scatter_tensor"),
        (lambda: dist.all_to_all_single(torch.zeros(2), torch.ones(2)), "all_to_all_single"),
        (lambda: dist.barrier(), "barrier"),
        (
            lambda: _functional_collectives.all_reduce(torch.ones(2), "sum", dist.group.WORLD).wait(),
            "all_reduce of (2,) float32",
        ),
    ],
)
def test_a_collective_is_announced_once_by_its_name(call, expected):
    seen = []
    with CollectiveWatch(seen.append):
        call()
    assert seen == [expected]


def test_computation_is_no_collective():
    seen = []
    with CollectiveWatch(seen.append):
        (torch.ones(2, requires_grad=True) * 2).sum().backward()
    assert seen == []


def test_messages_between_two_ranks_are_no_collectives():
    operators = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("c10d::")}
    names = {name.partition(".")[0] for name in operators}
    assert {"send", "recv_", "recv_any_source_"} <= names & set(torch_collectives._PAIRWISE)
