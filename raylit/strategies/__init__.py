"""How the ranks of a run share the work on one model. Worker."""

from raylit.plan import Workers
from raylit.strategies.base import PendingGradients, Skipped, Strategy
from raylit.strategies.ddp import DDPStrategy
from raylit.strategies.single import SingleStrategy


def build_strategy(workers: Workers) -> Strategy:
    if workers.strategy == "ddp":
        return DDPStrategy(
            is_finding_unused=workers.is_finding_unused, is_syncing_batch_norm=workers.is_syncing_batchnorm
        )
    return SingleStrategy()


__all__ = ["DDPStrategy", "PendingGradients", "SingleStrategy", "Skipped", "Strategy", "build_strategy"]
