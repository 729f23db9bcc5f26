"""Pictures of what searches have found, with matplotlib. Driver."""

import io
import os
from collections.abc import Sequence
from typing import Any

from raylit.errors import ConfigError
from raylit.storage import is_url, write_bytes


def axes(ax: Any = None, *, is_shown: bool = False) -> tuple[Any, Any]:
    """A figure and its axes; the figure is None where the user has given the axes. Needs no display unless the picture
    `is_shown`. ConfigError: matplotlib is missing."""
    try:
        # Optional, and slow to import.
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


def mark(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with these ticks and no others."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def finish(figure: Any, *, path: str | os.PathLike[str] | None, is_shown: bool) -> Any:
    """Save a figure and show it, where that is asked for."""
    if figure is not None and path is not None:
        save(figure, path)
    if is_shown:
        import matplotlib.pyplot as plt

        plt.show()
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Under a path or URL, whose ending says the format."""
    place = os.fspath(path)
    if not is_url(place):
        figure.savefig(place)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format=place.rpartition(".")[2])
    write_bytes(picture.getvalue(), place)
