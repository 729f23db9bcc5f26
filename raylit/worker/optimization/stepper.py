"""The optimizer step: unscaling, clipping, the step itself, and the loss scale that ranks share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from raylit.compat.torch_optim import build_step, build_zero_grad, mark_stepped
from raylit.compat.torch_tensor import read_version
from raylit.core.module import LightningModule
from raylit.errors import NotFiniteError
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.session import Session

Marks = frozenset[tuple[int, int, int]]


class SharedScale:
    """Changes the factor when no gradients wait that were multiplied by it: they would be divided by another one."""

    def __init__(self, scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer]) -> None:
        self._scaler = scaler
        self._optimizers = optimizers
        self._known: dict[int, Marks] = {id(optimizer): frozenset() for optimizer in optimizers}
        """Each optimizer's gradients as they were after its last step."""
        self._stepped: set[int] = set()
        """Since the factor was last seen to."""

    def before_step(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._stepped:  # a scaler takes one step of each
            self.update()

    def after_step(self, optimizer: Optimizer) -> None:
        self._stepped.add(id(optimizer))
        self._known[id(optimizer)] = _marks(optimizer)
        if all(_marks(other) <= self._known[id(other)] for other in self._optimizers):
            self.update()

    def update(self) -> None:
        """At the latest at a batch's end."""
        if self._stepped:
            self._stepped.clear()
            self._scaler.update()


def _marks(optimizer: Optimizer) -> Marks:
    """A backward pass changes a gradient's version, or makes a new one."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    graded = ((id(parameter), parameter.grad) for parameter in parameters)
    return frozenset((key, grad.data_ptr(), read_version(grad)) for key, grad in graded if grad is not None)


Call = Callable[[], object]


class Stepper:
    """Zeroes gradients, prepares them for the step, steps. Counts `global_step`."""

    def __init__(self, optimizer: Optimizer, *, session: Session, metrics: MetricBuffer) -> None:
        self.optimizer = optimizer
        self.is_unscaled = False
        """The gradients have been divided by the scaler's factor since the last step."""
        self.shared_scale: SharedScale | None = None
        """With a scaler, where there are other optimizers."""
        self._view = session.view
        self._scaler = session.precision.scaler
        if self._scaler is not None:
            # The first steps may be skipped, until the scale fits. torch would take the schedulers', which go on as the
            # count of steps does, for steps in the wrong order.
            mark_stepped(optimizer)
        self._is_autocasting = session.precision.autocast_dtype is not None
        self._before_zero_grad = session.hooks.of("on_before_zero_grad")
        self._before_step = session.hooks.of("on_before_optimizer_step")
        zero_grad = self._overridden_zero_grad(session.module) or build_zero_grad(optimizer)
        self._zero_grad = session.timed("optimizer_zero_grad", zero_grad)
        self._step_of_torch = build_step(optimizer)
        self._inspect: list[Call] = _inspections(session, metrics)
        clip = self._clipping(session)
        self._clip: Call | None = None if clip is None else session.timed("configure_gradient_clipping", clip)
        self._after_step = _weight_check(session)
        is_plain = self._scaler is None and self._clip is None and not self._inspect and self._after_step is None
        self.step: Call = self._step_plainly if is_plain else self._step_prepared
        """With gradients that are the whole window's, of all ranks."""

    @property
    def has_scaler(self) -> bool:
        return self._scaler is not None

    def start_window(self) -> None:
        for hook in self._before_zero_grad:
            hook(self.optimizer)
        self._zero_grad()

    def prepare(self, *, is_clipping: bool = True) -> None:
        """The gradients as the optimizer is to see them."""
        self.unscale()
        for inspect in self._inspect:
            inspect()
        if is_clipping and self._clip is not None:
            self._clip()
        for hook in self._before_step:
            hook(self.optimizer)

    def unscale(self) -> None:
        if self._scaler is not None and not self.is_unscaled:
            if self.shared_scale is not None:
                self.shared_scale.before_step(self.optimizer)
            self._scaler.unscale_(self.optimizer)
            self.is_unscaled = True

    def finish(self) -> None:
        """The optimizer's own step with prepared gradients; with a scaler only where they are finite."""
        if self._scaler is None:
            self._step_of_torch()
        else:
            self._scaler.step(self.optimizer)
            self.is_unscaled = False
            if self.shared_scale is None:
                self._scaler.update()
            else:
                self.shared_scale.after_step(self.optimizer)
        self.count_step()

    def count_step(self) -> None:
        self._view.global_step += 1
        if self._is_autocasting:
            # Inside a training_step that goes on, autocast would take the weights that it has converted before.
            torch.clear_autocast_cache()
        if self._after_step is not None:
            self._after_step()

    def _step_plainly(self) -> None:
        for hook in self._before_step:
            hook(self.optimizer)
        self._step_of_torch()
        self._view.global_step += 1

    def _step_prepared(self) -> None:
        if self._scaler is not None and all(p.grad is None for p in parameters_of(self.optimizer)):
            return  # every batch of the window was skipped; a scaler refuses to step with nothing
        self.prepare()
        self.finish()

    def _overridden_zero_grad(self, module: LightningModule) -> Call | None:
        if not is_overridden("optimizer_zero_grad", module, LightningModule):
            return None
        view = self._view
        return lambda: module.optimizer_zero_grad(view.current_epoch, view.num_batches_done, self.optimizer)

    def _clipping(self, session: Session) -> Call | None:
        module, plan, strategy = session.module, session.plan.optimization, session.strategy
        limit, algorithm = plan.clip_val, plan.clip_algorithm
        if is_overridden("configure_gradient_clipping", module, LightningModule):
            return lambda: module.configure_gradient_clipping(self.optimizer, limit, algorithm)
        if limit is None:
            return None
        return lambda: strategy.clip_gradients(parameters_of(self.optimizer), limit=limit, algorithm=algorithm)


def parameters_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def loss_check(session: Session) -> tuple[Callable[[Tensor], None], ...]:
    """What looks at each loss before its backward pass. Waits for the device: only where it was asked for."""
    if not session.plan.optimization.is_ending_on_nan:
        return ()

    def check(loss: Tensor) -> None:
        if not torch.isfinite(loss).all():
            raise NotFiniteError(f"the loss is {loss.item()} in batch {session.view.num_batches_done} of this epoch")

    return (check,)


def _weight_check(session: Session) -> Call | None:
    if not session.plan.optimization.is_ending_on_nan:
        return None

    def check() -> None:
        for name, parameter in session.module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NotFiniteError(f"the weight {name} is not finite after step {session.view.global_step}")

    return check


def _inspections(session: Session, metrics: MetricBuffer) -> list[Call]:
    """`track_grad_norm`: each parameter's and the total norm of the gradients, at logging steps."""
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
