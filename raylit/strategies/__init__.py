"""Strategies: how the ranks of a run share the work on one model.

Runs in the worker. Open `base.py` first, which has the interface; `build_strategy` picks the implementation.
"""

from collections.abc import Callable

from raylit.config import (
    NAMED_STRATEGIES,
    DDPStrategy,
    FSDPStrategy,
    Plan,
    RegisteredStrategy,
    SingleDeviceStrategy,
    SPMDStrategy,
)
from raylit.errors import ConfigError
from raylit.strategies.base import PendingGradients, Strategy, ZeroLoss
from raylit.strategies.ddp import DDP
from raylit.strategies.single import Single

_REGISTERED: dict[str, RegisteredStrategy] = {}


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


def register_strategy(name: str, factory: Callable[[Plan], Strategy]) -> None:
    """Register a strategy: `Trainer(strategy=name)` then uses what `factory(plan)` returns in each worker.

    Workers need no registration: the pickled factory is sent to them with the run. As with raylit's own strategies, it
    has no effect with one worker. Checkpoints are single files. A later registration of the same name replaces it.

    Args:
        name: Any but those of raylit's own strategies.
        factory: Called with the Plan once for each stage; most derive from `raylit.strategies.DDP`.

    Raises:
        ConfigError: `name` is taken.

    Example:
        class MyDDP(raylit.strategies.DDP): ...

        raylit.register_strategy("mine", lambda plan: MyDDP(raylit.DDPStrategy()))
        raylit.Trainer(strategy="mine", num_workers=4)
    """
    if name in NAMED_STRATEGIES:
        raise ConfigError(f"register_strategy({name!r}): the name is raylit's own, choose another one")
    _REGISTERED[name] = RegisteredStrategy(name=name, build=factory)


def registered_strategies() -> dict[str, RegisteredStrategy]:
    """Return the registered strategies by name."""
    return dict(_REGISTERED)


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
