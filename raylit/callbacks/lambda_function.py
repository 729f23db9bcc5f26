"""LambdaCallback: a callback made of single functions. Runs on every worker."""

import difflib
from collections.abc import Callable
from typing import Any

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError

_STATE = frozenset({"state_key", "state_dict", "load_state_dict"})
_HOOKS = tuple(name for name in vars(Callback) if not name.startswith("_") and name not in _STATE)


class LambdaCallback(Callback):
    """`LambdaCallback(on_train_epoch_end=lambda trainer, pl_module: ...)`: each hook by its name, with its arguments.

    With Ray workers the functions are copies, and so is what they close over.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, hook in hooks.items():
            if name not in _HOOKS:
                near = difflib.get_close_matches(name, _HOOKS, n=1)
                hint = f"; did you mean {near[0]}?" if near else f": allowed are {', '.join(_HOOKS)}"
                raise ConfigError(f"LambdaCallback({name}=...): no such hook{hint}")
            if hook is not None and not callable(hook):
                raise ConfigError(f"LambdaCallback({name}={hook!r}): must be a function with the hook's arguments")
            if hook is not None:
                setattr(self, name, hook)
