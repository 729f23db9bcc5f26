"""Private names of torch's DataLoader, and the wording of its errors when a process dies."""

from typing import Any

from torch.utils.data import DataLoader

from raylit.compat.private_names import import_private
from raylit.errors import RaylitError


def drop_iterator(loader: "DataLoader[Any]") -> None:
    """Have a loader with persistent processes start its own for the next iteration, not use those of a copy."""
    vars(loader)["_iterator"] = None


_VERSION = "2.13"


def find_loader_death() -> RuntimeError | None:
    """Return torch's error about a DataLoader process of this process that has died; None if none has."""
    try:
        raise_deaths = import_private("torch._C", "_error_if_any_worker_fails", written_for=_VERSION)
    except RaylitError:
        return None
    try:
        raise_deaths()
    except RuntimeError as error:
        return error
    return None
