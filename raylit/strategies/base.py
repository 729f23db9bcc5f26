"""Strategy: the small interface between the loop and how gradients and state are shared."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from raylit.strategies.sharded_state import Reader

TrainingStep = Callable[..., Any]
"""(batch, batch_idx, ...) to what the user's training_step returns."""


class ZeroLoss(dict[str, Any]):
    """What a wrapped step returns where the user's returned None: under `loss` one whose gradients are all zero, so
    that this rank takes its part in the reduction that the others wait for."""


class SyncedCheck(Protocol):
    """Looks after each backward pass of a wrapped step whether all gradients have been synced."""

    def __call__(self) -> bool:
        """True: the step is to be wrapped anew, on every rank. ModuleError: names parameters that the loss does not
        depend on."""
        ...

    def is_renewal_due(self) -> bool:
        """The same between two epochs. Collective."""
        ...


class PendingGradients(Protocol):
    """What backward passes outside a wrapped step have added on this rank alone."""

    def average(self) -> None:
        """Make it the mean over the ranks. Collective, unless no backward pass has run since the last time."""
        ...

    def is_outdated(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Others of the parameters are trained now than when this was made."""
        ...

    def close(self) -> None: ...


class Strategy(Protocol):
    @property
    def is_forward_collective(self) -> bool:
        """A forward pass in train mode waits for the other ranks: each has to run one in every step."""
        ...

    @property
    def is_evaluation_collective(self) -> bool:
        """The same of a forward pass in eval mode."""
        ...

    @property
    def is_sharding(self) -> bool:
        """A rank has a part of the state only."""
        ...

    @property
    def is_gathering(self) -> bool:
        """Sharded, but `handed_over` brings the whole state together: it is collective."""
        ...

    def building(self) -> AbstractContextManager[object]:
        """Around `configure_model`."""
        ...

    def place(
        self,
        module: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        steps: Sequence[str],
        is_manual: bool,
    ) -> None:
        """To the device, floating-point numbers in that type. Collective where the strategy shards. `steps`: names of
        the user's methods that run the model; with `is_manual` its backward passes and steps are in `training_step`."""
        ...

    def set_up(self, module: nn.Module, *, device: torch.device) -> None:
        """Before training, with the module on its device. Collective."""
        ...

    def check_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """ConfigError: it cannot work with these."""
        ...

    def tear_down(self) -> None:
        """The end of what `set_up` has begun."""
        ...

    def recall(self, module: nn.Module) -> None:
        """The user's own module again, in main memory; its parameters on the meta device where no rank has them all."""
        ...

    @property
    def needs_batch_on_every_rank(self) -> bool:
        """Layers of the module wait for all ranks in their forward pass, so that none may be without a batch."""
        ...

    def silence(self, *, is_silent: bool) -> None:
        """Whether this rank's forward passes count for nothing in those of the others, which only wait for them."""
        ...

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        """The step to call so that its backward pass syncs the gradients of the trained parameters. Collective."""
        ...

    def build_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """For gradients that underflow, of which it may have seen a part only."""
        ...

    @property
    def is_finding_unused(self) -> bool:
        """Each step finds out by itself which parameters its loss does not depend on."""
        ...

    def find_unused(self) -> None:
        """Have steps that are wrapped from now on do so."""
        ...

    def synced_check(self, step: TrainingStep) -> SyncedCheck | None:
        """None: there is nothing to check."""
        ...

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        """Around forward and backward of a batch whose gradients are only accumulated."""
        ...

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean of the gradients over the ranks, where the backward pass has not synced them. Collective."""
        ...

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        """For backward passes that the module runs itself; None: they need nothing."""
        ...

    def share_weights(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers, where no step is wrapped. Collective."""
        ...

    def sync_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers (running statistics), before the state is read. Collective."""
        ...

    def clip_gradients(
        self, parameters: Iterable[nn.Parameter], *, limit: float, algorithm: Literal["norm", "value"]
    ) -> None:
        """In place: by the L2 norm over all the parameters, or each element."""
        ...

    def norms(self, gradients: Sequence[Tensor], order: float) -> list[Tensor]:
        """Of each, of this order. Collective where the strategy shards."""
        ...

    def evaluating(self, *, is_inference_mode: bool) -> AbstractContextManager[object]:
        """Around forward passes without gradients."""
        ...

    def handed_over(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's or an optimizer's state dict as rank 0 gives it to a checkpoint: placeholders on the meta device
        stand for what is among the `parts`."""
        ...

    def parts(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
        """The sharded tensors of the state by where they stand in a checkpoint; nothing where a checkpoint is whole."""
        ...

    def gathered_weights(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        """The whole weights at the end of a run, in pieces; nothing where every rank has them. Collective, rank 0's
        count."""
        ...

    def load_weights(self, module: nn.Module, state_dict: Mapping[str, Any], *, read: Reader | None) -> None:
        """Those that fit the module; `read` what placeholders stand for, where there are any."""
        ...

    def load_optimizer_states(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        states: Sequence[dict[str, Any]],
        *,
        read: Reader | None,
    ) -> None: ...
