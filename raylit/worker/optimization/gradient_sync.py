"""Times at which gradients are reduced over the ranks, and gradients in a checkpoint. Worker."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.worker.data.batches import to_cpu
from raylit.worker.optimization.stepper import list_parameters
from raylit.worker.session import Session


class GradientSync:
    """Training step wrapped for gradient sync, for the parameters that the optimizer trains.

    A freeze, a thaw or a new parameter group takes effect with the next epoch.
    """

    def __init__(self, session: Session, training_step: Callable[..., Any], *, optimizer: Optimizer) -> None:
        self._module = session.module
        self._strategy = session.strategy
        self._training_step = training_step
        self._optimizer = optimizer
        self.wrap_step()

    def wrap_step(self) -> None:
        """Wrap the step for the parameters that are trained now. Collective."""
        self._trained = self._list_trained()
        self.step = self._strategy.wrap(self._module, self._training_step, trained=self._trained)
        self.share_step = self.step if self._strategy.is_sharding else self._training_step
        """Step for batches of an uneven split, as DDP's reduction needs a backward pass on every rank."""
        self.check = self._strategy.build_sync_check(self.step)
        """Check to call after a backward pass that has synced; None: there is nothing to check.

        Where it returns True, call `wrap_step`.
        """

    @property
    def is_outdated(self) -> bool:
        """Return whether the step was wrapped for other parameters or needs a check no longer."""
        if self._strategy.is_finding_unused and self.check is not None:
            return True
        return [id(parameter) for parameter in self._list_trained()] != [id(parameter) for parameter in self._trained]

    def wrap_if_due(self) -> bool:
        """Wrap the step again before an epoch if that is due, and return whether it was. Collective."""
        is_due = (self.check is not None and self.check.is_renewal_due()) or self.is_outdated
        if is_due:
            self.wrap_step()
        return is_due

    def without_sync(self) -> AbstractContextManager[object]:
        """Return the context for forward and backward of a batch whose gradients are only accumulated."""
        return self._strategy.without_sync(self.step)

    def _list_trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in list_parameters(self._optimizer) if parameter.requires_grad]


def copy_gradients(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return CPU copies of the gradients, by the names of their parameters."""
    return {
        name: to_cpu(parameter.grad).clone()
        for name, parameter in _name_parameters(optimizer, module).items()
        if parameter.grad is not None
    }


def set_gradients(optimizer: Optimizer, module: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Set gradients that `copy_gradients` returned, except for parameters that the optimizer no longer has."""
    for name, parameter in _name_parameters(optimizer, module).items():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device, parameter.dtype)


def average_saved_gradients(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over the saved ranks' gradients, for each rank of the resumed run.

    Averaged over any number of ranks it gives the same gradient as the saved ones gave.
    """
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        values = [state[name] for state in states if name in state]
        if isinstance(values[0], dict):
            merged[name] = average_saved_gradients(values)
        else:
            merged[name] = sum(values[1:], values[0]) / len(states)
    return merged


def _name_parameters(optimizer: Optimizer, module: nn.Module) -> dict[str, nn.Parameter]:
    own = {id(parameter) for parameter in list_parameters(optimizer)}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in own}
