"""Optimization: from a batch to gradients and new weights.

Runs in the worker. `build_optimization` picks one kind before the loop runs. Open `base.py` first, which has the
interface, then `automatic.py`.
"""

from raylit.core.module import LightningModule
from raylit.errors import ModuleError
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.automatic import AutomaticOptimization, SeveralOptimizers
from raylit.worker.optimization.base import Optimization, TruncatedOptimization, UnevenOptimization, adapt_training_step
from raylit.worker.optimization.closure import ClosureOptimization, needs_closure
from raylit.worker.optimization.configured import ConfiguredOptimizers, read_configured_optimizers
from raylit.worker.optimization.handles import ManualOptimization, OptimizerHandles
from raylit.worker.optimization.stepper import SharedScale, Stepper
from raylit.worker.session import Session

__all__ = ["ConfiguredOptimizers", "Optimization", "build_optimization", "read_configured_optimizers"]


def build_optimization(session: Session, optimizers: ConfiguredOptimizers, *, metrics: MetricBuffer) -> Optimization:
    """Build the kind of optimization that the module and the plan ask for. Collective."""
    module, plan = session.module, session.plan.optimization
    is_manual = not module.automatic_optimization
    for optimizer in optimizers.optimizers:
        session.watch_optimizer(optimizer)
    steppers = [Stepper(optimizer, session=session, metrics=metrics) for optimizer in optimizers.optimizers]
    if session.precision.scaler is not None and len(steppers) > 1:
        shared_scale = SharedScale(session.precision.scaler, optimizers.optimizers)
        for stepper in steppers:
            stepper.shared_scale = shared_scale
    handles = session.view.handles = OptimizerHandles(session, steppers, is_manual=is_manual)
    length = plan.truncated_steps or module.truncated_bptt_steps
    if is_manual:
        if length:
            raise ModuleError(
                "truncated back-propagation is automatic: with automatic_optimization = False split by hand"
            )
        step = session.measure_call(
            "training_step", adapt_training_step(module, optimizer_idx=None, is_truncated=False)
        )
        manual = ManualOptimization(session, handles=handles, training_step=step, metrics=metrics)
        return UnevenOptimization(manual, session=session, metrics=metrics)
    turns: list[Optimization] = []
    for index, stepper in enumerate(steppers):
        step = adapt_training_step(
            module, optimizer_idx=index if len(steppers) > 1 else None, is_truncated=bool(length)
        )
        step = session.measure_call("training_step", step)
        if needs_closure(stepper.optimizer) or is_overridden("optimizer_step", module, LightningModule):
            handle = handles.optimizers[index]
            turns.append(ClosureOptimization(session, stepper, handle=handle, training_step=step, metrics=metrics))
        else:
            turns.append(AutomaticOptimization(session, stepper, training_step=step, metrics=metrics))
    kind = turns[0]
    if len(turns) > 1:
        kind = SeveralOptimizers(turns, handles=handles, frequencies=optimizers.frequencies, view=session.view)
    if session.strategy.is_forward_collective:
        kind = UnevenOptimization(kind, session=session, metrics=metrics)
    if length:
        return TruncatedOptimization(
            kind, module=module, length=length, collectives=session.collectives, metrics=metrics
        )
    return kind
