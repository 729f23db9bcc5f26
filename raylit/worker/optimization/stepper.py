"""Optimizer step: unscaling, clipping, the step itself, and the loss scale that optimizers share. Worker."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from raylit.compat.torch_core import read_version
from raylit.compat.torch_optim import build_step, build_zero_grad, mark_stepped
from raylit.core.module import LightningModule
from raylit.errors import NotFiniteError
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.session import Session

Call = Callable[[], object]
Marks = frozenset[tuple[int, int, int]]


class Stepper:
    """Steps of one optimizer: it clears gradients, prepares them, steps and counts `global_step`."""

    def __init__(self, optimizer: Optimizer, *, session: Session, metrics: MetricBuffer) -> None:
        self.optimizer = optimizer
        self.is_unscaled = False
        """Whether the gradients have been divided by the scaler's factor since the last step."""
        self.shared_scale: SharedScale | None = None
        """Scale shared with other optimizers, if there are some and a scaler."""
        self._view = session.view
        self._scaler = session.precision.scaler
        if self._scaler is not None:
            # First steps may be skipped until the scale fits. Schedulers go on with the count of steps, which torch
            # would take for steps in the wrong order.
            mark_stepped(optimizer)
        self._is_autocasting = session.precision.autocast_dtype is not None
        self._before_zero_grad = session.hooks.list_calls("on_before_zero_grad")
        self._before_step = session.hooks.list_calls("on_before_optimizer_step")
        zero_grad = self._find_zero_grad_override(session.module) or build_zero_grad(optimizer)
        self._zero_grad = session.measure_call("optimizer_zero_grad", zero_grad)
        self._step_unprofiled = build_step(optimizer)
        self._inspect: list[Call] = _build_norm_loggers(session, metrics)
        clip = self._build_clipping(session)
        self._clip: Call | None = None if clip is None else session.measure_call("configure_gradient_clipping", clip)
        self._after_step = _build_weight_check(session)
        is_plain = self._scaler is None and self._clip is None and not self._inspect and self._after_step is None
        self.step: Call = self._step_plainly if is_plain else self._step_prepared
        """Step function for gradients that are the whole window's, averaged over all ranks."""

    @property
    def has_scaler(self) -> bool:
        return self._scaler is not None

    def start_window(self) -> None:
        """Clear the gradients at the start of a window."""
        for hook in self._before_zero_grad:
            hook(self.optimizer)
        self._zero_grad()

    def prepare(self, *, is_clipping: bool = True) -> None:
        """Unscale, inspect and clip the gradients, and call the hooks before the step."""
        self.unscale()
        for inspect in self._inspect:
            inspect()
        if is_clipping and self._clip is not None:
            self._clip()
        for hook in self._before_step:
            hook(self.optimizer)

    def unscale(self) -> None:
        """Divide the gradients by the scaler's factor, once per step."""
        if self._scaler is not None and not self.is_unscaled:
            if self.shared_scale is not None:
                self.shared_scale.before_step(self.optimizer)
            self._scaler.unscale_(self.optimizer)
            self.is_unscaled = True

    def finish(self) -> None:
        """Make the optimizer's own step with prepared gradients; with a scaler only if they are finite."""
        if self._scaler is None:
            self._step_unprofiled()
        else:
            self._scaler.step(self.optimizer)
            self.is_unscaled = False
            if self.shared_scale is None:
                self._scaler.update()
            else:
                self.shared_scale.after_step(self.optimizer)
        self.count_step()

    def count_step(self) -> None:
        """Count a step and check the weights after it, if that was asked for."""
        self._view.global_step += 1
        if self._is_autocasting:
            # Inside a training_step that goes on, autocast would use the weights that it has converted before.
            torch.clear_autocast_cache()
        if self._after_step is not None:
            self._after_step()

    def _step_plainly(self) -> None:
        for hook in self._before_step:
            hook(self.optimizer)
        self._step_unprofiled()
        self._view.global_step += 1

    def _step_prepared(self) -> None:
        if self._scaler is not None and all(p.grad is None for p in list_parameters(self.optimizer)):
            return  # every batch of the window was skipped; a scaler refuses to step without gradients
        self.prepare()
        self.finish()

    def _find_zero_grad_override(self, module: LightningModule) -> Call | None:
        if not is_overridden("optimizer_zero_grad", module, LightningModule):
            return None
        view = self._view
        return lambda: module.optimizer_zero_grad(view.current_epoch, view.num_batches_done, self.optimizer)

    def _build_clipping(self, session: Session) -> Call | None:
        module, plan, strategy = session.module, session.plan.optimization, session.strategy
        limit, algorithm = plan.clip_val, plan.clip_algorithm
        if is_overridden("configure_gradient_clipping", module, LightningModule):
            return lambda: module.configure_gradient_clipping(self.optimizer, limit, algorithm)
        if limit is None:
            return None
        return lambda: strategy.clip_gradients(list_parameters(self.optimizer), limit=limit, algorithm=algorithm)


class SharedScale:
    """Loss scale of several optimizers, which changes only while no gradients wait that were multiplied by it.

    Such gradients would be divided by another factor than they were multiplied by.
    """

    def __init__(self, scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer]) -> None:
        self._scaler = scaler
        self._optimizers = optimizers
        self._marks_after_step: dict[int, Marks] = {id(optimizer): frozenset() for optimizer in optimizers}
        """Marks of each optimizer's gradients after its last step."""
        self._stepped: set[int] = set()
        """Optimizers that have stepped since the last update of the scale."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Update the scale if the optimizer has stepped with it already."""
        if id(optimizer) in self._stepped:  # a scaler takes one step of each
            self.update()

    def after_step(self, optimizer: Optimizer) -> None:
        """Record a step, and update the scale if no gradients of other optimizers wait."""
        self._stepped.add(id(optimizer))
        self._marks_after_step[id(optimizer)] = _collect_marks(optimizer)
        if all(_collect_marks(other) <= self._marks_after_step[id(other)] for other in self._optimizers):
            self.update()

    def update(self) -> None:
        """Update the scale if there were steps; called at the end of each batch at the latest."""
        if self._stepped:
            self._stepped.clear()
            self._scaler.update()


def list_parameters(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    """Return the parameters of all groups of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def build_loss_checks(session: Session) -> tuple[Callable[[Tensor], None], ...]:
    """Return the checks of each loss before its backward pass; they wait for the device, so only on request."""
    if not session.plan.optimization.is_ending_on_nan:
        return ()

    def check(loss: Tensor) -> None:
        if not torch.isfinite(loss).all():
            raise NotFiniteError(f"the loss is {loss.item()} in batch {session.view.num_batches_done} of this epoch")

    return (check,)


def _build_norm_loggers(session: Session, metrics: MetricBuffer) -> list[Call]:
    """Return the function that logs each parameter's gradient norm and the total, for `track_grad_norm`.

    It logs at logging steps.
    """
    order = session.plan.optimization.grad_norm_order
    log_every = session.plan.reporting.log_every_n_steps
    view, strategy = session.view, session.strategy
    if order is None or not log_every:
        return []

    def log_norms() -> None:
        if (view.num_windows + 1) % log_every:
            return
        graded = {name: p.grad.detach() for name, p in session.module.named_parameters() if p.grad is not None}
        if not graded:
            return
        norms = strategy.compute_norms(list(graded.values()), order)
        for name, norm in zip(graded, norms, strict=True):
            metrics.log_step(f"grad_{order}_norm/{name}", norm)
        metrics.log_step(f"grad_{order}_norm_total", torch.linalg.vector_norm(torch.stack(norms), order))

    return [log_norms]


def _build_weight_check(session: Session) -> Call | None:
    if not session.plan.optimization.is_ending_on_nan:
        return None

    def check() -> None:
        for name, parameter in session.module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NotFiniteError(f"the weight {name} is not finite after step {session.view.global_step}")

    return check


def _collect_marks(optimizer: Optimizer) -> Marks:
    """Return marks of the gradients that change when a backward pass writes or replaces a gradient."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    graded = ((id(parameter), parameter.grad) for parameter in parameters)
    return frozenset((key, grad.data_ptr(), read_version(grad)) for key, grad in graded if grad is not None)
