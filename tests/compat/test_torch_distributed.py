"""Each function alone, in a process group of this process's one rank.

Collectives of all ranks are seen by the name that they have in torch.distributed; messages of pairs are not.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from raylit.compat import torch_distributed
from raylit.compat.torch_distributed import CollectiveWatch
from raylit.errors import RaylitError


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, is_using_second=True):
        x = self.first(x)
        return self.second(x) if is_using_second else x


class Hidden:
    def __init__(self, value):
        self.value = value


class Hiding(nn.Module):
    """DDP finds no tensor in what it returns."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)

    def forward(self, x):
        return Hidden(self.first(x).sum())


def test_parameters_are_assumed_to_arrive_in_the_opposite_order():
    module = TwoLayers()
    ddp = torch_distributed.ReversedDDP(module)
    assert [id(one) for one in ddp.synced_parameters] == [id(one) for one in [*module.parameters()][::-1]]


def test_a_torch_that_collects_parameters_otherwise_is_an_error(monkeypatch):
    monkeypatch.delattr(torch_distributed.ReversedDDP, "_build_params_for_reducer")
    with pytest.raises(RaylitError, match=r"needs DistributedDataParallel\._build_params_for_reducer"):
        torch_distributed.ReversedDDP(TwoLayers())


def test_ignored_parameters_are_not_synced():
    module = TwoLayers()
    torch_distributed.ignore_parameters(module, ["second.weight", "second.bias"])
    ddp = torch_distributed.ReversedDDP(module)
    assert {id(one) for one in ddp.synced_parameters} == {id(one) for one in module.first.parameters()}


def test_buckets_can_be_final_before_the_first_step():
    ddp = torch_distributed.ReversedDDP(TwoLayers())
    torch_distributed.push_all_parameters(ddp)
    torch_distributed.rebuild_buckets(ddp)
    ddp(torch.ones(1, 2)).sum().backward()
    torch_distributed.rebuild_buckets(ddp)  # nothing was left out
    assert all(parameter.grad is not None for parameter in ddp.parameters())


def test_what_a_backward_pass_has_left_out_is_named_by_its_indices():
    ddp = torch_distributed.ReversedDDP(TwoLayers())
    torch_distributed.push_all_parameters(ddp)
    torch_distributed.rebuild_buckets(ddp)
    ddp(torch.ones(1, 2), is_using_second=False).sum().backward()
    with pytest.raises(RuntimeError, match=r"did not receive grad for rank 0: 0 1"):
        torch_distributed.rebuild_buckets(ddp)


def test_a_static_graph_reduces_at_the_end_of_the_pass_in_which_that_is_queued():
    ddp = DistributedDataParallel(Hiding(), static_graph=True)
    num_reduced = []

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        num_reduced.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, reduce)
    loss = ddp(torch.ones(1, 2)).value
    was_reduced = []

    def queue(gradient):
        was_reduced.append(torch_distributed.has_static_graph_reduced(ddp))
        torch_distributed.queue_static_graph_reduction(ddp)

    loss.register_hook(queue)
    loss.backward()
    assert was_reduced == [False]
    assert torch_distributed.has_static_graph_reduced(ddp)
    assert num_reduced == [6]


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
    assert {"send", "recv_", "recv_any_source_"} <= names & set(torch_distributed._PAIRWISE)
