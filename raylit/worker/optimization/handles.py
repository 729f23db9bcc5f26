"""Handles: the optimizers as a module sees them inside its hooks. Worker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.errors import ConfigError
from raylit.worker.optimization.stepper import Stepper, parameters_of
from raylit.worker.session import Session


class OptimizerHandle:
    """Stands for an optimizer, which it is an instance of by `isinstance`; its step runs hooks, scaler and count."""

    def __init__(self, stepper: Stepper, handles: "Handles") -> None:
        self._stepper = stepper
        self._handles = handles
        self.is_step_pending = False
        """There has been a backward pass, of this optimizer or another, since its last step."""

    @property
    def optimizer(self) -> Optimizer:
        """The user's own object."""
        return self._stepper.optimizer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._stepper.optimizer)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Prepare the gradients and step. `closure` computes them and returns the loss, None: there is none."""
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
            result = stepper.optimizer.step(closure=self._prepared_by(closure), **kwargs)
        stepper.count_step()
        return result

    def _step_scaled(self, closure: Callable[[], Any] | None) -> Any:
        loss = None if closure is None else closure()
        if closure is None or loss is not None or self._handles.is_manual:
            self._stepper.prepare(is_clipping=not self._handles.is_manual)
            self._stepper.finish()
        return loss

    def _prepared_by(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def prepared() -> Any:
            loss = closure()
            if self._handles.is_manual:
                self._handles.sync()
            self._stepper.prepare(is_clipping=not self._handles.is_manual)
            return loss

        return prepared

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """The other optimizers' parameters frozen; without `sync_grad` gradients stay this rank's until the next sync,
        which is that of a later backward pass or of the step."""
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


class Handles:
    """What `self.optimizers()`, `self.manual_backward()`, `self.toggle_optimizer()` and their like reach."""

    def __init__(self, session: Session, steppers: list[Stepper], *, is_manual: bool) -> None:
        self.is_manual = is_manual
        self.is_syncing = True
        """Backward passes average their gradients over the ranks."""
        self.weight = 1.0
        """By which the losses of the batch under way count."""
        self._module = session.module
        self._own_backward = session.timed("backward", session.module.backward)
        self._strategy = session.strategy
        self._scaler = session.precision.scaler
        self._steppers = steppers
        self._pending = session.strategy.pending_gradients(session.module) if is_manual else None
        self._before_backward = session.hooks.of("on_before_backward")
        self._after_backward = session.hooks.of("on_after_backward")
        self._frozen: dict[int, list[nn.Parameter]] = {}
        self.optimizers = [OptimizerHandle(stepper, self) for stepper in steppers]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
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
        """Average what backward passes have added since the last sync. Collective, where there is something."""
        if self._pending is not None:
            self._pending.average()

    def end_batch(self) -> None:
        """No gradients wait for a step any longer."""
        if self._steppers and (shared_scale := self._steppers[0].shared_scale) is not None:
            shared_scale.update()

    def follow_trained(self) -> None:
        """Sync the gradients of the parameters that are trained now: a thaw takes effect with the next epoch."""
        if self._pending is not None and self._pending.is_outdated(self._module.parameters()):
            self._pending.average()
            self._pending.close()
            self._pending = self._strategy.pending_gradients(self._module)

    def clip(self, optimizer: Any, *, limit: float, algorithm: Literal["norm", "value"]) -> None:
        self._stepper_of(optimizer).unscale()
        self._strategy.clip_gradients(parameters_of(optimizer), limit=limit, algorithm=algorithm)

    def toggle(self, optimizer: Any) -> None:
        """Freeze the parameters of the other optimizers, until `untoggle`."""
        stepper = self._stepper_of(optimizer)
        own = {id(parameter) for parameter in parameters_of(stepper.optimizer)}
        others = [p for other in self._steppers for p in parameters_of(other.optimizer) if id(p) not in own]
        frozen = self._frozen[id(stepper)] = [parameter for parameter in others if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)

    def untoggle(self, optimizer: Any) -> None:
        for parameter in self._frozen.pop(id(self._stepper_of(optimizer)), []):
            parameter.requires_grad_(True)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.close()

    def _stepper_of(self, optimizer: Any) -> Stepper:
        wanted = optimizer.optimizer if type(optimizer) is OptimizerHandle else optimizer
        for stepper in self._steppers:
            if stepper.optimizer is wanted:
                return stepper
        raise ConfigError(f"{type(wanted).__name__} is none of the optimizers that configure_optimizers returned")
