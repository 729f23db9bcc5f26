"""SharedScale: one gradient scaler for several optimizers, whose gradients may wait while another steps. Worker."""

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from raylit.compat.torch_tensor import read_version

Marks = frozenset[tuple[int, int, int]]


class SharedScale:
    """Changes the factor when no gradients wait that were multiplied by it: they would be divided by another one."""

    def __init__(self, scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer]) -> None:
        self._scaler = scaler
        self._optimizers = optimizers
        self._known: dict[int, Marks] = {id(optimizer): frozenset() for optimizer in optimizers}
        """Each optimizer's gradients as they were after its last step."""
        self._stepped: set[int] = set()
        """Since the factor was last seen to."""

    def before_step(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._stepped:  # a scaler takes one step of each
            self.update()

    def after_step(self, optimizer: Optimizer) -> None:
        self._stepped.add(id(optimizer))
        self._known[id(optimizer)] = _marks(optimizer)
        if all(_marks(other) <= self._known[id(other)] for other in self._optimizers):
            self.update()

    def update(self) -> None:
        """At the latest at a batch's end."""
        if self._stepped:
            self._stepped.clear()
            self._scaler.update()


def _marks(optimizer: Optimizer) -> Marks:
    """A backward pass changes a gradient's version, or makes a new one."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    graded = ((id(parameter), parameter.grad) for parameter in parameters)
    return frozenset((key, grad.data_ptr(), read_version(grad)) for key, grad in graded if grad is not None)
