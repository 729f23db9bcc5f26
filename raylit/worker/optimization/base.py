"""Interface of optimizations, the arguments of training_step, and steps of ranks without a batch. Worker."""

from collections.abc import Callable
from typing import Any, Protocol

from raylit.core.module import LightningModule
from raylit.errors import ModuleError
from raylit.worker.loops.hooks import adapt_to_batch_index, num_positional
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.session import Session


class Optimization(Protocol):
    """Way from a batch to gradients and, at the end of a window of batches, to new weights."""

    num_outputs: int
    """Number of outputs of `training_step` for one batch: 1, or a list of that many with several optimizers."""

    def start_epoch(self, *, window: int) -> None:
        """Prepare for an epoch; `window` is the number of batches whose gradients are added up before a step."""
        ...

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        """Run a batch that counts as much as those of the other ranks.

        `extra` are the last arguments of `training_step`. Returns its output; with several optimizers a list of
        outputs.
        """
        ...

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        """Run a batch of an uneven split, whose loss counts by `weight`; None: this rank has no part of it."""
        ...

    def finish_window(self) -> bool:
        """Step with the accumulated gradients, for a loader whose end was not known. Returns whether there were any."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients of an unfinished window, by the names of their parameters; empty between two windows."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the gradients of an unfinished window."""
        ...

    def is_active(self, optimizer_idx: int | None) -> bool:
        """Return whether an optimizer was active in the batch just run."""
        ...

    def read_hiddens(self, outputs: Any) -> Any:
        """Return the detached hiddens that `outputs` of `run_batch` pass on to the next piece of a sequence."""
        ...


def adapt_training_step(
    module: LightningModule, *, optimizer_idx: int | None, is_truncated: bool
) -> Callable[..., Any]:
    """Return a function of (batch, batch_idx[, hiddens]) that calls `training_step` for one optimizer.

    Raises:
        ModuleError: the step lacks an argument that it needs.
    """
    step = module.training_step
    names = ["batch", "batch_idx"]
    if optimizer_idx is not None:
        names.append("optimizer_idx")
    if is_truncated:
        names.append("hiddens")
    if len(names) == 2:
        return adapt_to_batch_index(step)
    if num_positional(step) < len(names):
        reason = "configure_optimizers returns several optimizers" if optimizer_idx is not None else ""
        more = "truncated back-propagation is on" if is_truncated else ""
        raise ModuleError(
            f"{type(module).__name__}.training_step must take ({', '.join(names)}), as "
            f"{' and '.join(filter(None, [reason, more]))}; or set automatic_optimization = False"
        )
    if optimizer_idx is None:
        return step

    def step_of_optimizer(batch: Any, batch_idx: int, *hiddens: Any) -> Any:
        return step(batch, batch_idx, optimizer_idx, *hiddens)

    return step_of_optimizer


class UnevenOptimization:
    """Wrapper of an optimization whose steps are collective, for uneven splits.

    A rank that has no part of a global batch runs another rank's batch, which is left out of gradients and metrics.
    """

    def __init__(self, inner: Optimization, *, session: Session, metrics: MetricBuffer) -> None:
        self._inner = inner
        self._module = session.module
        self._collectives = session.collectives
        self._strategy = session.strategy
        self._metrics = metrics
        self.num_outputs = inner.num_outputs
        self.start_epoch = inner.start_epoch
        self.run_batch = inner.run_batch
        self.finish_window = inner.finish_window
        self.state_dict = inner.state_dict
        self.load_state_dict = inner.load_state_dict
        self.is_active = inner.is_active
        self.read_hiddens = inner.read_hiddens

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        all_batches = self._collectives.gather_objects(None if batch is None else (batch, extra))
        if batch is not None:
            return self._inner.run_share(batch, batch_idx, is_window_end, weight, *extra)
        other_batch, extra = next(one for one in all_batches if one is not None)
        self._metrics.is_suspended = True
        self._strategy.exclude_rank(is_excluded=True)
        try:
            with torchmetrics_adapter.preserve_state(self._module):
                self._inner.run_share(other_batch, batch_idx, is_window_end, 0.0, *extra)
        finally:
            self._metrics.is_suspended = False
            self._strategy.exclude_rank(is_excluded=False)
        return None
