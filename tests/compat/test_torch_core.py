"""What torch's modules, tensors and data loaders do not show, on the real torch."""

import copy
import math
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from raylit.compat import torch_core
from raylit.compat.torch_core import drop_iterator, find_loader_death


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_parameter("bias", None)
        self.register_buffer("mean", torch.zeros(1))
        self.layer = nn.Linear(1, 1)
        self.plain = 3


def test_batch_norms_have_a_common_base():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    assert all(issubclass(kind, torch_core.BatchNormBase) for kind in kinds)
    assert not issubclass(nn.InstanceNorm1d, torch_core.BatchNormBase)


@pytest.mark.parametrize("kind", [lambda: nn.Linear(1, 1), lambda: nn.MultiheadAttention(2, 1)])
def test_resetting_draws_other_numbers(kind):
    module = kind()
    before = [parameter.clone() for parameter in module.parameters()]
    torch_core.find_reset(module)()
    assert any(not torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))


def test_a_module_without_a_reset_has_none():
    assert torch_core.find_reset(nn.ReLU()) is None


def test_what_is_registered_is_copied_as_it_is():
    source, target = nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2)
    torch_core.copy_registered(source, target)
    assert target.weight is source.weight
    assert target.running_mean is None


def test_a_flat_module_has_names_with_dots():
    weight, mean = nn.Parameter(torch.ones(1)), torch.zeros(1)
    module = torch_core.build_flat_module([("net.0.weight", weight)], [("net.1.mean", mean)])
    assert dict(module.named_parameters()) == {"net.0.weight": weight}
    assert dict(module.named_buffers()) == {"net.1.mean": mean}


def test_registered_names_are_those_of_parameters_buffers_and_submodules():
    assert torch_core.list_registered(Own()) == {"weight", "bias", "mean", "layer"}


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_hooks_for_all_modules_are_seen_until_they_are_removed(register):
    assert not torch_core.has_global_hooks()
    handle = register(lambda *_: None)
    assert torch_core.has_global_hooks()
    handle.remove()
    assert not torch_core.has_global_hooks()


def test_a_compiled_call_takes_the_place_of_the_modules_own_until_it_is_none():
    module = nn.Identity()
    assert torch_core.get_compiled_call(module) is None
    assert torch_core.get_call(module)(2) == 2
    torch_core.set_compiled_call(module, lambda value: value + 1)
    assert module(2) == 3
    assert torch_core.get_call(module)(2) == 2
    torch_core.set_compiled_call(module, None)
    assert module(2) == 2


def test_the_version_grows_with_a_change_in_place():
    tensor = torch.zeros(2)
    before = torch_core.read_version(tensor)
    tensor.add_(1)
    assert torch_core.read_version(tensor) > before


def test_a_negative_view_shares_memory_and_reads_with_the_opposite_sign():
    tensor = torch.ones(2)
    view = torch_core.build_negative_view(tensor)
    assert view.is_neg()
    assert view.data_ptr() == tensor.data_ptr()
    assert view.tolist() == [-1.0, -1.0]


@pytest.fixture(params=["kernels for many", "public functions only"])
def _kernels(request, monkeypatch):
    if request.param == "public functions only":
        monkeypatch.delattr(torch, "_foreach_norm")
        monkeypatch.delattr(torch, "_foreach_mul_")


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_norms_are_those_of_each_tensor(order):
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([[2.0]])]
    expected = [torch.linalg.vector_norm(tensor, order) for tensor in tensors]
    assert torch_core.compute_norms(tensors, order) == expected


@pytest.mark.usefixtures("_kernels")
def test_tensors_are_scaled_in_place():
    tensors = [torch.ones(2), torch.full((1, 1), 3.0)]
    torch_core.scale_in_place(tensors, torch.tensor(0.5))
    assert [tensor.tolist() for tensor in tensors] == [[0.5, 0.5], [[1.5]]]


def test_a_copy_starts_processes_of_its_own():
    loader = DataLoader(torch.arange(2), num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert iter(loader) is first
    clone = copy.copy(loader)
    drop_iterator(clone)
    second = iter(clone)
    assert second is not first
    assert iter(loader) is first
    assert [batch.item() for batch in second] == [0, 1]


def test_the_death_of_a_loader_s_process_is_found():
    assert find_loader_death() is None
    others = set(multiprocessing.active_children())  # an earlier test's loader may not be collected yet
    batches = iter(DataLoader(TensorDataset(torch.zeros(80, 1)), num_workers=1))
    next(batches)
    [pid] = {process.pid for process in set(multiprocessing.active_children()) - others}
    death = None
    # torch's own handler of SIGCHLD raises at once; not this time.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while death is None and time.monotonic() < deadline:
            death = find_loader_death()
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert f"DataLoader worker (pid {pid}) is killed by signal" in str(death)


def test_without_the_private_name_there_is_no_answer(monkeypatch):
    monkeypatch.delattr(torch._C, "_error_if_any_worker_fails")
    assert find_loader_death() is None
