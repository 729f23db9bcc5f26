"""When gradients are reduced over the ranks, and their clearing."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.worker.data.transfer import to_cpu
from raylit.worker.optimization.stepper import parameters_of
from raylit.worker.session import Session


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


class GradientSync:
    """Follows which parameters the optimizer trains: a freeze, thaw or new group takes effect with the next epoch."""

    def __init__(self, session: Session, training_step: Callable[..., Any], *, optimizer: Optimizer) -> None:
        self._module = session.module
        self._strategy = session.strategy
        self._training_step = training_step
        self._optimizer = optimizer
        self.renew()

    def renew(self) -> None:
        """Wrap the step for the parameters that are trained now. Collective."""
        self._trained = self._now_trained()
        self.step = self._strategy.wrap(self._module, self._training_step, trained=self._trained)
        self.share_step = self.step if self._strategy.is_sharding else self._training_step
        """For batches of an uneven split: DDP's own reduction runs in a backward pass and needs a batch on every rank.
        """
        self.check = self._strategy.build_sync_check(self.step)
        """To be called after a backward pass that has synced, and to `renew` where it is True; None: there is nothing
        to check."""

    @property
    def is_outdated(self) -> bool:
        if self._strategy.is_finding_unused and self.check is not None:
            return True
        return [id(parameter) for parameter in self._now_trained()] != [id(parameter) for parameter in self._trained]

    def follow(self) -> bool:
        """Before an epoch: wrap the step anew if that is due. Collective."""
        is_due = (self.check is not None and self.check.is_renewal_due()) or self.is_outdated
        if is_due:
            self.renew()
        return is_due

    def paused(self) -> AbstractContextManager[object]:
        """Around forward and backward of a batch whose gradients are only added up."""
        return self._strategy.without_sync(self.step)

    def _now_trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in parameters_of(self._optimizer) if parameter.requires_grad]
