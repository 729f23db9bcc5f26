"""The searches of a Trainer: what they find, and that they leave everything else as it was."""

import os
import signal
import sys

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, make_data, weights_of
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl
from raylit.errors import RemoteTraceback
from raylit.loggers import CSVLogger


class InHooks(Regression):
    """Draws random numbers and logs from hooks; kills its process with one rate."""

    def __init__(self, *, killed_with=None):
        super().__init__(dropout=0.5, lr=0.01)
        self.killed_with = killed_with

    def on_train_start(self):
        self.logger.log_metrics({"drawn": torch.rand(1).item()}, step=0)

    def on_train_batch_start(self, batch, batch_idx):
        self.drawn = torch.rand(1).item()
        if batch_idx == 1 and self.killed_with == pytest.approx(self.hparams.lr):
            os.kill(os.getpid(), signal.SIGKILL)


def run(path, *, num_workers=0, search=lambda tuner, model, data: None, **arguments):
    """Losses, weights, the files that were written and what is drawn afterwards; and what the search has found."""
    path.mkdir()
    torch.manual_seed(3)
    model, data = InHooks(**arguments), RegressionData()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": path}
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=2, logger=CSVLogger(path), **quiet)
    found = search(trainer.tuner, model, data)
    trainer.fit(model, data)
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*"))
    rows = next(path.rglob("metrics.csv")).read_text().splitlines()[:-1]  # the last one is the run's goodput
    return (model.losses, weights_of(model), files, rows, torch.rand(3)), found


def assert_same_run(left, right):
    assert left[0] == right[0]
    assert_same_weights(left[1], right[1])
    assert left[2:4] == right[2:4]


def test_a_fit_after_searches_has_the_same_result_as_without_them(tmp_path):
    def search(tuner, model, data):
        tuner.lr_find(model, datamodule=data, num_training=20, update_attr=False)
        tuner.lr_find(model, datamodule=data, num_training=5, method="race", update_attr=False)
        tuner.scale_batch_size(model, datamodule=data, max_trials=2)
        assert (model.losses, model.hparams.lr, data.batch_size) == ([], 0.01, 4)
        data.batch_size = 8

    searched, _ = run(tmp_path / "with", search=search)
    plain, _ = run(tmp_path / "without")
    assert_same_run(searched, plain)
    assert torch.equal(searched[4], plain[4])


@pytest.mark.slow
def test_trials_race_in_parallel_on_tune_and_a_trial_that_dies_drops_out(tmp_path):
    """And the run after them is the one without."""

    def search(tuner, model, data):
        arguments = {"min_lr": 1e-3, "max_lr": 1.0, "num_candidates": 4, "num_training": 9}
        return tuner.lr_find(model, datamodule=data, method="race", update_attr=False, **arguments)

    inline, expected = run(tmp_path / "inline", search=search)
    remote, found = run(tmp_path / "remote", killed_with=1e-3, num_workers=1, search=search)
    assert_same_run(remote, inline)
    assert found.results["lr"] == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert found.results["steps"][0] == 1
    [(lr, words)] = found.failures.items()
    assert lr == pytest.approx(1e-3)
    assert words.startswith("crashed: worker of rank 0")
    assert found.suggestion() == expected.suggestion()
    winner = expected.results["lr"].index(expected.suggestion())
    assert found.results["loss"][winner] == pytest.approx(expected.results["loss"][winner], rel=1e-5)


def mean_losses(model, loader, lr, *, rungs):
    """By hand: of the steps up to each rung, from the one before."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    while len(losses) < rungs[-1]:
        for x, y in loader:
            loss = functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return [sum(losses[start:stop]) / (stop - start) for start, stop in zip([0, *rungs[:-1]], rungs, strict=True)]


def test_a_race_matches_hand_written_loops_and_stops_the_losers(quiet):
    torch.manual_seed(0)
    weights = weights_of(model := Regression(lr=7.0))
    loader = DataLoader(make_data(48), batch_size=8)
    tuner = pl.Trainer(limit_val_batches=0, **quiet).tuner
    found = tuner.lr_find(model, loader, method="race", min_lr=1e-4, max_lr=1.0, num_candidates=5, num_training=27)
    assert found.results["lr"] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    by_hand = {}
    for lr in found.results["lr"]:
        model.load_state_dict(weights)
        by_hand[lr] = mean_losses(model, loader, lr, rungs=[1, 3, 9, 27])
    for lr, loss, steps in zip(*found.results.values(), strict=True):
        assert loss == pytest.approx(by_hand[lr][[1, 3, 9, 27].index(steps)], rel=1e-4)
    assert min(by_hand, key=lambda lr: by_hand[lr][-1]) == found.suggestion() == model.hparams.lr
    assert "lowest mean loss of steps 10 to 27, of 5 candidates" in found.rule
    assert sum(found.results["steps"]) < 3 * 27


class Breaks(Regression):
    def training_step(self, batch, batch_idx):
        raise KeyError("bug")


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bug_in_the_module_is_raised_unchanged_by_the_search(num_workers, quiet):
    with pytest.raises(KeyError, match="bug") as caught:
        pl.scale_batch_size(Breaks(), RegressionData(), num_workers=num_workers, **quiet)
    if num_workers > 0:
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in training_step" in str(caught.value.__cause__)


def test_throughput_keeps_the_samples_of_a_step(quiet):
    data = RegressionData(batch_size=32, num_train=256)
    trainer = pl.Trainer(accumulate_grad_batches=2, max_epochs=1, auto_scale_batch_size="throughput", **quiet)
    model = Regression()
    size = trainer.tune(model, data, scale_batch_size_kwargs={"init_val": 8})["scale_batch_size"]
    assert set(trainer.tuner.batch_sizes.results["batch_size"]) <= {1, 2, 4, 8, 16, 32, 64}
    assert "of those that divide a step's 64 samples" in trainer.tuner.batch_sizes.rule
    trainer.fit(model, data)
    assert (data.batch_size, trainer.global_step) == (size, 4)
    assert len(model.losses) == 256 // size


def test_the_accumulation_follows_from_a_given_effective_batch_size(quiet):
    data = RegressionData(batch_size=1, num_train=240)
    trainer = pl.Trainer(max_epochs=1, **quiet)
    size = pl.Tuner(trainer).scale_batch_size(Regression(), datamodule=data, effective_batch_size=24, max_val=10)
    trainer.fit(Regression(), data)
    assert (size, trainer.global_step) == (8, 10)
    with pytest.raises(pl.ConfigError, match="effective_batch_size=7 over 2 workers: must be a multiple"):
        pl.scale_batch_size(Regression(), data, num_workers=2, effective_batch_size=7, **quiet)
    with pytest.raises(pl.ConfigError, match="an accumulation that changes from epoch to epoch"):
        pl.scale_batch_size(Regression(), data, accumulate_grad_batches={0: 1, 2: 4}, mode="throughput", **quiet)


def test_the_suggested_rate_is_set_on_the_attribute_that_the_module_reads(quiet):
    class Rated(RegressionData):
        learning_rate = 0.0

        def __init__(self):
            super().__init__()
            self.learning_rate = 0.1

    class Reads(Regression):
        def __init__(self):
            super().__init__()
            del self._hparams["lr"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.trainer.datamodule.learning_rate)

    data = Rated()
    found = pl.lr_find(Reads(), data, num_training=30, **quiet)
    assert data.learning_rate == found.suggestion()
    found = pl.lr_find(Reads(), data, method="race", num_training=9, num_candidates=3, min_lr=1e-3, **quiet)
    assert data.learning_rate == found.suggestion()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "guess"}, "method='guess': must be 'range' .* or 'race'"),
        ({"mode": "cubic"}, "mode='cubic': must be 'exponential' or 'linear'"),
        ({"min_lr": 2.0}, "min_lr=2.0 and max_lr=1.0"),
        ({"num_training": 1}, "num_training=1: must be an int of at least 3"),
        ({"attr_name": "speed"}, r"'speed' to set; numbers that there are: Regression\.dropout, Regression\.lr"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_runs(arguments, message, quiet):
    with pytest.raises(pl.ConfigError, match=message):
        pl.lr_find(Regression(), RegressionData(), **arguments, **quiet)


def test_sizes_that_cannot_work_are_refused_before_anything_runs(quiet):
    for arguments, message in [
        ({"mode": "best"}, "mode='best': must be 'power', 'binsearch' or 'throughput'"),
        ({"margin": 1.5}, "margin=1.5: must be a fraction"),
        ({"batch_arg_name": "bs"}, r"'bs' to set; numbers that there are: .*RegressionData\.batch_size"),
        ({"effective_batch_size": "all"}, "must be a number of samples, 'keep' or 'any'"),
    ]:
        with pytest.raises(pl.ConfigError, match=message):
            pl.scale_batch_size(Regression(), RegressionData(), **arguments, **quiet)


def test_a_negative_loss_does_not_count_as_divergence(quiet):
    class LogLikelihood(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) - 100

    found = pl.lr_find(LogLikelihood(), RegressionData(), max_lr=1e-3, num_training=20, update_attr=False, **quiet)
    assert len(found.results["lr"]) == 20


def test_every_result_is_plotted_without_a_display(tmp_path, quiet, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    tuner = pl.Trainer(**quiet).tuner
    data = RegressionData()
    results = {
        "range": tuner.lr_find(Regression(), datamodule=data, num_training=30),
        "race": tuner.lr_find(Regression(), datamodule=data, method="race", num_training=9, num_candidates=3),
    }
    tuner.scale_batch_size(Regression(), datamodule=data)
    results["size"] = tuner.batch_sizes
    for name, result in results.items():
        figure = result.plot(suggest=True, path=tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert figure.axes[0].get_legend_handles_labels()[1]
        assert result.plot(ax=figure.axes[0]) is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(pl.ConfigError, match=r"plot\(\) needs matplotlib: pip install matplotlib"):
        results["range"].plot()


def test_callbacks_ask_for_the_searches_at_the_start_of_a_fit(quiet):
    model, data = Regression(), RegressionData(num_train=16)
    rate = pl.LearningRateFinder(min_lr=1e-4, num_training_steps=30)
    size = pl.BatchSizeFinder(max_trials=3)
    trainer = pl.Trainer(num_workers=0, max_epochs=1, callbacks=[rate, size], **quiet)
    trainer.fit(model, data)
    assert data.batch_size == size.optimal_batch_size == trainer.tuner.batch_sizes.suggestion()
    assert model.hparams.lr == rate.optimal_lr.suggestion()
    assert len(model.losses) == trainer.num_training_batches == 16 / data.batch_size
    trainer.fit(model, data)
    assert len(model.losses) == 2 * trainer.num_training_batches


def test_a_search_that_arguments_and_a_callback_request_is_refused(quiet):
    rate = pl.LearningRateFinder()
    for arguments, message in [
        ({"callbacks": rate, "auto_lr_find": True}, "auto_lr_find and a LearningRateFinder: give one"),
        ({"callbacks": [rate, pl.LearningRateFinder()]}, "0 BatchSizeFinders and 2 LearningRateFinders"),
    ]:
        with pytest.raises(pl.ConfigError, match=message):
            pl.fit(Regression(), RegressionData(), num_workers=0, **arguments, **quiet)
    pl.fit(Regression(), RegressionData(), num_workers=0, callbacks=rate, fast_dev_run=True)
    assert rate.optimal_lr is None
