"""Lookup of private names of other libraries, with an error that names the version if one is missing. Any process."""

import importlib
import importlib.metadata
from typing import Any

from raylit.errors import RaylitError

_TESTED_VERSIONS = {"ray": "2.60", "torch": "2.13", "torchmetrics": "1.9"}


def read_private(owner: object, name: str, *, feature: str, library: str = "torch") -> Any:
    """Read the attribute `name` of an object that belongs to `library`.

    Args:
        owner: The object, class or module.
        name: The private name.
        feature: What needs the name; the error says so.
        library: The package that owns the object.

    Raises:
        RaylitError: This version of the library has no such name.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise describe_missing(owner, name, feature=feature, library=library) from error


def import_private(module: str, name: str, *, feature: str) -> Any:
    """Import `name`, which may have dots in it, from the module of this full name.

    Raises:
        RaylitError: The installed version of the library does not have it.
    """
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise describe_missing(module, name, feature=feature, library=module.partition(".")[0]) from error
    return value


def describe_missing(owner: object, name: str, *, feature: str, library: str = "torch") -> RaylitError:
    """Build the error for a private name that this version of the library does not have.

    `owner` is the object, class or module, or its name.
    """
    kind = owner if isinstance(owner, type) else type(owner)
    where = owner if isinstance(owner, str) else getattr(owner, "__name__", kind.__name__)
    tested = _TESTED_VERSIONS.get(library)
    command = "" if tested is None else f" (pip install '{library}=={tested}.*')"
    return RaylitError(
        f"{feature} needs {where}.{name}, a private name that {library} {_read_version(library)} does not have. "
        f"Install a version of {library} that raylit is tested with{command}, or do without {feature}"
    )


def _read_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
