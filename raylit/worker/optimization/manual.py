"""Manual optimization: the module's own backward passes and steps. Worker."""

from collections.abc import Callable
from typing import Any

from raylit.worker.loops.step_outputs import record_metrics
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.gradient_sync import copy_gradients, set_gradients
from raylit.worker.optimization.handles import OptimizerHandles
from raylit.worker.session import Session


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
        with self._precision.around_step():
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
