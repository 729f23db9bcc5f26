"""AutomaticOptimization: from a batch to gradients and, at the end of a window, to new weights. Worker."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from raylit.errors import ModuleError
from raylit.module import LightningModule
from raylit.plan import Optimization
from raylit.precision import Precision
from raylit.strategies import Strategy
from raylit.worker.hooks import Hooks
from raylit.worker.signatures import accepting_index


class AutomaticOptimization:
    """One optimizer, driven by the loss that `training_step` returns. Stands in the hot path."""

    def __init__(
        self,
        *,
        module: LightningModule,
        optimizer: Optimizer,
        strategy: Strategy,
        precision: Precision,
        plan: Optimization,
        hooks: Hooks,
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._strategy = strategy
        self._precision = precision
        self._plan = plan
        self._own_step = accepting_index(module.training_step)
        self._synced_step = strategy.wrap(module, self._own_step)
        self._before_zero_grad = hooks.of("on_before_zero_grad")
        self._before_backward = hooks.of("on_before_backward")
        self._after_backward = hooks.of("on_after_backward")
        self._before_step = hooks.of("on_before_optimizer_step")
        self._is_window_start = True
        self._is_plain = precision.is_plain and precision.scaler is None and plan.window_in(0) == 1
        self._is_stepping_plainly = precision.scaler is None and plan.clip_val is None

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool) -> Any:
        """Forward and backward; at the window's end a step. Returns what `training_step` did."""
        if self._is_plain:
            outputs = self._synced_step(batch, batch_idx)
            self._backward(outputs if isinstance(outputs, Tensor) else self._loss_of(outputs), 1.0)
        else:
            with nullcontext() if is_window_end else self._strategy.without_sync():
                with self._precision.around_step():
                    outputs = self._synced_step(batch, batch_idx)
                self._backward(self._loss_of(outputs), 1.0)
        if is_window_end:
            self._step()
        return outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float) -> Any:
        """A batch of an uneven split, or none: its loss counts by `weight`, its gradients are reduced by hand.

        DDP's own reduction runs in a backward pass and so needs a batch on every rank.
        """
        outputs = None
        if batch is None:
            if self._is_window_start:
                self._start_window()
        else:
            with self._precision.around_step():
                outputs = self._own_step(batch, batch_idx)
            self._backward(self._loss_of(outputs), weight)
        if is_window_end:
            self._strategy.reduce_gradients(self._module.parameters())
            self._step()
        return outputs

    def finish_window(self) -> bool:
        """Step with what has accumulated without sync; for a loader whose end came unforeseen. True: it did."""
        if self._is_window_start:
            return False
        self._strategy.reduce_gradients(self._module.parameters())
        self._step()
        return True

    def _backward(self, loss: Tensor, weight: float) -> None:
        if self._is_window_start:
            self._start_window()
        for hook in self._before_backward:
            hook(loss)
        if not self._is_plain or weight != 1.0:
            loss = loss * (weight / self._plan.window_in(0))
            if self._precision.scaler is not None:
                loss = self._precision.scaler.scale(loss)
        loss.backward()
        for hook in self._after_backward:
            hook()

    def _start_window(self) -> None:
        for hook in self._before_zero_grad:
            hook(self._optimizer)
        self._optimizer.zero_grad()
        self._is_window_start = False

    def _step(self) -> None:
        self._is_window_start = True
        if self._is_stepping_plainly:
            for hook in self._before_step:
                hook(self._optimizer)
            self._optimizer.step()
            return
        scaler = self._precision.scaler
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        if self._plan.clip_val is not None:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            self._strategy.clip_gradients(parameters, limit=self._plan.clip_val, algorithm=self._plan.clip_algorithm)
        for hook in self._before_step:
            hook(self._optimizer)
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()

    def _loss_of(self, outputs: Any) -> Tensor:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            raise ModuleError(
                f"training_step returned {type(outputs).__name__}"
                f"{' without a tensor under loss' if isinstance(outputs, dict) else ''}: "
                "return the loss as a tensor with a gradient, or a dict with it under 'loss'"
            )
        return loss
