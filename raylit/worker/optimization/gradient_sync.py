"""GradientSync: the training step whose backward pass averages gradients over the ranks, for one optimizer. Worker."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from raylit.worker.optimization.stepper import parameters_of
from raylit.worker.session import Session


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
        self.check = self._strategy.synced_check(self.step)
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
