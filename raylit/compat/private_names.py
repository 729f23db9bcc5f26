"""Look up a private name of another library, with an error that names the versions where it is missing."""

import importlib
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


def import_private(module: str, name: str, *, written_for: str) -> Any:
    """Import `name`, which may have dots in it, from `module`. `written_for`: the version that is known to have it.

    Raises: RaylitError if the installed version of the library does not have it.
    """
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RaylitError(explain_missing(f"{module}.{name}", written_for=written_for)) from error
    return found


def explain_missing(name: str, *, written_for: str) -> str:
    """Say what to install where the full name of something private is missing, or is something else."""
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
