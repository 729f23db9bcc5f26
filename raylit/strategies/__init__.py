"""How the ranks of a run share the work on one model. Worker."""

from raylit.config.plan import Plan
from raylit.config.strategy import DDPStrategy, FSDPStrategy, RegisteredStrategy, SingleDeviceStrategy
from raylit.strategies.base import PendingGradients, Strategy, ZeroLoss
from raylit.strategies.ddp.strategy import DDP
from raylit.strategies.registry import register_strategy, registered_strategies
from raylit.strategies.single import Single


def build_strategy(plan: Plan) -> Strategy:
    options = plan.strategy
    if isinstance(options, DDPStrategy):
        return DDP(options, is_syncing_batch_norm=plan.is_syncing_batchnorm)
    if isinstance(options, FSDPStrategy):
        # A second of imports that only its users pay.
        from raylit.strategies.fsdp.strategy import FSDP

        return FSDP(options, precision=plan.optimization.precision, is_syncing_batch_norm=plan.is_syncing_batchnorm)
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
