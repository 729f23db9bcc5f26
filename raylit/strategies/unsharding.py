"""From shards back to the user's own module, without numbers. Worker."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def forget_sharding(part: nn.Module, added: set[str]) -> None:
    """Class, hooks and attributes as they were. What they are called is private to torch 2.13."""
    if isinstance(part, FSDPModule):
        state: Any = part._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in state._fsdp_param_groups:
            for handles in (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
            for parameter in group.fsdp_params:
                parameter._post_load_hook_handle.remove()
        part.__class__ = type(part).__mro__[2]
    for name in added & set(vars(part)):
        del vars(part)[name]


def leave_on_meta(module: nn.Module) -> None:
    """Parameters of the whole shape without numbers, in the place of shards; buffers on the CPU."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in whole:
                meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                whole[parameter] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
            if parameter is not None:
                part._parameters[name] = whole[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.cpu()
