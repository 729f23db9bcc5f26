"""Automatic optimization, with one optimizer or several."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

from torch import Tensor

from raylit.accelerators.transfer import map_tensors
from raylit.core.module import LightningModule
from raylit.strategies import ZeroLoss
from raylit.strategies.base import SyncedCheck
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.loops.step_outputs import hiddens_of, loss_of
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.base import Optimization
from raylit.worker.optimization.gradient_sync import GradientSync, gradients_of, set_gradients
from raylit.worker.optimization.handles import Handles
from raylit.worker.optimization.stepper import Stepper, loss_check
from raylit.worker.session import Session
from raylit.worker.view import TrainerView

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
        return None if type(outputs) is ZeroLoss else outputs

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
        return None if type(outputs) is ZeroLoss else outputs

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


class SeveralOptimizers:
    """Automatic optimization as Lightning had it before 2.0: `training_step(batch, batch_idx, optimizer_idx)`."""

    def __init__(
        self, turns: list[Optimization], *, handles: Handles, frequencies: tuple[int, ...] | None, view: TrainerView
    ) -> None:
        self.num_outputs = len(turns)
        self._turns = turns
        self._handles = handles
        self._view = view
        self._borders = None if frequencies is None else list(accumulate(frequencies))
        self._active = range(len(turns))

    def start_epoch(self, *, window: int) -> None:
        for turn in self._turns:
            turn.start_epoch(window=window)

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        outputs = self._in_turn(lambda turn, own: turn.run_batch(batch, batch_idx, is_window_end, *own), extra)
        if is_window_end:
            self._handles.end_batch()
        return outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        return self._in_turn(lambda turn, own: turn.run_share(batch, batch_idx, is_window_end, weight, *own), extra)

    def finish_window(self) -> bool:
        is_stepped = any([turn.finish_window() for turn in self._turns])
        self._handles.end_batch()
        return is_stepped

    def state_dict(self) -> dict[str, Any]:
        states = {str(index): turn.state_dict() for index, turn in enumerate(self._turns)}
        return {index: state for index, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, turn in enumerate(self._turns):
            turn.load_state_dict(state.get(str(index), {}))

    def is_active(self, optimizer_idx: int | None) -> bool:
        return optimizer_idx is None or optimizer_idx in self._active

    def hiddens_of(self, outputs: Any) -> Any:
        return [turn.hiddens_of(output) for turn, output in zip(self._turns, outputs, strict=True)]

    def _in_turn(self, run: Callable[[Optimization, tuple[Any, ...]], Any], extra: tuple[Any, ...]) -> list[Any]:
        """What the step returned for each optimizer, None for those without a turn."""
        outputs: list[Any] = [None] * len(self._turns)
        self._active = self._now_active()
        for index in self._active:
            optimizer = self._handles.optimizers[index]
            self._handles.toggle(optimizer)
            try:
                # Of several optimizers' hiddens each gets its own.
                outputs[index] = run(
                    self._turns[index], tuple(one[index] if one is not None else None for one in extra)
                )
            finally:
                self._handles.untoggle(optimizer)
        return outputs

    def _now_active(self) -> range:
        if self._borders is None:
            return range(len(self._turns))
        place = self._view.num_batches_in_all % self._borders[-1]
        index = next(index for index, border in enumerate(self._borders) if place < border)
        return range(index, index + 1)
