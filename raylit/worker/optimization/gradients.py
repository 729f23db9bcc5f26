"""The gradients of a window that a checkpoint cuts in two. Worker."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.worker.optimization.stepper import parameters_of
from raylit.worker.transfer import to_cpu


def gradients_of(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU, by the names of the parameters."""
    return {
        name: to_cpu(parameter.grad).clone()
        for name, parameter in _named(optimizer, module).items()
        if parameter.grad is not None
    }


def set_gradients(optimizer: Optimizer, module: nn.Module, gradients: dict[str, Tensor]) -> None:
    """As `gradients_of` has them. Those of parameters that the optimizer no longer has are left out."""
    for name, parameter in _named(optimizer, module).items():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device, parameter.dtype)


def mean_gradients(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Of ranks that were, for each of those that go on: what they add up to, averaged over these, is the same."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        values = [state[name] for state in states if name in state]
        if isinstance(values[0], dict):
            merged[name] = mean_gradients(values)
        else:
            merged[name] = sum(values[1:], values[0]) / len(states)
    return merged


def _named(optimizer: Optimizer, module: nn.Module) -> dict[str, nn.Parameter]:
    own = {id(parameter) for parameter in parameters_of(optimizer)}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in own}
