"""The layout of a module's weights in memory. Worker."""

import torch
from torch import nn


@torch.no_grad()
def set_layout(module: nn.Module, layout: torch.memory_format) -> None:
    """Of its weights and buffers of four dimensions, in place; optimizers made before or after follow them."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not nn.parameter.is_lazy(tensor) and tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
