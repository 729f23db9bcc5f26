"""Interface between the training loop and the way in which ranks share gradients and state."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from raylit.strategies.sharded_state import Reader

TrainingStep = Callable[..., Any]
"""Function of (batch, batch_idx, ...) that returns what the user's training_step returns."""


class ZeroLoss(dict[str, Any]):
    """Output of a wrapped step whose user's training_step returned None.

    The loss under `loss` has gradients that are all zero, so that this rank takes part in the reduction that the
    other ranks wait for.
    """


class SyncCheck(Protocol):
    """Check after each backward pass of a wrapped step that all gradients have been synced."""

    def __call__(self) -> bool:
        """Return True if every rank has to wrap the step again.

        Raises:
            ModuleError: the loss does not depend on some parameters, which the message names.
        """
        ...

    def is_renewal_due(self) -> bool:
        """Return the same between two epochs. Collective."""
        ...


class PendingGradients(Protocol):
    """Gradients that backward passes outside a wrapped step have accumulated on this rank alone."""

    def average(self) -> None:
        """Replace them by their mean over the ranks.

        Collective, unless no backward pass has run since the last call.
        """
        ...

    def is_outdated(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether other parameters are trained now than when this object was made."""
        ...

    def close(self) -> None: ...


class Strategy(Protocol):
    """Way in which the ranks share the gradients and the state of one model."""

    @property
    def is_forward_collective(self) -> bool:
        """Return whether a forward pass in train mode is collective: each rank has to run one in every step."""
        ...

    @property
    def is_evaluation_collective(self) -> bool:
        """Return whether a forward pass in eval mode is collective."""
        ...

    @property
    def is_sharding(self) -> bool:
        """Return whether each rank holds only a part of the state."""
        ...

    @property
    def is_gathering(self) -> bool:
        """Return whether the state is sharded and `collect_state` gathers the whole of it, which is collective then."""
        ...

    def build_context(self) -> AbstractContextManager[object]:
        """Return the context in which `configure_model` runs."""
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
        """Move the module to the device and its floating-point tensors to `dtype`.

        Collective where the strategy shards.

        Args:
            module: the user's module.
            device: the device of this rank.
            dtype: type of floating-point parameters and buffers; None leaves it unchanged.
            steps: names of the user's methods that run the model.
            is_manual: whether backward passes and optimizer steps are made in `training_step` itself.
        """
        ...

    def set_up(self, module: nn.Module, *, device: torch.device) -> None:
        """Prepare the module for training, once it is on its device. Collective."""
        ...

    def check_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Check that the strategy can work with these optimizers.

        Raises:
            ConfigError: it cannot.
        """
        ...

    def tear_down(self) -> None:
        """Undo `set_up`."""
        ...

    def restore_module(self, module: nn.Module) -> None:
        """Turn the module back into the user's own, in main memory.

        Its parameters are on the meta device afterwards if no rank has the whole of them.
        """
        ...

    @property
    def needs_batch_on_every_rank(self) -> bool:
        """Return whether every rank needs a batch, as some layers wait for all ranks in their forward pass."""
        ...

    def exclude_rank(self, *, is_excluded: bool) -> None:
        """Leave this rank's batches out of statistics over all ranks, or include them again.

        Forward passes of an excluded rank still run the collectives that the other ranks wait for.
        """
        ...

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        """Return the step whose backward pass syncs the gradients of the trained parameters. Collective."""
        ...

    def build_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Build the scaler for gradients that underflow; it handles ranks that hold only a shard of them."""
        ...

    @property
    def is_finding_unused(self) -> bool:
        """Return whether each step searches for parameters that its loss does not depend on."""
        ...

    def find_unused(self) -> None:
        """Have steps that are wrapped from now on search for parameters that their loss does not depend on."""
        ...

    def build_sync_check(self, step: TrainingStep) -> SyncCheck | None:
        """Return the check of the step's gradient sync; None if there is nothing to check."""
        ...

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        """Return the context for forward and backward of a batch whose gradients are only accumulated."""
        ...

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the ranks where the backward pass has not synced them. Collective."""
        ...

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        """Return a handle for backward passes that the module runs itself; None if they need nothing."""
        ...

    def share_weights(self, module: nn.Module) -> None:
        """Broadcast rank 0's parameters and buffers where no step is wrapped. Collective."""
        ...

    def sync_buffers(self, module: nn.Module) -> None:
        """Broadcast rank 0's buffers (running statistics) before the state is read. Collective."""
        ...

    def clip_gradients(
        self, parameters: Iterable[nn.Parameter], *, limit: float, algorithm: Literal["norm", "value"]
    ) -> None:
        """Clip the gradients in place: all of them by their total L2 norm, or each element by value."""
        ...

    def compute_norms(self, gradients: Sequence[Tensor], order: float) -> list[Tensor]:
        """Return the norm of each gradient, of the given order. Collective where the strategy shards."""
        ...

    def evaluation_context(self, *, is_inference_mode: bool) -> AbstractContextManager[object]:
        """Return the context for forward passes without gradients."""
        ...

    def collect_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a module's or an optimizer's state dict in the form in which rank 0 adds it to a checkpoint.

        Placeholders on the meta device stand for the tensors that `parts` returns.
        """
        ...

    def parts(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
        """Return the sharded tensors of the state by their paths in a checkpoint; empty if checkpoints are whole."""
        ...

    def iterate_full_weights(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Yield the whole weights at the end of a run, in pieces; nothing if every rank has them.

        Collective. Only what rank 0 yields is of use.
        """
        ...

    def load_weights(self, module: nn.Module, state_dict: Mapping[str, Any], *, read: Reader | None) -> None:
        """Load weights into the module; where the state dict has placeholders, `read` reads what they stand for."""
        ...

    def load_optimizer_states(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        states: Sequence[dict[str, Any]],
        *,
        read: Reader | None,
    ) -> None:
        """Load a state into each optimizer; where a state has placeholders, `read` reads what they stand for."""
        ...
