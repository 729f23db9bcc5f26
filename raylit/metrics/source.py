"""Where the metrics come from: torchmetrics, an optional package. Both sides."""

import importlib
from typing import Any


def attribute_of(module_name: str, name: str) -> Any:
    """`name` of a module of torchmetrics. ModuleNotFoundError says what to install."""
    if name.startswith("__"):  # what the import system asks every module for
        raise AttributeError(name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"raylit.metrics has {name} from torchmetrics, which is not installed: pip install 'raylit[metrics]'"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"raylit.metrics is {module_name}, which has no {name!r}") from None
