"""Pictures of a sweep: the objective over its trainings and trials, and parallel coordinates of what was tried. Driver.

Both need matplotlib, and no display.
"""

import contextlib
import importlib.util
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any

from raylit.errors import ConfigError
from raylit.tune import figures
from raylit.tune.records import Mode, TrialRecord, best_of, is_better, is_number
from raylit.tune.sweep.parameters import Parameter, Quality, format_value, varying

_INK = "#30343f"
_FAINT = "#c9ccd3"
_BEST = "#d1495b"


def is_pictured() -> bool:
    """A sweep's pictures are saved at its end."""
    return importlib.util.find_spec("matplotlib") is not None


def begin_import() -> None:
    """Have matplotlib imported while the sweep waits for Ray: it takes half a second."""
    threading.Thread(target=_import, name="raylit-matplotlib").start()


def objective_figure(
    trials: Sequence[TrialRecord], *, metric: str, mode: Mode, path: str | os.PathLike[str] | None = None
) -> Any:
    """The metric along each training, and beside it the trials in the order of their start with the best so far."""
    figure = _figure(width=11.0, height=4.6)
    curves, points = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    quality = Quality(trials, metric=metric, mode=mode)
    best = best_of(trials, metric, mode)
    for trial in quality.worst_first(trials):
        x, y = _curve(trial, metric)
        marker = "o" if len(x) < 12 else ""
        if trial is best:
            curves.plot(x, y, marker=marker, ms=4, color=_BEST, lw=2.4, zorder=5, label="the best trial")
        else:
            curves.plot(x, y, marker=marker, ms=3, color=_colour(trial, quality), lw=1.3)
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
    return _saved(figure, path)


def parallel_figure(
    trials: Sequence[TrialRecord], *, metric: str, mode: Mode, path: str | os.PathLike[str] | None = None
) -> Any:
    """A line for each trial through its hyper-parameters to the best it reached: the better, the darker and higher."""
    from matplotlib.patches import PathPatch

    scored = [trial for trial in trials if trial.best(metric, mode) is not None]
    parameters = varying(scored)
    num_axes = len(parameters) + 1
    figure = _figure(width=max(6.0, 2.2 * num_axes), height=4.8)
    axes = figure.subplots()
    axes.set_axis_off()
    quality = Quality(scored, metric=metric, mode=mode)
    best = best_of(scored, metric, mode)
    places = [_places(parameter, len(scored)) for parameter in parameters]
    for trial in quality.worst_first(scored):
        index, height = scored.index(trial), quality.of(trial)
        assert height is not None
        line = _smooth([*(column[index] for column in places), height])
        if trial is best:
            axes.add_patch(PathPatch(line, facecolor="none", edgecolor=_BEST, lw=2.6, zorder=5))
        else:
            colour, alpha = _colour(trial, quality), 0.45 + 0.45 * height
            axes.add_patch(PathPatch(line, facecolor="none", edgecolor=colour, lw=1.3, alpha=alpha))
    for x, parameter in enumerate(parameters):
        _draw_axis(axes, x, parameter.name, _ticks(parameter))
    _draw_axis(axes, num_axes - 1, f"best {metric}", quality.ticks())
    shades = [[_shade(step / 255)] for step in range(256)]
    axes.imshow(shades, extent=(num_axes - 0.975, num_axes - 0.92, 0, 1), origin="lower", aspect="auto", zorder=4)
    axes.set(xlim=(-0.45, num_axes - 0.6), ylim=(-0.06, 1.16))
    return _saved(figure, path)


def _set_heights(axes: Any, trials: Sequence[TrialRecord], quality: Quality, metric: str) -> None:
    """What the trials on the scale of quality went through: those that diverged leave at the edge."""
    seen = [value for trial in trials if quality.is_on_scale(trial) for value in _curve(trial, metric)[1]]
    if quality.is_log:
        axes.set_yscale("log")
    if not seen or min(seen) == max(seen):
        return
    low, high = min(seen), max(seen)
    if quality.is_log and low > 0:
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _draw_trials(axes: Any, trials: Sequence[TrialRecord], quality: Quality, *, metric: str, mode: Mode) -> None:
    """In the order of their start; triangles at the edge stand for what is beyond it."""
    best: float | None = None
    steps: list[float] = []
    low, high = axes.get_ylim()
    for number, trial in enumerate(trials, start=1):
        value = trial.best(metric, mode)
        if value is not None:
            best = value if best is None or is_better(value, best, mode) else best
            marker = "^" if value > high else "v" if value < low else "o"
            place = min(max(value, low), high)
            colour = _colour(trial, quality)
            axes.scatter(number, place, s=40, marker=marker, color=colour, edgecolor="white", lw=0.6, zorder=3)
        steps.append(float("nan") if best is None else best)
    axes.step(range(1, len(trials) + 1), steps, where="post", color=_BEST, lw=1.6, label="best so far", zorder=2)
    axes.set(xlabel="trials", xlim=(0.4, len(trials) + 0.6))


def _curve(trial: TrialRecord, metric: str) -> tuple[list[float], list[float]]:
    reports = [report for report in trial.history if is_number(report.get(metric))]
    x = [report["epoch"] + 1 if "epoch" in report else index + 1 for index, report in enumerate(reports)]
    return x, [report[metric] for report in reports]


def _places(parameter: Parameter, num_trials: int) -> list[float]:
    """A height for each trial; those of one level stand a little apart, so that each line is seen."""
    heights = [parameter.place(value) for value in parameter.values]
    if parameter.scale != "levels":
        return heights
    room = 0.5 / len(parameter.levels)
    return [height + room * ((index + 0.5) / num_trials - 0.5) for index, height in enumerate(heights)]


def _smooth(heights: Sequence[float]) -> Any:
    """A path that is level where it meets an axis."""
    from matplotlib.path import Path

    points, codes = [(0.0, heights[0])], [Path.MOVETO]
    for x, (left, right) in enumerate(itertools.pairwise(heights)):
        points += [(x + 0.45, left), (x + 0.55, right), (x + 1.0, right)]
        codes += [Path.CURVE4] * 3
    return Path(points, codes)


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if parameter.scale == "levels":
        return [((index + 0.5) / len(parameter.levels), level) for index, level in enumerate(parameter.levels)]
    locator = LogLocator() if parameter.scale == "log" else MaxNLocator(5)
    found = [float(value) for value in locator.tick_values(parameter.low, parameter.high)]
    within = [value for value in found if parameter.low <= value <= parameter.high]
    if len(within) < 2:
        within = [parameter.low, parameter.high]
    return [(parameter.place(value), format_value(value)) for value in within]


def _draw_axis(axes: Any, x: float, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([x, x], [-0.02, 1.02], color=_INK, lw=1.1, zorder=6, solid_capstyle="round")
    axes.text(x, 1.07, name, ha="center", va="bottom", color=_INK, fontsize=10, fontweight="bold")
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for height, label in ticks:
        axes.plot([x - 0.02, x], [height, height], color=_INK, lw=0.9, zorder=6)
        axes.text(x - 0.04, height, label, ha="right", va="center", color=_INK, fontsize=8.5, zorder=7, bbox=box)


def _colour(trial: TrialRecord, quality: Quality) -> Any:
    place = quality.of(trial)
    return _FAINT if place is None else _shade(place)


def _shade(place: float) -> Any:
    """From pale, the worst, to dark; readable on white, and by people who see no red or no green."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.94 * (1 - place))


def _import() -> None:
    with contextlib.suppress(ImportError):  # said where it is used
        # All that the pictures need.
        importlib.import_module("matplotlib.backends.backend_agg")
        importlib.import_module("matplotlib.figure")


def _figure(*, width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # optional, and slow to import
    except ImportError as error:
        raise ConfigError("pictures of a sweep need matplotlib: pip install matplotlib, or raylit[plot]") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is not None:
        figures.save(figure, path)
    return figure
