"""Ask torch whether a DataLoader's process has died. Worker.

Written against torch 2.13. Without the private name the answer is no, and the error of the broken connection stays.
"""

from raylit.compat.private_names import import_private
from raylit.errors import RaylitError

_VERSION = "2.13"


def find_loader_death() -> RuntimeError | None:
    """Return torch's error about a DataLoader's process of this process that has died; it says how. None: none has."""
    try:
        raise_deaths = import_private("torch._C", "_error_if_any_worker_fails", written_for=_VERSION)
    except RaylitError:
        return None
    try:
        raise_deaths()
    except RuntimeError as error:
        return error
    return None
