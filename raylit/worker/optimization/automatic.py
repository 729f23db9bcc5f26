"""Automatic optimization with one optimizer or several, and its gradient sync. Worker."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from time import perf_counter
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.accelerators.transfer import map_tensors
from raylit.core.module import LightningModule
from raylit.strategies import ZeroLoss
from raylit.strategies.base import SyncCheck
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.loops.step_outputs import hiddens_of, read_loss
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.base import Optimization, copy_gradients, set_gradients
from raylit.worker.optimization.handles import OptimizerHandles
from raylit.worker.optimization.stepper import Stepper, build_loss_checks, list_parameters
from raylit.worker.session import Session
from raylit.worker.view import TrainerView

Step = Callable[..., Any]


class AutomaticOptimization:
    """Automatic optimization with one optimizer: forward, backward and, at the end of a window, a step."""

    num_outputs = 1

    def __init__(self, session: Session, stepper: Stepper, *, training_step: Step, metrics: MetricBuffer) -> None:
        module, hooks = session.module, session.hooks
        self._module = module
        self._stepper = stepper
        self._strategy = session.strategy
        self._precision = session.precision
        self._metrics = metrics
        self._uneven = session.uneven
        self._clock = session.clock
        self._has_uneven_steps = not session.strategy.is_forward_collective
        """False where the forward pass is collective: all ranks run every step then."""
        self._sync = GradientSync(session, training_step, optimizer=stepper.optimizer)
        self._synced_step, self._check_synced = self._sync.step, self._sync.check
        self._before_backward = (*build_loss_checks(session), *hooks.list_calls("on_before_backward"))
        self._after_backward = hooks.list_calls("on_after_backward")
        is_called = session.profiler is not None or is_overridden("backward", module, LightningModule)
        self._own_backward = session.measure_call("backward", module.backward) if is_called else None
        self._is_window_start = True
        self._window = 1
        self._is_plain = False

    def start_epoch(self, *, window: int) -> None:
        if self._sync.wrap_if_due():
            self._synced_step, self._check_synced = self._sync.step, self._sync.check
        self._window = window
        self._is_plain = self._precision.is_plain and self._precision.scaler is None and window == 1

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        if self._is_plain:
            outputs = self._synced_step(batch, batch_idx, *extra)
            loss = outputs if isinstance(outputs, Tensor) else read_loss(outputs, self._metrics)
            self._backward(loss, 1.0, self._check_synced)
        else:
            with nullcontext() if is_window_end else self._sync.without_sync():
                with self._precision.step_context():
                    outputs = self._synced_step(batch, batch_idx, *extra)
                self._backward(read_loss(outputs, self._metrics), 1.0, self._check_synced if is_window_end else None)
        if is_window_end and not self._is_window_start:
            self._is_window_start = True
            self._stepper.step()
        return None if type(outputs) is ZeroLoss else outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        if self._has_uneven_steps:
            own = None if batch is None else (weight, batch, batch_idx, *extra)
            outputs = self._uneven.run_unless_known(self._add_share, own, run_padding=self._run_padding_share)
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
        return {} if self._is_window_start else copy_gradients(self._stepper.optimizer, self._module)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            set_gradients(self._stepper.optimizer, self._module, state)
            self._is_window_start = False

    def is_active(self, optimizer_idx: int | None) -> bool:
        return True

    def read_hiddens(self, outputs: Any) -> Any:
        return map_tensors(hiddens_of(outputs), Tensor.detach)

    def _add_share(self, weight: float, batch: Any, batch_idx: int, *extra: Any) -> Any:
        with self._precision.step_context():
            outputs = self._sync.share_step(batch, batch_idx, *extra)
        self._backward(read_loss(outputs, self._metrics), weight)
        return outputs

    def _run_padding_share(self, weight: float, *args: Any) -> None:
        """Run another rank's share with weight 0, for the collectives in it."""
        self._add_share(0.0, *args)

    def _backward(self, loss: Tensor | None, weight: float, check_synced: SyncCheck | None = None) -> None:
        """Run the backward pass of a weighted loss; `check_synced` follows it where the gradients are to be synced."""
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
        began_at = perf_counter()
        if self._own_backward is None:
            loss.backward()
        else:
            self._own_backward(loss)
        self._clock.backward_s += perf_counter() - began_at
        if check_synced is not None and check_synced():
            self._sync.wrap_step()
            self._synced_step, self._check_synced = self._sync.step, self._sync.check
        for hook in self._after_backward:
            hook()

    def _start_window(self) -> None:
        self._is_window_start = False
        self._stepper.start_window()


class SeveralOptimizers:
    """Automatic optimization of Lightning before 2.0 with `training_step(batch, batch_idx, optimizer_idx)`."""

    def __init__(
        self,
        optimizations: list[Optimization],
        *,
        handles: OptimizerHandles,
        frequencies: tuple[int, ...] | None,
        view: TrainerView,
    ) -> None:
        self.num_outputs = len(optimizations)
        self._optimizations = optimizations
        self._handles = handles
        self._view = view
        self._borders = None if frequencies is None else list(accumulate(frequencies))
        self._active = range(len(optimizations))

    def start_epoch(self, *, window: int) -> None:
        for optimization in self._optimizations:
            optimization.start_epoch(window=window)

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        outputs = self._run_active(
            lambda optimization, own: optimization.run_batch(batch, batch_idx, is_window_end, *own), extra
        )
        if is_window_end:
            self._handles.end_batch()
        return outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        return self._run_active(
            lambda optimization, own: optimization.run_share(batch, batch_idx, is_window_end, weight, *own), extra
        )

    def finish_window(self) -> bool:
        is_stepped = any([optimization.finish_window() for optimization in self._optimizations])
        self._handles.end_batch()
        return is_stepped

    def state_dict(self) -> dict[str, Any]:
        states = {str(index): optimization.state_dict() for index, optimization in enumerate(self._optimizations)}
        return {index: state for index, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, optimization in enumerate(self._optimizations):
            optimization.load_state_dict(state.get(str(index), {}))

    def is_active(self, optimizer_idx: int | None) -> bool:
        return optimizer_idx is None or optimizer_idx in self._active

    def read_hiddens(self, outputs: Any) -> Any:
        return [
            optimization.read_hiddens(output) for optimization, output in zip(self._optimizations, outputs, strict=True)
        ]

    def _run_active(self, run: Callable[[Optimization, tuple[Any, ...]], Any], extra: tuple[Any, ...]) -> list[Any]:
        """Run the active optimizers; return the step's output for each, None for inactive ones."""
        outputs: list[Any] = [None] * len(self._optimizations)
        self._active = self._find_active()
        for index in self._active:
            optimizer = self._handles.optimizers[index]
            self._handles.toggle(optimizer)
            try:
                # Each optimizer gets its own hiddens.
                outputs[index] = run(
                    self._optimizations[index], tuple(one[index] if one is not None else None for one in extra)
                )
            finally:
                self._handles.untoggle(optimizer)
        return outputs

    def _find_active(self) -> range:
        if self._borders is None:
            return range(len(self._optimizations))
        position = self._view.total_batches % self._borders[-1]
        index = next(index for index, border in enumerate(self._borders) if position < border)
        return range(index, index + 1)


class GradientSync:
    """Training step wrapped for gradient sync, for the parameters that the optimizer trains.

    A freeze, a thaw or a new parameter group takes effect with the next epoch.
    """

    def __init__(self, session: Session, training_step: Callable[..., Any], *, optimizer: Optimizer) -> None:
        self._module = session.module
        self._strategy = session.strategy
        self._training_step = training_step
        self._optimizer = optimizer
        self.wrap_step()

    def wrap_step(self) -> None:
        """Wrap the step for the parameters that are trained now. Collective."""
        self._trained = self._list_trained()
        self.step = self._strategy.wrap(self._module, self._training_step, trained=self._trained)
        self.share_step = self.step if self._strategy.is_sharding else self._training_step
        """Step for batches of an uneven split, as DDP's reduction needs a backward pass on every rank."""
        self.check = self._strategy.build_sync_check(self.step)
        """Check to call after a backward pass that has synced; None: there is nothing to check.

        Where it returns True, call `wrap_step`.
        """

    @property
    def is_outdated(self) -> bool:
        """Return whether the step was wrapped for other parameters or needs a check no longer."""
        if self._strategy.is_finding_unused and self.check is not None:
            return True
        return [id(parameter) for parameter in self._list_trained()] != [id(parameter) for parameter in self._trained]

    def wrap_if_due(self) -> bool:
        """Wrap the step again before an epoch if that is due, and return whether it was. Collective."""
        is_due = (self.check is not None and self.check.is_renewal_due()) or self.is_outdated
        if is_due:
            self.wrap_step()
        return is_due

    def without_sync(self) -> AbstractContextManager[object]:
        """Return the context for forward and backward of a batch whose gradients are only accumulated."""
        return self._strategy.without_sync(self.step)

    def _list_trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in list_parameters(self._optimizer) if parameter.requires_grad]
