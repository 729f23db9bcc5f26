"""An epoch of forward passes, for what modules keep of their inputs. Worker."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raylit.strategies.batch_norm import SyncedBatchNorms
from raylit.worker.feed import TrainSource
from raylit.worker.metrics import MetricBuffer
from raylit.worker.session import Session
from raylit.worker.transfer import MovedFeed


def run_forward(session: Session, data: TrainSource, *, metrics: MetricBuffer, epoch: int) -> None:
    """The training step over the batches of an epoch, in train mode; its losses and metrics count for nothing.

    Batch norms take their statistics over all ranks, as one process would over their batches together. Collective.
    """
    feed: Any = data.epoch(epoch)
    if session.mover is not None:
        feed = MovedFeed(feed, session.mover)
    step, peers = session.module.training_step, session.peers
    with _unlogged(session, metrics), _synced(session) as norms:
        for batch_idx, batch in enumerate(feed):
            is_silent = False
            if feed.weight != 1.0:
                # A rank without a share runs another's: the statistics of all wait for it.
                offers = peers.gather_objects(batch)
                is_silent = batch is None
                batch = next(offer for offer in offers if offer is not None) if is_silent else batch
            if norms is not None:
                norms.silence(is_silent=is_silent)
            session.strategy.silence(is_silent=is_silent)
            with session.around_step():
                step(batch, batch_idx)
        session.strategy.silence(is_silent=False)


@contextmanager
def _unlogged(session: Session, metrics: MetricBuffer) -> Iterator[None]:
    module = session.module
    before = module.redirect_log(metrics)
    metrics.is_muted = metrics.is_training_batch = True
    try:
        yield
    finally:
        module.redirect_log(before)
        metrics.is_muted = metrics.is_training_batch = False


@contextmanager
def _synced(session: Session) -> Iterator[SyncedBatchNorms | None]:
    if session.peers.world_size == 1:
        yield None
        return
    norms = SyncedBatchNorms(session.module, device=session.device)
    try:
        yield norms
    finally:
        norms.restore()
