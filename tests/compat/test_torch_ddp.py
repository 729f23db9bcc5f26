"""Each function alone on torch's DDP over the one rank of this process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from raylit.compat import torch_ddp
from raylit.errors import RaylitError

pytestmark = pytest.mark.usefixtures("process_group")


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
    ddp = torch_ddp.ReversedDDP(module)
    assert [id(one) for one in ddp.synced_parameters] == [id(one) for one in [*module.parameters()][::-1]]


def test_a_torch_that_collects_parameters_otherwise_is_an_error(monkeypatch):
    monkeypatch.delattr(torch_ddp.ReversedDDP, "_build_params_for_reducer")
    with pytest.raises(RaylitError, match=r"needs DistributedDataParallel\._build_params_for_reducer"):
        torch_ddp.ReversedDDP(TwoLayers())


def test_ignored_parameters_are_not_synced():
    module = TwoLayers()
    torch_ddp.ignore_parameters(module, ["second.weight", "second.bias"])
    ddp = torch_ddp.ReversedDDP(module)
    assert {id(one) for one in ddp.synced_parameters} == {id(one) for one in module.first.parameters()}


def test_buckets_can_be_final_before_the_first_step():
    ddp = torch_ddp.ReversedDDP(TwoLayers())
    torch_ddp.push_all_parameters(ddp)
    torch_ddp.rebuild_buckets(ddp)
    ddp(torch.ones(1, 2)).sum().backward()
    torch_ddp.rebuild_buckets(ddp)  # nothing was left out
    assert all(parameter.grad is not None for parameter in ddp.parameters())


def test_what_a_backward_pass_has_left_out_is_named_by_its_indices():
    ddp = torch_ddp.ReversedDDP(TwoLayers())
    torch_ddp.push_all_parameters(ddp)
    torch_ddp.rebuild_buckets(ddp)
    ddp(torch.ones(1, 2), is_using_second=False).sum().backward()
    with pytest.raises(RuntimeError, match=r"did not receive grad for rank 0: 0 1"):
        torch_ddp.rebuild_buckets(ddp)


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
        was_reduced.append(torch_ddp.has_static_graph_reduced(ddp))
        torch_ddp.queue_static_graph_reduction(ddp)

    loss.register_hook(queue)
    loss.backward()
    assert was_reduced == [False]
    assert torch_ddp.has_static_graph_reduced(ddp)
    assert num_reduced == [6]
