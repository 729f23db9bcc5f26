"""The strategies that third parties have registered for `Trainer(strategy=...)`. Driver."""

from collections.abc import Callable

from raylit.config.plan import Plan
from raylit.config.strategy import NAMED_STRATEGIES, RegisteredStrategy
from raylit.errors import ConfigError
from raylit.strategies.base import Strategy

_REGISTERED: dict[str, RegisteredStrategy] = {}


def register_strategy(name: str, factory: Callable[[Plan], Strategy]) -> None:
    """Have `Trainer(strategy=name)` share the work by the Strategy that `factory(plan)` returns in each worker.

    Workers need no registration: the factory travels to them with the run. As with raylit's own strategies, one worker
    has nothing to share and none of it matters. Checkpoints are whole files. A later registration of the same name
    takes its place.

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
    """What has been registered, by name."""
    return dict(_REGISTERED)
