"""What every way of optimizing has: the call of training_step, and steps whose batch a rank lacks."""

from collections.abc import Callable
from typing import Any, Protocol

from raylit.core.module import LightningModule
from raylit.errors import ModuleError
from raylit.worker.loops.hooks import adapt_to_batch_index, num_positional
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.session import Session


class Optimization(Protocol):
    """From a batch to gradients and, at the end of a window of batches, to new weights."""

    num_outputs: int
    """What `training_step` returns for one batch: 1, or with several optimizers a list of so many."""

    def start_epoch(self, *, window: int) -> None:
        """`window`: batches whose gradients are added up before a step."""
        ...

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        """A batch that counts as much as those of the other ranks. Returns what `training_step` did; with several
        optimizers a list of that. `extra`: its last arguments."""
        ...

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        """A batch of an uneven split, whose loss counts by `weight`, or None: this rank has no part of it."""
        ...

    def finish_window(self) -> bool:
        """Step with what has been added up; for a loader whose end came unforeseen. True: there was something."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The gradients of a window that has begun, by the names of their parameters; empty between two windows."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def is_active(self, optimizer_idx: int | None) -> bool:
        """Whether that optimizer has its turn in the batch just run."""
        ...

    def hiddens_of(self, outputs: Any) -> Any:
        """What `outputs` of `run_batch` carry to the next piece of a sequence, detached."""
        ...


def step_of(module: LightningModule, *, optimizer_idx: int | None, is_truncated: bool) -> Callable[..., Any]:
    """(batch, batch_idx[, hiddens]) to what `training_step` returns, for one of several optimizers or the only one.

    ModuleError: the step lacks an argument that it needs.
    """
    step = module.training_step
    wanted = ["batch", "batch_idx"]
    if optimizer_idx is not None:
        wanted.append("optimizer_idx")
    if is_truncated:
        wanted.append("hiddens")
    if len(wanted) == 2:
        return adapt_to_batch_index(step)
    if num_positional(step) < len(wanted):
        reason = "configure_optimizers returns several optimizers" if optimizer_idx is not None else ""
        more = "truncated back-propagation is on" if is_truncated else ""
        raise ModuleError(
            f"{type(module).__name__}.training_step must take ({', '.join(wanted)}), as "
            f"{' and '.join(filter(None, [reason, more]))}; or set automatic_optimization = False"
        )
    if optimizer_idx is None:
        return step

    def step_of_optimizer(batch: Any, batch_idx: int, *hiddens: Any) -> Any:
        return step(batch, batch_idx, optimizer_idx, *hiddens)

    return step_of_optimizer


class FollowingOptimization:
    """For steps in which ranks wait for each other: a rank that has no part of a global batch follows with a batch of
    theirs, which counts for nothing."""

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
        self.hiddens_of = inner.hiddens_of

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        offers = self._collectives.gather_objects(None if batch is None else (batch, extra))
        if batch is not None:
            return self._inner.run_share(batch, batch_idx, is_window_end, weight, *extra)
        others, extra = next(offer for offer in offers if offer is not None)
        self._metrics.is_suspended = True
        self._strategy.exclude_rank(is_excluded=True)
        try:
            with torchmetrics_adapter.preserve_state(self._module):
                self._inner.run_share(others, batch_idx, is_window_end, 0.0, *extra)
        finally:
            self._metrics.is_suspended = False
            self._strategy.exclude_rank(is_excluded=False)
        return None
