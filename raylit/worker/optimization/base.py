"""Interface of optimizations, their wrappers, arguments of training_step, gradients in a checkpoint. Worker."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.core.module import LightningModule
from raylit.errors import ModuleError
from raylit.worker.collectives import Collectives
from raylit.worker.data.batches import to_cpu
from raylit.worker.data.sampling import wrap_uneven
from raylit.worker.loops.hooks import adapt_to_batch_index, num_positional
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.stepper import list_parameters
from raylit.worker.session import Session


class Optimization(Protocol):
    """Way from a batch to gradients and, at the end of a window of batches, to new weights."""

    num_outputs: int
    """Number of outputs of `training_step` for one batch: 1, or a list of that many with several optimizers."""

    def start_epoch(self, *, window: int) -> None:
        """Prepare for an epoch; `window` is the number of batches whose gradients are added up before a step."""
        ...

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        """Run a batch that counts as much as those of the other ranks.

        `extra` are the last arguments of `training_step`. Returns its output; with several optimizers a list of
        outputs.
        """
        ...

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        """Run a batch of an uneven split, whose loss counts by `weight`; None: this rank has no part of it."""
        ...

    def finish_window(self) -> bool:
        """Step with the accumulated gradients, for a loader whose end was not known. Returns whether there were any."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients of an unfinished window, by the names of their parameters; empty between two windows."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the gradients of an unfinished window."""
        ...

    def is_active(self, optimizer_idx: int | None) -> bool:
        """Return whether an optimizer was active in the batch just run."""
        ...

    def read_hiddens(self, outputs: Any) -> Any:
        """Return the detached hiddens that `outputs` of `run_batch` pass on to the next piece of a sequence."""
        ...


def adapt_training_step(
    module: LightningModule, *, optimizer_idx: int | None, is_truncated: bool
) -> Callable[..., Any]:
    """Return a function of (batch, batch_idx[, hiddens]) that calls `training_step` for one optimizer.

    Raises:
        ModuleError: the step lacks an argument that it needs.
    """
    step = module.training_step
    names = ["batch", "batch_idx"]
    if optimizer_idx is not None:
        names.append("optimizer_idx")
    if is_truncated:
        names.append("hiddens")
    if len(names) == 2:
        return adapt_to_batch_index(step)
    if num_positional(step) < len(names):
        reason = "configure_optimizers returns several optimizers" if optimizer_idx is not None else ""
        more = "truncated back-propagation is on" if is_truncated else ""
        raise ModuleError(
            f"{type(module).__name__}.training_step must take ({', '.join(names)}), as "
            f"{' and '.join(filter(None, [reason, more]))}; or set automatic_optimization = False"
        )
    if optimizer_idx is None:
        return step

    def step_of_optimizer(batch: Any, batch_idx: int, *hiddens: Any) -> Any:
        return step(batch, batch_idx, optimizer_idx, *hiddens)

    return step_of_optimizer


class UnevenOptimization:
    """Wrapper of an optimization whose steps are collective, for uneven splits.

    A rank that has no part of a global batch runs another rank's batch, which is left out of gradients and metrics.
    """

    def __init__(self, inner: Optimization, *, session: Session, metrics: MetricBuffer) -> None:
        self._inner = inner
        self._module = session.module
        self._collectives = session.collectives
        self._strategy = session.strategy
        self._metrics = metrics
        self.num_outputs = inner.num_outputs
        self.start_epoch = inner.start_epoch
        self.run_batch = inner.run_batch
        self.finish_window = inner.finish_window
        self.state_dict = inner.state_dict
        self.load_state_dict = inner.load_state_dict
        self.is_active = inner.is_active
        self.read_hiddens = inner.read_hiddens

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        all_batches = self._collectives.gather_objects(None if batch is None else (batch, extra))
        if batch is not None:
            return self._inner.run_share(batch, batch_idx, is_window_end, weight, *extra)
        other_batch, extra = next(one for one in all_batches if one is not None)
        self._metrics.is_suspended = True
        self._strategy.exclude_rank(is_excluded=True)
        try:
            with torchmetrics_adapter.preserve_state(self._module):
                self._inner.run_share(other_batch, batch_idx, is_window_end, 0.0, *extra)
        finally:
            self._metrics.is_suspended = False
            self._strategy.exclude_rank(is_excluded=False)
        return None


class TruncatedOptimization:
    """Optimization that splits a batch along time and runs each piece as a batch with the hiddens of the one before."""

    def __init__(
        self,
        inner: Optimization,
        *,
        module: LightningModule,
        length: int,
        collectives: Collectives,
        metrics: MetricBuffer,
    ) -> None:
        self.num_outputs = inner.num_outputs
        self._inner = inner
        self._metrics = metrics
        self._module = module
        self._length = length
        self._collectives = collectives

    def start_epoch(self, *, window: int) -> None:
        self._inner.start_epoch(window=window)

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        return self._run_pieces(batch, batch_idx, is_window_end, 1.0)

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        return self._run_pieces(batch, batch_idx, is_window_end, weight)

    def finish_window(self) -> bool:
        return self._inner.finish_window()

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)

    def is_active(self, optimizer_idx: int | None) -> bool:
        return self._inner.is_active(optimizer_idx)

    def read_hiddens(self, outputs: Any) -> Any:
        return None

    def _run_pieces(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float) -> list[Any] | None:
        """Return the step's output for each piece; None if this rank has no batch."""
        pieces = [] if batch is None else list(self._module.tbptt_split_batch(batch, self._length))
        weights = self._weigh_pieces(len(pieces), weight)
        outputs: list[Any] = []
        hiddens = None
        self._metrics.is_piece = True
        for index, piece_weight in enumerate(weights):
            piece = pieces[index] if index < len(pieces) else None
            if piece_weight == 1.0:
                output = self._inner.run_batch(piece, batch_idx, is_window_end, hiddens)
            else:
                output = self._inner.run_share(piece, batch_idx, is_window_end, piece_weight, hiddens)
            if piece is not None:
                hiddens = self._inner.read_hiddens(output)
                outputs.append(output)
        self._metrics.is_piece = False
        return None if batch is None else outputs

    def _weigh_pieces(self, num_pieces: int, weight: float) -> list[float]:
        """Return this rank's weight in each piece that any rank has, as sequences differ in length.

        Collective, once per batch.
        """
        if self._collectives.world_size == 1:
            return [weight] * num_pieces
        rows = self._collectives.gather_vector(torch.tensor([num_pieces, weight], dtype=torch.float64))
        weights = []
        for index in range(int(rows[:, 0].max())):
            has_piece = rows[:, 0] > index
            share = weight * len(rows) / float(rows[has_piece, 1].sum())
            own = share if index < num_pieces else 0.0
            is_even = bool(has_piece.all()) and len(set(rows[:, 1].tolist())) == 1
            weights.append(own if is_even else wrap_uneven(own))
        return weights


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
