"""From shards back to the user's own module, without numbers. Worker."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from raylit.compat.torch_fsdp import remove_sharding


def forget_sharding(part: nn.Module, added: set[str]) -> None:
    """Class, hooks and attributes as they were."""
    if isinstance(part, FSDPModule):
        remove_sharding(part)
    for name in added & set(vars(part)):
        del vars(part)[name]


def leave_on_meta(module: nn.Module) -> None:
    """Parameters of the whole shape without numbers, in the place of shards; buffers on the CPU."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in whole:
                meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                whole[parameter] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
            setattr(part, name, whole[parameter])
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(part, name, buffer.cpu())
