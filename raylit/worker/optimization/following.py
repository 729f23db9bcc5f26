"""FollowingOptimization: a rank without a batch of its own runs the step too, as others wait for it. Worker."""

from typing import Any

from raylit.worker import metric_objects
from raylit.worker.metrics import MetricBuffer
from raylit.worker.optimization.base import Optimization
from raylit.worker.session import Session


class FollowingOptimization:
    """For steps in which ranks wait for each other: a rank that has no part of a global batch follows with a batch of
    theirs, which counts for nothing."""

    def __init__(self, inner: Optimization, *, session: Session, metrics: MetricBuffer) -> None:
        self._inner = inner
        self._module = session.module
        self._peers = session.peers
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
        offers = self._peers.gather_objects(None if batch is None else (batch, extra))
        if batch is not None:
            return self._inner.run_share(batch, batch_idx, is_window_end, weight, *extra)
        others, extra = next(offer for offer in offers if offer is not None)
        self._metrics.is_muted = True
        self._strategy.silence(is_silent=True)
        try:
            with metric_objects.preserved(self._module):
                self._inner.run_share(others, batch_idx, is_window_end, 0.0, *extra)
        finally:
            self._metrics.is_muted = False
            self._strategy.silence(is_silent=False)
        return None
