"""Activation checkpointing: modules that compute their activations again in the backward pass. Worker."""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Modules of some classes, whose forward runs under torch.utils.checkpoint until `restore`."""

    def __init__(self, module: nn.Module, classes: Collection[type[nn.Module]]) -> None:
        self._modules = [part for part in module.modules() if isinstance(part, tuple(classes))]
        for part in self._modules:
            # An attribute of its own: names of parameters stay, and the hooks that gather them run around it.
            part.forward = _recomputing(part.forward)

    def restore(self) -> None:
        for part in self._modules:
            del part.forward


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed
