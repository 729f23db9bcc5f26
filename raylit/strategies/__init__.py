"""How the ranks of a run share the work on one model. Worker."""

from raylit.strategies.base import PendingGradients, Skipped, Strategy
from raylit.strategies.ddp import DDP
from raylit.strategies.single import Single
from raylit.strategy_options import DDPStrategy, SingleDeviceStrategy, StrategyOptions


def build_strategy(options: StrategyOptions, *, is_syncing_batch_norm: bool) -> Strategy:
    if isinstance(options, DDPStrategy):
        return DDP(options, is_syncing_batch_norm=is_syncing_batch_norm)
    return Single()


__all__ = [
    "DDP",
    "DDPStrategy",
    "PendingGradients",
    "Single",
    "SingleDeviceStrategy",
    "Skipped",
    "Strategy",
    "build_strategy",
]
