"""Matplotlib figures of searches and sweeps: loss curves, the metric by trial, parallel coordinates. Driver."""

import contextlib
import importlib.util
import io
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any

from raylit.errors import ConfigError
from raylit.storage import is_url, write_bytes
from raylit.tune.records import Mode, TrialRecord, find_best_trial, is_better, is_number
from raylit.tune.sweep.parameters import Parameter, Quality, format_value, list_varying_parameters

_INK = "#30343f"
_FAINT = "#c9ccd3"
_BEST = "#d1495b"


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


def finish_figure(figure: Any, *, path: str | os.PathLike[str] | None, is_shown: bool = False) -> Any:
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


def can_draw_figures() -> bool:
    """Return whether matplotlib is installed, so that a sweep's figures are saved at its end."""
    return importlib.util.find_spec("matplotlib") is not None


def begin_import() -> None:
    """Import matplotlib in a thread while the sweep waits for Ray: the import takes half a second."""
    threading.Thread(target=_import, name="raylit-matplotlib").start()


def objective_figure(
    trials: Sequence[TrialRecord], *, metric: str, mode: Mode, path: str | os.PathLike[str] | None = None
) -> Any:
    """Draw the metric along each training and, next to it, the trials in order with the best so far."""
    figure = _figure(width=11.0, height=4.6)
    curves, points = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    quality = Quality(trials, metric=metric, mode=mode)
    best = find_best_trial(trials, metric, mode)
    for trial in quality.sort_worst_first(trials):
        x, y = _curve(trial, metric)
        marker = "o" if len(x) < 12 else ""
        if trial is best:
            curves.plot(x, y, marker=marker, ms=4, color=_BEST, lw=2.4, zorder=5, label="the best trial")
        else:
            curves.plot(x, y, marker=marker, ms=3, color=_choose_colour(trial, quality), lw=1.3)
    has_epochs = any("epoch" in report for trial in trials for report in trial.history)
    curves.set(xlabel="epochs" if has_epochs else "reports", ylabel=metric)
    _set_heights(curves, trials, quality, metric)
    _draw_trials(points, trials, quality, metric=metric, mode=mode)
    for axes in (curves, points):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=_FAINT, lw=0.5, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=_INK)
    return finish_figure(figure, path=path)


def parallel_figure(
    trials: Sequence[TrialRecord], *, metric: str, mode: Mode, path: str | os.PathLike[str] | None = None
) -> Any:
    """Draw a line for each trial through its parameters to its best value: better ones are darker and higher."""
    from matplotlib.patches import PathPatch

    scored = [trial for trial in trials if trial.best(metric, mode) is not None]
    parameters = list_varying_parameters(scored)
    num_axes = len(parameters) + 1
    figure = _figure(width=max(6.0, 2.2 * num_axes), height=4.8)
    axes = figure.subplots()
    axes.set_axis_off()
    quality = Quality(scored, metric=metric, mode=mode)
    best = find_best_trial(scored, metric, mode)
    heights = [_spread_heights(parameter, len(scored)) for parameter in parameters]
    for trial in quality.sort_worst_first(scored):
        index, height = scored.index(trial), quality.rate(trial)
        assert height is not None
        line = _smooth([*(column[index] for column in heights), height])
        if trial is best:
            axes.add_patch(PathPatch(line, facecolor="none", edgecolor=_BEST, lw=2.6, zorder=5))
        else:
            colour, alpha = _choose_colour(trial, quality), 0.45 + 0.45 * height
            axes.add_patch(PathPatch(line, facecolor="none", edgecolor=colour, lw=1.3, alpha=alpha))
    for x, parameter in enumerate(parameters):
        _draw_axis(axes, x, parameter.name, _list_ticks(parameter))
    _draw_axis(axes, num_axes - 1, f"best {metric}", quality.list_ticks())
    shades = [[_shade(step / 255)] for step in range(256)]
    axes.imshow(shades, extent=(num_axes - 0.975, num_axes - 0.92, 0, 1), origin="lower", aspect="auto", zorder=4)
    axes.set(xlim=(-0.45, num_axes - 0.6), ylim=(-0.06, 1.16))
    return finish_figure(figure, path=path)


def _set_heights(axes: Any, trials: Sequence[TrialRecord], quality: Quality, metric: str) -> None:
    """Set the limits of the value axis to the values of trials on the quality scale; diverged ones leave the axes."""
    values = [value for trial in trials if quality.is_on_scale(trial) for value in _curve(trial, metric)[1]]
    if quality.is_log:
        axes.set_yscale("log")
    if not values or min(values) == max(values):
        return
    low, high = min(values), max(values)
    if quality.is_log and low > 0:
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _draw_trials(axes: Any, trials: Sequence[TrialRecord], quality: Quality, *, metric: str, mode: Mode) -> None:
    """Draw the trials in the order of their start; triangles at the edge stand for values beyond it."""
    best: float | None = None
    steps: list[float] = []
    low, high = axes.get_ylim()
    for number, trial in enumerate(trials, start=1):
        value = trial.best(metric, mode)
        if value is not None:
            best = value if best is None or is_better(value, best, mode) else best
            marker = "^" if value > high else "v" if value < low else "o"
            height = min(max(value, low), high)
            colour = _choose_colour(trial, quality)
            axes.scatter(number, height, s=40, marker=marker, color=colour, edgecolor="white", lw=0.6, zorder=3)
        steps.append(float("nan") if best is None else best)
    axes.step(range(1, len(trials) + 1), steps, where="post", color=_BEST, lw=1.6, label="best so far", zorder=2)
    axes.set(xlabel="trials", xlim=(0.4, len(trials) + 0.6))


def _curve(trial: TrialRecord, metric: str) -> tuple[list[float], list[float]]:
    """Return the epochs, or numbers of reports, and the metric of each report that has a number for it."""
    reports = [report for report in trial.history if is_number(report.get(metric))]
    x = [report["epoch"] + 1 if "epoch" in report else index + 1 for index, report in enumerate(reports)]
    return x, [report[metric] for report in reports]


def _spread_heights(parameter: Parameter, num_trials: int) -> list[float]:
    """Return a height for each trial; those of one level are a little apart, so that each line is visible."""
    heights = [parameter.locate(value) for value in parameter.values]
    if parameter.scale != "levels":
        return heights
    width = 0.5 / len(parameter.levels)
    return [height + width * ((index + 0.5) / num_trials - 0.5) for index, height in enumerate(heights)]


def _smooth(heights: Sequence[float]) -> Any:
    """Return a path that is horizontal where it meets an axis."""
    from matplotlib.path import Path

    points, codes = [(0.0, heights[0])], [Path.MOVETO]
    for x, (left, right) in enumerate(itertools.pairwise(heights)):
        points += [(x + 0.45, left), (x + 0.55, right), (x + 1.0, right)]
        codes += [Path.CURVE4] * 3
    return Path(points, codes)


def _list_ticks(parameter: Parameter) -> list[tuple[float, str]]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if parameter.scale == "levels":
        return [((index + 0.5) / len(parameter.levels), level) for index, level in enumerate(parameter.levels)]
    locator = LogLocator() if parameter.scale == "log" else MaxNLocator(5)
    candidates = [float(value) for value in locator.tick_values(parameter.low, parameter.high)]
    within = [value for value in candidates if parameter.low <= value <= parameter.high]
    if len(within) < 2:
        within = [parameter.low, parameter.high]
    return [(parameter.locate(value), format_value(value)) for value in within]


def _draw_axis(axes: Any, x: float, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([x, x], [-0.02, 1.02], color=_INK, lw=1.1, zorder=6, solid_capstyle="round")
    axes.text(x, 1.07, name, ha="center", va="bottom", color=_INK, fontsize=10, fontweight="bold")
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for height, label in ticks:
        axes.plot([x - 0.02, x], [height, height], color=_INK, lw=0.9, zorder=6)
        axes.text(x - 0.04, height, label, ha="right", va="center", color=_INK, fontsize=8.5, zorder=7, bbox=box)


def _choose_colour(trial: TrialRecord, quality: Quality) -> Any:
    quality_of_trial = quality.rate(trial)
    return _FAINT if quality_of_trial is None else _shade(quality_of_trial)


def _shade(rating: float) -> Any:
    """Return a colour from pale, the worst, to dark; readable on white and without seeing red or green."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.94 * (1 - rating))


def _import() -> None:
    with contextlib.suppress(ImportError):  # reported where matplotlib is used
        # These modules are all that the figures need.
        importlib.import_module("matplotlib.backends.backend_agg")
        importlib.import_module("matplotlib.figure")


def _figure(*, width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # optional, and slow to import
    except ImportError as error:
        raise ConfigError("figures of a sweep need matplotlib: pip install matplotlib, or raylit[plot]") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)
