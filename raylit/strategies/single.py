"""One worker: nothing to share. Worker."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch import nn

from raylit.strategies.base import TrainingStep


class SingleStrategy:
    def wrap(self, module: nn.Module, training_step: TrainingStep) -> TrainingStep:
        return training_step

    def without_sync(self) -> AbstractContextManager[object]:
        return nullcontext()

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None: ...

    def sync_buffers(self, module: nn.Module) -> None: ...

    def clip_gradients(
        self, parameters: Iterable[nn.Parameter], *, limit: float, algorithm: Literal["norm", "value"]
    ) -> None:
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(parameters, limit)
        else:
            nn.utils.clip_grad_value_(parameters, limit)
