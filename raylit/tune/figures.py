"""Matplotlib figures of search results. Driver."""

import io
import os
from collections.abc import Sequence
from typing import Any

from raylit.errors import ConfigError
from raylit.storage import is_url, write_bytes


def create_axes(ax: Any = None, *, is_shown: bool = False) -> tuple[Any, Any]:
    """Return a new figure and its axes, or None and `ax` where the user has given axes.

    A figure needs a display only if it `is_shown`.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        # matplotlib is optional and slow to import.
        from matplotlib.figure import Figure

        if ax is not None:
            return None, ax
        if is_shown:
            import matplotlib.pyplot as plt

            return plt.subplots()
    except ImportError as error:
        raise ConfigError("plot() needs matplotlib: pip install matplotlib, or raylit[plot]") from error
    figure = Figure(figsize=(6.4, 4.8), layout="tight")
    return figure, figure.subplots()


def set_log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with these ticks and no others."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def finish_figure(figure: Any, *, path: str | os.PathLike[str] | None, is_shown: bool) -> Any:
    """Save the figure if there is a `path`, and show it if `is_shown`."""
    if figure is not None and path is not None:
        save_figure(figure, path)
    if is_shown:
        import matplotlib.pyplot as plt

        plt.show()
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Save a figure at a path or URL, whose suffix gives the format."""
    location = os.fspath(path)
    if not is_url(location):
        figure.savefig(location)
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format=location.rpartition(".")[2])
    write_bytes(buffer.getvalue(), location)
