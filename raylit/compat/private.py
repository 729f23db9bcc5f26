"""Read private names of other libraries, with an error that names the installed version where one is missing."""

import importlib.metadata
from typing import Any

from raylit.errors import RaylitError


def read_private(owner: object, name: str, *, feature: str, library: str = "torch") -> Any:
    """Read the attribute `name` of an object that belongs to `library`.

    Raises: RaylitError if this version of the library has no such name; `feature` says what needs it.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise describe_missing(owner, name, feature=feature, library=library) from error


def describe_missing(owner: object, name: str, *, feature: str, library: str = "torch") -> RaylitError:
    """Build the error for a private name that this version of the library does not have."""
    kind = owner if isinstance(owner, type) else type(owner)
    where = getattr(owner, "__name__", kind.__name__)
    return RaylitError(
        f"{feature} needs {where}.{name}, a private name that {library} {_read_version(library)} does not have. "
        f"Install a version of {library} that raylit is tested with (see its README), or do without {feature}"
    )


def _read_version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
