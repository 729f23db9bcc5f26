"""Each function alone on a model that torch has sharded over the one rank of this process, and on its checkpoint."""

import pickle
import pickletools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from raylit.compat import torch_fsdp
from raylit.compat.torch_fsdp import METADATA_CLASSES, build_storage_info
from raylit.errors import RaylitError

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def root():
    """Two units inside a root unit that has no parameters of its own."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mesh = init_device_mesh("cpu", (1,))
    for part in (*module, module):
        fully_shard(part, mesh=mesh)
    return module


def groups_below(module):
    return [group for part in module for group in torch_fsdp.list_param_groups(torch_fsdp.get_state(part))]


def test_a_unit_has_one_parameter_group_and_the_root_has_none(root):
    assert len(groups_below(root)) == 2
    assert torch_fsdp.list_param_groups(torch_fsdp.get_state(root)) == []


def test_torch_2_9_has_one_group_in_the_place_of_a_list():
    group = object()
    assert torch_fsdp.list_param_groups(SimpleNamespace(_fsdp_param_group=group)) == [group]
    assert torch_fsdp.list_param_groups(SimpleNamespace(_fsdp_param_group=None)) == []


def test_a_torch_with_neither_is_an_error_that_names_the_strategy():
    with pytest.raises(RaylitError, match=r"strategy='fsdp' needs SimpleNamespace\._fsdp_param_group"):
        torch_fsdp.list_param_groups(SimpleNamespace())


def test_sharded_parameters_are_those_of_the_unit(root):
    found = torch_fsdp.list_sharded_parameters(torch_fsdp.get_state(root[0]))
    assert [one.sharded_param for one in found] == list(root[0].parameters())


def test_the_root_knows_all_groups_once_it_is_initialized(root):
    state = torch_fsdp.get_state(root)
    assert list(torch_fsdp.iterate_all_param_groups(state)) == []
    torch_fsdp.initialize_root(state)
    assert list(torch_fsdp.iterate_all_param_groups(state)) == groups_below(root)


def test_initializing_again_takes_up_what_is_trained_now(root):
    state = torch_fsdp.get_state(root)
    torch_fsdp.initialize_root(state)
    root[0].requires_grad_(False)
    torch_fsdp.initialize_root(state)
    root(torch.ones(1, 2)).sum().backward()
    assert root[0].weight.grad is None
    assert root[1].weight.grad is not None


def test_a_unit_copies_out_at_once(root):
    torch_fsdp.copy_out_at_once(root[0])
    assert [group.unshard_async_op for group in groups_below(root)] == [True, False]


def test_the_reduce_scatter_is_the_one_that_was_set(root):
    own = torch_fsdp.get_reduce_scatter(groups_below(root)[1])
    assert callable(own)
    assert callable(own.allocate)
    root[0].set_custom_reduce_scatter(own)
    assert torch_fsdp.get_reduce_scatter(groups_below(root)[0]) is own


def test_without_its_hooks_a_unit_is_gathered_only_by_the_functions_for_it(root):
    unit = root[0]
    state = torch_fsdp.get_state(unit)
    torch_fsdp.initialize_root(torch_fsdp.get_state(root))
    torch_fsdp.remove_forward_hooks(state)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        unit(torch.ones(1, 2))
    args, kwargs = torch_fsdp.run_pre_forward(state, unit, (torch.ones(1, 2),), {})
    assert not isinstance(unit.weight, DTensor)
    output = torch_fsdp.run_post_forward(state, unit, args, unit.forward(*args, **kwargs))
    assert isinstance(unit.weight, DTensor)
    seen = []

    def gather(gradient):
        torch_fsdp.run_pre_backward(state, gradient)
        seen.append(isinstance(unit.weight, DTensor))

    other = torch.ones((), requires_grad=True) * 2
    other.register_hook(gather)
    other.backward()
    assert seen == [False]
    assert output.requires_grad


def test_finishing_a_backward_pass_reduces_what_it_has_left(root):
    state = torch_fsdp.get_state(root)
    root(torch.ones(1, 2))
    for group in groups_below(root):
        group.unshard()
        group.wait_for_unshard()
        for one in group.fsdp_params:
            one.to_unsharded()
            one.unsharded_param.grad = torch.ones_like(one.unsharded_param)
    torch_fsdp.finish_backward(state)
    assert all((parameter.grad.to_local() == 1).all() for parameter in root.parameters())


def test_the_forward_order_grows_with_each_unit_until_it_is_cleared(root):
    state = torch_fsdp.get_state(root)
    root(torch.ones(1, 2))
    assert torch_fsdp.get_forward_order(state) == groups_below(root)
    torch_fsdp.clear_forward_order(state)
    assert torch_fsdp.get_forward_order(state) == []
    root(torch.ones(1, 2)).sum().backward()


def test_after_removal_units_are_ordinary_modules(root):
    root(torch.ones(1, 2))
    for part in (root, *root):
        torch_fsdp.remove_sharding(part)
    assert [type(part) for part in root.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
    assert not any(isinstance(part, FSDPModule) for part in root.modules())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in root.modules())
    assert not any(part._state_dict_pre_hooks or part._load_state_dict_pre_hooks for part in root.modules())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # in torch 2.9 itself
def test_metadata_of_tensors_names_known_classes_only(tmp_path):
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    assert {type(place) for place in metadata.storage_data.values()} == {
        type(build_storage_info("", offset=0, length=0))
    }
    pickled = pickle.dumps(Metadata(metadata.state_dict_metadata, storage_data=metadata.storage_data), protocol=2)
    named = {tuple(arg.split(" ")) for code, arg, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    own = {(module, name) for module, name in named if module.startswith("torch")}
    known = {(module, name) for module, names in METADATA_CLASSES.items() for name in names}
    dtypes = {("torch", name) for module, name in own if isinstance(getattr(torch, name, None), torch.dtype)}
    assert own - dtypes <= known
