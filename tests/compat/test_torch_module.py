"""What a module has registered, and its calls."""

import pytest
import torch
from torch import nn

from raylit.compat import torch_module


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
    assert all(issubclass(kind, torch_module.BatchNormBase) for kind in kinds)
    assert not issubclass(nn.InstanceNorm1d, torch_module.BatchNormBase)


@pytest.mark.parametrize("kind", [lambda: nn.Linear(1, 1), lambda: nn.MultiheadAttention(2, 1)])
def test_resetting_draws_other_numbers(kind):
    module = kind()
    before = [parameter.clone() for parameter in module.parameters()]
    torch_module.find_reset(module)()
    assert any(not torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))


def test_a_module_without_a_reset_has_none():
    assert torch_module.find_reset(nn.ReLU()) is None


def test_what_is_registered_is_copied_as_it_is():
    source, target = nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2)
    torch_module.copy_registered(source, target)
    assert target.weight is source.weight
    assert target.running_mean is None


def test_a_flat_module_has_names_with_dots():
    weight, mean = nn.Parameter(torch.ones(1)), torch.zeros(1)
    module = torch_module.build_flat_module([("net.0.weight", weight)], [("net.1.mean", mean)])
    assert dict(module.named_parameters()) == {"net.0.weight": weight}
    assert dict(module.named_buffers()) == {"net.1.mean": mean}


def test_registered_names_are_those_of_parameters_buffers_and_submodules():
    assert torch_module.list_registered(Own()) == {"weight", "bias", "mean", "layer"}


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_hooks_for_all_modules_are_seen_until_they_are_removed(register):
    assert not torch_module.has_global_hooks()
    handle = register(lambda *_: None)
    assert torch_module.has_global_hooks()
    handle.remove()
    assert not torch_module.has_global_hooks()


def test_a_compiled_call_takes_the_place_of_the_modules_own_until_it_is_none():
    module = nn.Identity()
    assert torch_module.get_compiled_call(module) is None
    assert torch_module.get_call(module)(2) == 2
    torch_module.set_compiled_call(module, lambda value: value + 1)
    assert module(2) == 3
    assert torch_module.get_call(module)(2) == 2
    torch_module.set_compiled_call(module, None)
    assert module(2) == 2
