"""How the ranks of a run share the work on one model. Worker."""

from raylit.plan import StrategyName
from raylit.strategies.base import Strategy
from raylit.strategies.ddp import DDPStrategy
from raylit.strategies.single import SingleStrategy


def build_strategy(name: StrategyName) -> Strategy:
    return DDPStrategy() if name == "ddp" else SingleStrategy()


__all__ = ["DDPStrategy", "SingleStrategy", "Strategy", "build_strategy"]
