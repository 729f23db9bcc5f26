"""Optimization by a closure that the optimizer's step calls. Worker.

It serves optimizers that evaluate the loss themselves, and modules that override `optimizer_step`.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from raylit.accelerators.transfer import map_tensors
from raylit.core.module import LightningModule
from raylit.errors import ConfigError
from raylit.strategies import ZeroLoss
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.loops.step_outputs import hiddens_of, read_loss
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.automatic import GradientSync
from raylit.worker.optimization.base import copy_gradients, set_gradients
from raylit.worker.optimization.handles import OptimizerHandle
from raylit.worker.optimization.stepper import Stepper, build_loss_checks
from raylit.worker.session import Session


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's step may evaluate the loss; of torch's own only LBFGS does."""
    return isinstance(optimizer, LBFGS) or not type(optimizer).__module__.startswith(("torch.optim", "raylit."))


class ClosureOptimization:
    """Optimization in which forward and backward run inside the optimizer's step, as often as it calls its closure."""

    num_outputs = 1

    def __init__(
        self,
        session: Session,
        stepper: Stepper,
        *,
        handle: OptimizerHandle,
        training_step: Callable[..., Any],
        metrics: MetricBuffer,
    ) -> None:
        if isinstance(stepper.optimizer, LBFGS) and session.precision.scaler is not None:
            raise ConfigError("LBFGS evaluates its loss several times in a step, which a gradient scaler cannot follow")
        self._module = session.module
        self._view = session.view
        self._collectives = session.collectives
        self._device = session.device
        self._stepper = stepper
        self._strategy = session.strategy
        self._precision = session.precision
        self._handle = handle
        self._metrics = metrics
        self._uneven = session.uneven
        self._has_uneven_steps = not session.strategy.is_forward_collective
        """False where the forward pass is collective: all ranks run every step then."""
        self._sync = GradientSync(session, training_step, optimizer=stepper.optimizer)
        self._before_backward = (*build_loss_checks(session), *session.hooks.list_calls("on_before_backward"))
        self._after_backward = session.hooks.list_calls("on_after_backward")
        self._own_backward = session.measure_call("backward", self._module.backward)
        self._is_evaluating = needs_closure(stepper.optimizer)
        self._is_overridden = is_overridden("optimizer_step", session.module, LightningModule)
        self._is_window_start = True
        self._is_renewal_due = False
        self._window = 1

    def start_epoch(self, *, window: int) -> None:
        if self._is_evaluating and not self._is_overridden and window > 1:
            raise ConfigError(
                f"accumulate_grad_batches={window} with {type(self._stepper.optimizer).__name__}: it evaluates the "
                "loss of one batch in its step; use 1, and larger batches"
            )
        self._sync.wrap_if_due()
        self._window = window

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        if self._is_renewal_due:
            self._sync.wrap_step()
            self._is_renewal_due = False
        evaluation = _Evaluation(self._sync.step, (batch, batch_idx, *extra), is_synced=is_window_end)
        with nullcontext() if is_window_end else self._sync.without_sync():
            self._run_closure(functools.partial(self._evaluate, evaluation, 1.0), batch_idx, is_window_end)
        return None if type(evaluation.outputs) is ZeroLoss else evaluation.outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        evaluation = _Evaluation(
            self._sync.share_step,
            None if batch is None else (batch, batch_idx, *extra),
            is_share=True,
            is_synced_by_hand=is_window_end,
        )
        self._run_closure(functools.partial(self._evaluate, evaluation, weight), batch_idx, is_window_end)
        return None if type(evaluation.outputs) is ZeroLoss else evaluation.outputs

    def finish_window(self) -> bool:
        if self._is_window_start:
            return False
        evaluation = _Evaluation(self._sync.share_step, None, is_synced_by_hand=True)
        self._run_closure(functools.partial(self._evaluate, evaluation, 0.0), self._view.num_batches_done, True)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {} if self._is_window_start else copy_gradients(self._stepper.optimizer, self._module)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            set_gradients(self._stepper.optimizer, self._module, state)
            self._is_window_start = False

    def is_active(self, optimizer_idx: int | None) -> bool:
        return True

    def read_hiddens(self, outputs: Any) -> Any:
        return map_tensors(hiddens_of(outputs), torch.Tensor.detach)

    def _run_closure(self, closure: Callable[[], Any], batch_idx: int, is_window_end: bool) -> None:
        if not is_window_end:
            closure()
            return
        self._module.optimizer_step(self._view.current_epoch, batch_idx, self._handle, closure)
        self._is_window_start = True

    def _evaluate(self, evaluation: "_Evaluation", weight: float) -> Any:
        """Compute the batch's gradients and return its loss: the closure of the optimizer's step.

        For an optimizer that decides by the loss it is the mean over all ranks; this is collective then.
        """
        loss = None
        with torch.enable_grad():
            if evaluation.args is None:
                self._start_window()
            if evaluation.is_share and self._has_uneven_steps:
                own = None if evaluation.args is None else (weight, *evaluation.args)
                loss = self._uneven.run_unless_known(
                    functools.partial(self._add_gradients, evaluation),
                    own,
                    run_padding=functools.partial(self._run_padding_share, evaluation),
                )
            elif evaluation.args is not None:
                loss = self._add_gradients(evaluation, weight, *evaluation.args)
        if evaluation.is_synced_by_hand:
            self._strategy.reduce_gradients(self._module.parameters())
        elif evaluation.is_synced and self._sync.check is not None and self._sync.check():
            # The step is wrapped again with the next batch, as this one may be evaluated again by its old step.
            self._is_renewal_due = True
        if not self._is_evaluating:
            return loss
        # Use the same type on every rank, those without a batch included.
        share = torch.zeros((), dtype=torch.float64, device=self._device)
        return self._collectives.mean(share if loss is None else share + loss.detach() * weight)

    def _add_gradients(self, evaluation: "_Evaluation", weight: float, *args: Any) -> torch.Tensor | None:
        """Add the batch's gradients to those of its window, and return its loss."""
        with self._precision.step_context():
            evaluation.outputs = evaluation.step(*args)
        loss = read_loss(evaluation.outputs, self._metrics)
        self._start_window()
        if loss is not None:
            self._backward(loss, weight)
        return loss

    def _run_padding_share(self, evaluation: "_Evaluation", weight: float, *args: Any) -> None:
        """Run another rank's share with weight 0, for the collectives in it."""
        with self._precision.step_context():
            loss = read_loss(evaluation.step(*args), self._metrics)
        if loss is not None:
            self._backward(loss, 0.0)

    def _start_window(self) -> None:
        if self._is_window_start or (self._is_evaluating and self._window == 1):
            self._is_window_start = False
            self._stepper.start_window()

    def _backward(self, loss: torch.Tensor, weight: float) -> None:
        for hook in self._before_backward:
            hook(loss)
        if weight != 1.0 or self._window > 1:
            loss = loss * (weight / self._window)
        if self._precision.scaler is not None:
            loss = self._precision.scaler.scale(loss)
        self._own_backward(loss)
        for hook in self._after_backward:
            hook()


class _Evaluation:
    """Evaluations of one batch: the step, its arguments and the last output."""

    def __init__(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...] | None,
        *,
        is_share: bool = False,
        is_synced: bool = False,
        is_synced_by_hand: bool = False,
    ) -> None:
        """Store what is to be evaluated.

        `args` is None where this rank has no batch, `is_share` is True for a share of an uneven split, and
        `is_synced` states that the backward pass averages the gradients over the ranks.
        """
        self.step = step
        self.args = args
        self.is_share = is_share
        self.is_synced = is_synced
        self.is_synced_by_hand = is_synced_by_hand
        self.outputs: Any = None
