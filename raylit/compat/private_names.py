"""Lookup of private names of other libraries, with an error that names the version if one is missing. Any process."""

import importlib
import importlib.metadata
from typing import Any

from raylit.errors import RaylitError


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


def describe_missing(owner: object, name: str, *, feature: str, library: str = "torch") -> RaylitError:
    """Build the error for a private name that this version of the library does not have."""
    kind = owner if isinstance(owner, type) else type(owner)
    where = getattr(owner, "__name__", kind.__name__)
    return RaylitError(
        f"{feature} needs {where}.{name}, a private name that {library} {_read_version(library)} does not have. "
        f"Install a version of {library} that raylit is tested with (see its README), or do without {feature}"
    )


def import_private(module: str, name: str, *, written_for: str) -> Any:
    """Import `name`, which may have dots in it, from `module`.

    Args:
        module: The full name of the module.
        name: The private name in it.
        written_for: The version that is known to have it.

    Raises:
        RaylitError: The installed version of the library does not have it.
    """
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise RaylitError(explain_missing(f"{module}.{name}", written_for=written_for)) from error
    return value


def explain_missing(name: str, *, written_for: str) -> str:
    """Explain what to install if a private name (given in full) is missing or has another meaning."""
    package = name.partition(".")[0]
    return (
        f"raylit uses {name}, which is private to {package} and missing in the installed version "
        f"{_read_version(package)}: install {package}=={written_for}.*, for which this raylit was written, or a newer "
        "raylit"
    )


def _read_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
