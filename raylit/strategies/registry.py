"""Registry of third-party strategies for `Trainer(strategy=...)`. Driver."""

from collections.abc import Callable

from raylit.config import NAMED_STRATEGIES, Plan, RegisteredStrategy
from raylit.errors import ConfigError
from raylit.strategies.base import Strategy

_REGISTERED: dict[str, RegisteredStrategy] = {}


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
