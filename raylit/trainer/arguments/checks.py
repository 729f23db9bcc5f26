"""Checks of single values, which raise ConfigErrors of the same wording for every argument. Driver."""

from typing import Any

from raylit.errors import ConfigError


def check_count(least: int, **named: Any) -> None:
    """Raise ConfigError for the first argument that is not an int of at least `least`."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: must be an int of at least {least}")


def check_switch(**named: Any) -> None:
    """Raise ConfigError for the first argument that is neither True nor False."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}: must be True or False")


def check_share(**named: Any) -> None:
    """Raise ConfigError for the first argument that is neither a fraction (float) nor a count (int) of batches."""
    for name, value in named.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not value >= 0 or (isinstance(value, float) and value > 1):
            raise ConfigError(
                f"{name}={value!r}: must be a float in [0, 1] (a fraction: 1.0 is all) or an int (a count of batches: "
                "1 is one)"
            )
