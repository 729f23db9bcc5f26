"""Look up a private name of another library, with an error that names the versions where it is missing."""

import importlib
from importlib import metadata
from typing import Any

from raylit.errors import RaylitError


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
        f"{_find_version(package)}: install {package}=={written_for}.*, for which this raylit was written, or a newer "
        "raylit"
    )


def _find_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(unknown)"
