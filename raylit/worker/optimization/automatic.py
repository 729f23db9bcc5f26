"""AutomaticOptimization: one optimizer, driven by the loss that `training_step` returns. Worker; the hot path."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from raylit.accelerators.transfer import map_tensors
from raylit.module import LightningModule
from raylit.strategies import Skipped
from raylit.strategies.base import SyncedCheck
from raylit.worker.hooks import is_overridden
from raylit.worker.metrics import MetricBuffer
from raylit.worker.optimization.gradient_sync import GradientSync
from raylit.worker.optimization.gradients import gradients_of, set_gradients
from raylit.worker.optimization.stepper import Stepper, loss_check
from raylit.worker.returns import hiddens_of, loss_of
from raylit.worker.session import Session

Step = Callable[..., Any]


class AutomaticOptimization:
    """Forward, backward and, at a window's end, the optimizer's step."""

    num_outputs = 1

    def __init__(self, session: Session, stepper: Stepper, *, training_step: Step, metrics: MetricBuffer) -> None:
        module, hooks = session.module, session.hooks
        self._module = module
        self._stepper = stepper
        self._strategy = session.strategy
        self._precision = session.precision
        self._metrics = metrics
        self._uneven = session.uneven
        self._is_following = not session.strategy.is_forward_collective
        """Else all ranks run every step anyway."""
        self._sync = GradientSync(session, training_step, optimizer=stepper.optimizer)
        self._synced_step, self._check_synced = self._sync.step, self._sync.check
        self._before_backward = (*loss_check(session), *hooks.of("on_before_backward"))
        self._after_backward = hooks.of("on_after_backward")
        is_called = session.profiler is not None or is_overridden("backward", module, LightningModule)
        self._own_backward = session.timed("backward", module.backward) if is_called else None
        self._is_window_start = True
        self._window = 1
        self._is_plain = False

    def start_epoch(self, *, window: int) -> None:
        if self._sync.follow():
            self._synced_step, self._check_synced = self._sync.step, self._sync.check
        self._window = window
        self._is_plain = self._precision.is_plain and self._precision.scaler is None and window == 1

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        if self._is_plain:
            outputs = self._synced_step(batch, batch_idx, *extra)
            loss = outputs if isinstance(outputs, Tensor) else loss_of(outputs, self._metrics)
            self._backward(loss, 1.0, self._check_synced)
        else:
            with nullcontext() if is_window_end else self._sync.paused():
                with self._precision.around_step():
                    outputs = self._synced_step(batch, batch_idx, *extra)
                self._backward(loss_of(outputs, self._metrics), 1.0, self._check_synced if is_window_end else None)
        if is_window_end and not self._is_window_start:
            self._is_window_start = True
            self._stepper.step()
        return None if type(outputs) is Skipped else outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        if self._is_following:
            own = None if batch is None else (weight, batch, batch_idx, *extra)
            outputs = self._uneven.run_unless_quiet(self._add_share, own, follow=self._add_nothing)
        else:
            outputs = None if batch is None else self._add_share(weight, batch, batch_idx, *extra)
        if self._is_window_start:
            self._start_window()
        if is_window_end:
            self.finish_window()
        return None if type(outputs) is Skipped else outputs

    def finish_window(self) -> bool:
        if self._is_window_start:
            return False
        self._is_window_start = True
        self._strategy.reduce_gradients(self._module.parameters())
        self._stepper.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        return {} if self._is_window_start else gradients_of(self._stepper.optimizer, self._module)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            set_gradients(self._stepper.optimizer, self._module, state)
            self._is_window_start = False

    def is_active(self, optimizer_idx: int | None) -> bool:
        return True

    def hiddens_of(self, outputs: Any) -> Any:
        return map_tensors(hiddens_of(outputs), Tensor.detach)

    def _add_share(self, weight: float, batch: Any, batch_idx: int, *extra: Any) -> Any:
        with self._precision.around_step():
            outputs = self._sync.share_step(batch, batch_idx, *extra)
        self._backward(loss_of(outputs, self._metrics), weight)
        return outputs

    def _add_nothing(self, weight: float, *args: Any) -> None:
        """Another rank's share, run for the collectives in it."""
        self._add_share(0.0, *args)

    def _backward(self, loss: Tensor | None, weight: float, check_synced: SyncedCheck | None = None) -> None:
        """`check_synced`: the gradients are to be synced by now, before hooks see them."""
        if self._is_window_start:
            self._start_window()
        if loss is None:
            return
        for hook in self._before_backward:
            hook(loss)
        if not self._is_plain or weight != 1.0:
            loss = loss * (weight / self._window)
            if self._precision.scaler is not None:
                loss = self._precision.scaler.scale(loss)
        if self._own_backward is None:
            loss.backward()
        else:
            self._own_backward(loss)
        if check_synced is not None and check_synced():
            self._sync.renew()
            self._synced_step, self._check_synced = self._sync.step, self._sync.check
        for hook in self._after_backward:
            hook()

    def _start_window(self) -> None:
        self._is_window_start = False
        self._stepper.start_window()
