"""Strategy: the small interface between the loop and how gradients and state are shared."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from torch import nn

TrainingStep = Callable[..., Any]
"""(batch, batch_idx) to what the user's training_step returns."""


class Strategy(Protocol):
    def wrap(self, module: nn.Module, training_step: TrainingStep) -> TrainingStep:
        """The step to call so that its backward pass syncs gradients. Collective."""
        ...

    def without_sync(self) -> AbstractContextManager[object]:
        """Around forward and backward of a batch whose gradients are only accumulated."""
        ...

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean of the gradients over the ranks, where the backward pass has not synced them. Collective."""
        ...

    def sync_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers (running statistics), before the state is read. Collective."""
        ...

    def clip_gradients(
        self, parameters: Iterable[nn.Parameter], *, limit: float, algorithm: Literal["norm", "value"]
    ) -> None:
        """In place: by the L2 norm over all the parameters, or each element."""
        ...
