"""How the ranks of a run share the work on one model. Worker."""

from raylit.plan import Plan
from raylit.strategies.base import PendingGradients, Skipped, Strategy
from raylit.strategies.ddp import DDP
from raylit.strategies.single import Single
from raylit.strategy_options import DDPStrategy, FSDPStrategy, SingleDeviceStrategy


def build_strategy(plan: Plan) -> Strategy:
    options = plan.strategy
    if isinstance(options, DDPStrategy):
        return DDP(options, is_syncing_batch_norm=plan.is_syncing_batchnorm)
    if isinstance(options, FSDPStrategy):
        # A second of imports that only its users pay.
        from raylit.strategies.fsdp import FSDP

        return FSDP(options, precision=plan.optimization.precision, is_syncing_batch_norm=plan.is_syncing_batchnorm)
    return Single()


__all__ = [
    "DDP",
    "DDPStrategy",
    "FSDPStrategy",
    "PendingGradients",
    "Single",
    "SingleDeviceStrategy",
    "Skipped",
    "Strategy",
    "build_strategy",
]
