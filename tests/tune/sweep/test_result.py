"""The output of a sweep: the table, the scales of its parameters, and the figures."""

import math

import pytest

import raylit as pl
from raylit.tune.figures import objective_figure, parallel_figure
from raylit.tune.records import TrialRecord
from raylit.tune.sweep.parameters import Quality, find_common_values, list_varying_parameters
from raylit.tune.sweep.result import summary


def trial(index, config, *values, status="finished", **arguments):
    history = tuple({"val_loss": value, "epoch": epoch, "time_s": 2.0 * epoch} for epoch, value in enumerate(values))
    metrics = history[-1] if history else {}
    return TrialRecord(id=f"t{index}", config=config, status=status, metrics=metrics, history=history, **arguments)


def trials_of(name, *values):
    return [trial(index, {name: value}, 1.0) for index, value in enumerate(values)]


TRIALS = [
    trial(0, {"lr": 0.1, "net": {"kind": "cnn"}, "seed": 1}, 3.0, 2.0, 2.5),
    trial(1, {"lr": 0.001, "net": {"kind": "mlp"}, "seed": 1}, 1.5, 1.0),
    trial(2, {"lr": 0.01, "net": {"kind": "mlp"}, "seed": 1}, 4.0, status="stopped"),
    trial(3, {"lr": 9.0, "net": {"kind": "cnn"}, "seed": 1}, status="failed", error="Traceback\nValueError: too big"),
]


def test_the_best_trial_comes_first_and_common_values_are_below_the_table():
    lines = summary(TRIALS, metric="val_loss", mode="min", directory="sweeps/a", width=120).splitlines()
    cells = [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]
    assert cells[1] == ["trial", "lr", "net/kind", "best val_loss", "epochs", "time", "status"]
    assert cells[3:7] == [
        ["t1 *", "0.001", "mlp", "1", "2", "2.0 s", "finished"],
        ["t0", "0.1", "cnn", "2", "3", "4.0 s", "finished"],
        ["t2", "0.01", "mlp", "4", "1", "0.0 s", "stopped"],
        ["t3", "9", "cnn", "-", "-", "-", "failed"],
    ]
    assert lines[8:] == [
        "in all trials: seed=1",
        "trial t3 failed: ValueError: too big",
        "tensorboard --logdir sweeps/a",
    ]


def test_the_greatest_value_is_the_best_with_mode_max():
    assert summary(TRIALS, metric="val_loss", mode="max", width=120).splitlines()[3].startswith("│ t2 *")


def test_a_table_fits_the_terminal_and_counts_columns_and_rows_left_out():
    many = [trial(index, {f"parameter_{n}": index for n in range(9)}, float(index)) for index in range(30)]
    lines = summary(many, metric="val_loss", mode="min", width=100).splitlines()
    assert max(map(len, lines)) <= 100
    assert "parameter_0" in lines[1]
    assert "and 10 more trials" in lines
    assert any(line.startswith("and ") and line.endswith(" more parameters") for line in lines)


@pytest.mark.parametrize(
    ("values", "scale", "places"),
    [
        ((1e-4, 1e-3, 1e-2), "log", [0.0, 0.5, 1.0]),
        ((0.0, 0.5, 0.1), "linear", [0.0, 1.0, 0.2]),
        ((0.01, 0.3, 0.5, 0.6, 0.99), "linear", None),  # spread evenly, though its ratio is great
        ((32, 64, 128, 32, 64, 128), "levels", [1 / 6, 3 / 6, 5 / 6] * 2),
        (("b", "a", "c"), "levels", [3 / 6, 5 / 6, 1 / 6]),
        ((True, False), "levels", [1 / 4, 3 / 4]),
        ((1e-2, None, 1e-4, None), "levels", [5 / 6, 1 / 6, 3 / 6, 1 / 6]),
        ((1e-3, math.nan, 1e-2, 1e-1), "levels", None),
    ],
)
def test_the_scale_of_a_parameter_follows_from_its_values(values, scale, places):
    (parameter,) = list_varying_parameters(trials_of("x", *values))
    assert parameter.scale == scale
    if places is not None:
        assert [parameter.locate(value) for value in values] == pytest.approx(places)


def test_common_values_are_separated_from_varying_parameters():
    assert [parameter.name for parameter in list_varying_parameters(TRIALS)] == ["lr", "net/kind"]
    assert find_common_values(TRIALS) == {"seed": 1}


def test_diverged_trials_are_off_the_quality_scale():
    trials = [trial(index, {"x": index}, value) for index, value in enumerate((1.0, 1.1, 1.2, 1.3, 1e9))]
    quality = Quality(trials, metric="val_loss", mode="min")
    assert [quality.rate(it) for it in trials] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0, 0.0])
    assert [quality.is_on_scale(it) for it in trials] == [True] * 4 + [False]
    assert [it.id for it in quality.sort_worst_first(trials)] == ["t4", "t3", "t2", "t1", "t0"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_figures_show_every_trial(tmp_path, mode):
    figure = objective_figure(TRIALS, metric="val_loss", mode=mode, path=tmp_path / "objective.png")
    curves, points = figure.axes
    assert [list(line.get_ydata()) for line in curves.get_lines() if len(line.get_ydata()) == 3] == [[3.0, 2.0, 2.5]]
    (best_so_far,) = points.get_lines()
    assert list(best_so_far.get_ydata())[:3] == ([2.0, 1.0, 1.0] if mode == "min" else [3.0, 3.0, 4.0])
    assert len(points.collections) == 3
    figure = parallel_figure(TRIALS, metric="val_loss", mode=mode, path=tmp_path / "parallel.png")
    (axes,) = figure.axes
    assert len(axes.patches) == 3  # the failed one has no end
    words = [text.get_text() for text in axes.texts]
    assert {"lr", "net/kind", "best val_loss", "cnn", "mlp", "0.01"} <= set(words)
    for name in ("objective.png", "parallel.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "trials",
    [[], TRIALS[:1], TRIALS[3:], [trial(0, {"lr": 0.1}, 1.0, 1.0), trial(1, {"lr": 0.1}, 1.0)]],
    ids=["none", "one", "failed", "alike"],
)
def test_figures_and_tables_of_few_or_no_trials(trials, tmp_path):
    objective_figure(trials, metric="val_loss", mode="min", path=tmp_path / "objective.png")
    parallel_figure(trials, metric="val_loss", mode="min", path=tmp_path / "parallel.png")
    assert "best val_loss" in summary(trials, metric="val_loss", mode="min", width=100)


def test_without_matplotlib_figures_raise_an_error_with_the_package_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(pl.ConfigError, match=r"pip install matplotlib, or raylit\[plot\]"):
        objective_figure(TRIALS, metric="val_loss", mode="min")
