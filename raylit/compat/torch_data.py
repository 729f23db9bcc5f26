"""Private names of torch's DataLoader, and the wording of its errors when a process dies."""

from typing import Any

from torch.utils.data import DataLoader

from raylit.compat.private_names import import_private
from raylit.errors import RaylitError

_VERSION = "2.13"


def drop_iterator(loader: "DataLoader[Any]") -> None:
    """Make a copied loader with persistent processes start its own processes for the next iteration."""
    vars(loader)["_iterator"] = None


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
