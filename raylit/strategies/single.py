"""One worker: nothing to share. Worker."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from raylit.strategies.base import PendingGradients, TrainingStep


class Single:
    """One worker's share is the whole."""

    is_forward_collective = False

    def set_up(self, module: nn.Module, *, device: torch.device) -> None: ...

    def tear_down(self) -> None: ...

    def silence(self, *, is_silent: bool) -> None: ...

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        return training_step

    def synced_check(self, step: TrainingStep) -> Callable[[], None] | None:
        return None

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        return nullcontext()

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None: ...

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        return None

    def share_weights(self, module: nn.Module) -> None: ...

    def sync_buffers(self, module: nn.Module) -> None: ...

    def clip_gradients(
        self, parameters: Iterable[nn.Parameter], *, limit: float, algorithm: Literal["norm", "value"]
    ) -> None:
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(parameters, limit)
        else:
            nn.utils.clip_grad_value_(parameters, limit)
