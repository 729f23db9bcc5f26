"""Strategies: how the ranks of a run share the work on one model.

Runs in the worker. Open `base.py` first, which has the interface; `build_strategy` picks the implementation.
"""

from raylit.config import DDPStrategy, FSDPStrategy, Plan, RegisteredStrategy, SingleDeviceStrategy, SPMDStrategy
from raylit.strategies.base import PendingGradients, Strategy, ZeroLoss
from raylit.strategies.ddp.strategy import DDP
from raylit.strategies.registry import register_strategy, registered_strategies
from raylit.strategies.single import Single


def build_strategy(plan: Plan) -> Strategy:
    """Build the strategy that the plan's options name."""
    options = plan.strategy
    if isinstance(options, DDPStrategy):
        return DDP(options, is_syncing_batch_norm=plan.is_syncing_batchnorm)
    if isinstance(options, FSDPStrategy):
        # The import of FSDP takes a second, which only its users pay.
        from raylit.strategies.fsdp.strategy import FSDP

        return FSDP(options, precision=plan.optimization.precision, is_syncing_batch_norm=plan.is_syncing_batchnorm)
    if isinstance(options, SPMDStrategy):
        # It imports torch_xla, which only its users have.
        from raylit.strategies.xla import SPMD

        return SPMD(options, world_size=plan.workers.world_size)
    if isinstance(options, RegisteredStrategy):
        strategy: Strategy = options.build(plan)
        return strategy
    return Single()


__all__ = [
    "DDP",
    "DDPStrategy",
    "FSDPStrategy",
    "PendingGradients",
    "Single",
    "SingleDeviceStrategy",
    "Strategy",
    "ZeroLoss",
    "build_strategy",
    "register_strategy",
    "registered_strategies",
]
