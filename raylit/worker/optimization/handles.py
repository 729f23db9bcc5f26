"""Manual optimization, and the optimizers as a module sees them inside its hooks. Worker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.errors import ConfigError
from raylit.worker.loops.step_outputs import record_metrics
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.base import copy_gradients, set_gradients
from raylit.worker.optimization.stepper import Stepper, list_parameters
from raylit.worker.session import Session


class OptimizerHandle:
    """Proxy of an optimizer whose step runs hooks, scaler and step count; `isinstance` takes it for the optimizer."""

    def __init__(self, stepper: Stepper, handles: "OptimizerHandles") -> None:
        self._stepper = stepper
        self._handles = handles
        self.is_step_pending = False
        """Whether a backward pass, for this optimizer or another, has run since its last step."""

    @property
    def optimizer(self) -> Optimizer:
        """Return the user's own optimizer."""
        return self._stepper.optimizer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._stepper.optimizer)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Prepare the gradients and step.

        `closure` computes the gradients and returns the loss, or None if there is none.
        """
        stepper = self._stepper
        if self._handles.is_manual:
            self._handles.sync()
        self.is_step_pending = False
        if stepper.has_scaler:
            return self._step_scaled(closure)
        if closure is None:
            stepper.prepare(is_clipping=not self._handles.is_manual)
            result = stepper.optimizer.step(**kwargs)
        else:
            result = stepper.optimizer.step(closure=self._prepare_in(closure), **kwargs)
        stepper.count_step()
        return result

    def _step_scaled(self, closure: Callable[[], Any] | None) -> Any:
        loss = None if closure is None else closure()
        if closure is None or loss is not None or self._handles.is_manual:
            self._stepper.prepare(is_clipping=not self._handles.is_manual)
            self._stepper.finish()
        return loss

    def _prepare_in(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            loss = closure()
            if self._handles.is_manual:
                self._handles.sync()
            self._stepper.prepare(is_clipping=not self._handles.is_manual)
            return loss

        return call

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Freeze the other optimizers' parameters in the context.

        Without `sync_grad`, gradients stay local to this rank until the next sync, which is that of a later backward
        pass or of the step.
        """
        before, self._handles.is_syncing = self._handles.is_syncing, sync_grad
        self._handles.toggle(self)
        try:
            yield
        finally:
            self._handles.untoggle(self)
            self._handles.is_syncing = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stepper"].optimizer, name)

    def __repr__(self) -> str:
        return repr(self._stepper.optimizer)


class OptimizerHandles:
    """Targets of `self.optimizers()`, `self.manual_backward()`, `self.toggle_optimizer()` and the like."""

    def __init__(self, session: Session, steppers: list[Stepper], *, is_manual: bool) -> None:
        self.is_manual = is_manual
        self.is_syncing = True
        """Whether backward passes average their gradients over the ranks."""
        self.weight = 1.0
        """Factor by which losses of the current batch count."""
        self._module = session.module
        self._own_backward = session.measure_call("backward", session.module.backward)
        self._strategy = session.strategy
        self._scaler = session.precision.scaler
        self._steppers = steppers
        self._pending = session.strategy.pending_gradients(session.module) if is_manual else None
        self._before_backward = session.hooks.list_calls("on_before_backward")
        self._after_backward = session.hooks.list_calls("on_after_backward")
        self._frozen: dict[int, list[nn.Parameter]] = {}
        self.optimizers = [OptimizerHandle(stepper, self) for stepper in steppers]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run a backward pass with its hooks, the loss scale and the sync. Collective while `is_syncing`.

        Raises:
            ConfigError: the module is optimized automatically.
        """
        if not self.is_manual:
            raise ConfigError(
                "manual_backward is for manual optimization: set self.automatic_optimization = False in __init__, or "
                "return the loss from training_step"
            )
        for hook in self._before_backward:
            hook(loss)
        if self.weight != 1.0:
            loss = loss * self.weight
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        with nullcontext() if self.is_syncing else self._strategy.without_sync(self._own_backward):
            self._own_backward(loss, *args, **kwargs)
        for handle in self.optimizers:
            handle.is_step_pending = True
        if self.is_syncing:
            self.sync()
        for hook in self._after_backward:
            hook()

    def sync(self) -> None:
        """Average what backward passes have added since the last sync. Collective unless this rank has run none."""
        if self._pending is not None:
            self._pending.average()

    def end_batch(self) -> None:
        """Update the shared loss scale at the end of a batch, when no gradients wait for a step."""
        if self._steppers and (shared_scale := self._steppers[0].shared_scale) is not None:
            shared_scale.update()

    def update_trained(self) -> None:
        """Sync the gradients of the parameters that are trained now: a thaw takes effect with the next epoch."""
        if self._pending is not None and self._pending.is_outdated(self._module.parameters()):
            self._pending.average()
            self._pending.close()
            self._pending = self._strategy.pending_gradients(self._module)

    def clip(self, optimizer: Any, *, limit: float, algorithm: Literal["norm", "value"]) -> None:
        self._find_stepper(optimizer).unscale()
        self._strategy.clip_gradients(list_parameters(optimizer), limit=limit, algorithm=algorithm)

    def toggle(self, optimizer: Any) -> None:
        """Freeze the parameters of the other optimizers until `untoggle`."""
        stepper = self._find_stepper(optimizer)
        own = {id(parameter) for parameter in list_parameters(stepper.optimizer)}
        others = [p for other in self._steppers for p in list_parameters(other.optimizer) if id(p) not in own]
        frozen = self._frozen[id(stepper)] = [parameter for parameter in others if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)

    @contextmanager
    def toggle_context(self, optimizer: Any) -> Iterator[None]:
        self.toggle(optimizer)
        try:
            yield
        finally:
            self.untoggle(optimizer)

    def untoggle(self, optimizer: Any) -> None:
        for parameter in self._frozen.pop(id(self._find_stepper(optimizer)), []):
            parameter.requires_grad_(True)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.close()

    def _find_stepper(self, optimizer: Any) -> Stepper:
        own = optimizer.optimizer if type(optimizer) is OptimizerHandle else optimizer
        for stepper in self._steppers:
            if stepper.optimizer is own:
                return stepper
        raise ConfigError(f"{type(own).__name__} is none of the optimizers that configure_optimizers returned")


class ManualOptimization:
    """Optimization of a module with `automatic_optimization = False`; `manual_backward` syncs the gradients."""

    num_outputs = 1

    def __init__(
        self, session: Session, *, handles: OptimizerHandles, training_step: Callable[..., Any], metrics: MetricBuffer
    ) -> None:
        session.strategy.share_weights(session.module)
        self._module = session.module
        self._precision = session.precision
        self._handles = handles
        self._training_step = training_step
        self._metrics = metrics

    def start_epoch(self, *, window: int) -> None:
        self._handles.update_trained()

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        with self._precision.step_context():
            outputs = self._training_step(batch, batch_idx)
        self._handles.end_batch()
        record_metrics(outputs, self._metrics)
        return outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        self._handles.weight = weight
        try:
            return self.run_batch(batch, batch_idx, is_window_end)
        finally:
            self._handles.weight = 1.0

    def finish_window(self) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        pending = {
            str(index): copy_gradients(handle.optimizer, self._module)
            for index, handle in enumerate(self._handles.optimizers)
            if handle.is_step_pending
        }
        return {index: gradients for index, gradients in pending.items() if gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, gradients in state.items():
            handle = self._handles.optimizers[int(index)]
            set_gradients(handle.optimizer, self._module, gradients)
            handle.is_step_pending = True

    def is_active(self, optimizer_idx: int | None) -> bool:
        return False

    def read_hiddens(self, outputs: Any) -> Any:
        return None
