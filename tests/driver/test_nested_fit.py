"""Trainer inside a function that Ray Tune has called: its reports, its end, and its start from a checkpoint.

Tune's own trainable runs the function, without the actor and the controller around it.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, weights_of
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune.result import RESULT_DUPLICATE
from ray.tune.trainable import wrap_function

import raylit as pl
from raylit.driver.ray import local_cluster
from raylit.driver.tune_integration import current_session


@pytest.fixture
def start(tmp_path):
    """Start a trial of a function, after ending the one before it, whose checkpoints it may continue from."""
    local_cluster.connect()  # Tune asks the node for its directories
    trials = []

    def end():
        if current_session() is not None:
            trials[-1].stop()

    def start(function, config=None, name="trial"):
        end()
        storage = StorageContext(
            storage_path=str(tmp_path / "results"), experiment_dir_name="experiment", trial_dir_name=name
        )
        trials.append(wrap_function(function)(config=config or {}, storage=storage))
        return trials[-1]

    yield start
    end()


def results_of(trial):
    """Return the results that it reports from here to its end."""
    results = []
    while RESULT_DUPLICATE not in (result := trial.train()):
        results.append(result)
    return results


@pytest.fixture
def fit(quiet):
    def fit(model=None, data=None, **arguments):
        arguments = {**quiet, "max_epochs": 2, "num_workers": 0, "num_sanity_val_steps": 0, **arguments}
        trainer = pl.Trainer(**arguments)
        trainer.fit(model or Regression(), data or RegressionData())
        return trainer

    return fit


@pytest.fixture
def fitting(fit):
    """Return a function that runs a fit."""

    def fitting(*given, **arguments):
        def trial(config):
            fit(*given, **arguments)

        return trial

    return fitting


def test_each_validation_is_a_result_with_the_epochs_metrics(start, fit):
    fits = []

    def trial(config):
        fits.append(fit())

    results = results_of(start(trial))
    assert [(result["epoch"], result["step"]) for result in results] == [(0, 6), (1, 12)]
    assert all({"train_loss", "val_loss"} <= result.keys() for result in results)
    assert results[-1]["val_loss"] == pytest.approx(fits[0].callback_metrics["val_loss"].item())
    assert not any(result["should_checkpoint"] for result in results if "should_checkpoint" in result)


def test_validations_inside_an_epoch_are_results_and_sanity_checks_are_not(start, fitting):
    results = results_of(start(fitting(max_epochs=1, val_check_interval=2, num_sanity_val_steps=2)))
    assert [result["step"] for result in results] == [2, 4, 6]


def test_epochs_without_a_validation_report_no_result_if_others_validate(start, fitting):
    results = results_of(start(fitting(max_epochs=4, check_val_every_n_epoch=2)))
    assert [result["epoch"] for result in results] == [1, 3]


def test_without_a_validation_loop_each_epoch_is_a_result(start, fitting):
    results = results_of(start(fitting(limit_val_batches=0)))
    assert [(result["epoch"], "val_loss" in result) for result in results] == [(0, False), (1, False)]


class Logs(Regression):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("done", 1.0)
        self.log("training_iteration", 77.0)


def test_logged_names_that_tune_reserves_are_not_reported(start, fitting):
    results = results_of(start(fitting(Logs())))
    assert [(result["done"], result["training_iteration"]) for result in results] == [(False, 1), (False, 2)]


def test_each_result_has_a_checkpoint_if_the_trainer_saves_checkpoints(start, fit):
    models = []

    def trial(config):
        models.append(Regression())
        fit(models[0], enable_checkpointing=True)

    started = start(trial)
    started.train()
    saved = started.save()
    with saved.checkpoint.as_directory() as directory:
        checkpoint = torch.load(os.path.join(directory, "checkpoint.ckpt"), weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, 6)
    assert saved.metrics["step"] == 6
    assert_same_weights(checkpoint["state_dict"], weights_of(models[0]))  # training stands still until the next train()


class Ends(pl.DriverCallback):
    def __init__(self):
        self.seen = []

    def on_exception(self, run, error):
        self.seen.append(error)

    def on_end(self, run):
        self.seen.append("end")


class Statuses(pl.Logger):
    def __init__(self):
        self.statuses = []

    def log_metrics(self, metrics, step=None): ...

    def finalize(self, status):
        self.statuses.append(status)


def test_a_trial_that_tune_stops_ends_orderly_at_that_result(start, fit):
    ends, statuses, after = Ends(), Statuses(), []

    def trial(config):
        fit(max_epochs=100, callbacks=[ends], logger=statuses)
        after.append("never")

    started = start(trial)
    started.train()
    started.train()
    thread = current_session()._session.training_thread
    started.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert [type(error) for error in ends.seen] == [SystemExit, str]
    assert (statuses.statuses, after) == (["success"], [])


def test_the_trials_actor_can_be_used_again_at_once(start, fitting):
    started = start(fitting(max_epochs=100))
    started.train()
    assert started.reset({}, storage=started._storage)
    assert started.train()["training_iteration"] == 1


# A function that reports by itself


class ReportsInACallback(pl.DriverCallback):
    def on_validation_end(self, run):
        tune.report({"loss": 1.0})


class ReportsInAHook(Regression):
    def on_validation_epoch_end(self):
        tune.report({"loss": 1.0})


def fit_quietly(model=None, **arguments):
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(max_epochs=2, num_workers=0, **dict.fromkeys(switches, False), **arguments)
    trainer.fit(model or Regression(), RegressionData())


@pytest.mark.parametrize(
    "fit_with_reports",
    [
        lambda: fit_quietly(callbacks=ReportsInACallback()),
        lambda: fit_quietly(ReportsInAHook(), num_sanity_val_steps=0),
    ],
    ids=["callback", "hook"],
)
def test_reports_of_a_callback_or_hook_are_not_doubled(start, fit_with_reports):
    results = results_of(start(lambda config: fit_with_reports()))
    assert [(result["loss"], "val_loss" in result) for result in results] == [(1.0, False), (1.0, False)]


def test_fits_after_a_report_of_the_function_report_nothing(start):
    def rounds(config):
        for number in range(3):
            fit_quietly()
            tune.report({"round": number})

    results = results_of(start(rounds))
    assert [(result.get("round"), result.get("epoch")) for result in results] == [
        (None, 0), (None, 1), (0, None), (1, None), (2, None)
    ]  # fmt: skip


def test_several_fits_of_one_function_all_report(start):
    def folds(config):
        fit_quietly()
        fit_quietly()

    assert [result["epoch"] for result in results_of(start(folds))] == [0, 1, 0, 1]


def test_report_false_leaves_reporting_to_the_function(start):
    def trial(config):
        fit_quietly(callbacks=[pl.TuneReport(report=False)])
        return {"loss": 1.0}

    assert [(result["loss"], "val_loss" in result) for result in results_of(start(trial))] == [(1.0, False)]


def test_an_explicit_tune_report_always_reports(start, fit):
    def trial(config):
        fit(max_epochs=1, callbacks=[pl.TuneReport({"loss": "val_loss"}, save_checkpoints=False)])
        tune.report({"loss": -1.0})

    first, last = results_of(start(trial))
    assert (last["loss"], "val_loss" in first, "epoch" in first) == (-1.0, False, False)
    assert first["loss"] > 0


def test_a_missing_metric_is_an_error_that_lists_the_logged_ones(start, fitting):
    trial = start(fitting(callbacks=[pl.TuneReport(["val_loss", "acc"])]))
    with pytest.raises(pl.ConfigError, match=r"'acc' has not been logged; there are: epoch, step, train_loss, val_los"):
        trial.train()


def test_tune_report_does_nothing_outside_of_ray(fit):
    assert fit(callbacks=[pl.TuneReport()]).global_step == 12
    assert current_session() is None


# Continuing from a checkpoint


class Watches(Regression):
    """Callback that records where each training starts, and its learning rate."""

    def __init__(self, begun, decay=False, **hparams):
        super().__init__(**hparams)
        self.begun = begun
        self.decay = decay

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if not self.decay:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]

    def on_train_start(self):
        optimizer = self.optimizers()
        self.begun.append((self.global_step, optimizer.param_groups[0]["lr"]))


def watching(fit, begun, **arguments):
    arguments = {"max_epochs": 4, "enable_checkpointing": True, **arguments}

    def trial(config):
        fit(Watches(begun, lr=config["lr"], decay=config.get("decay", False)), **arguments)

    return trial


def test_a_restored_trial_continues_from_its_checkpoint(start, fit):
    torch.manual_seed(3)
    undisturbed = results_of(start(watching(fit, []), {"lr": 0.05}))
    torch.manual_seed(3)
    begun = []
    first = start(watching(fit, begun), {"lr": 0.05})
    first.train()
    first.train()
    saved = first.save()
    torch.manual_seed(11)
    second = start(watching(fit, begun), {"lr": 0.05})
    second.restore(saved)
    results = results_of(second)
    assert begun == [(0, 0.05), (12, 0.05)]
    assert [result["training_iteration"] for result in results] == [3, 4]
    assert [result["val_loss"] for result in results] == [result["val_loss"] for result in undisturbed[2:]]


@pytest.mark.parametrize(("decay", "rate"), [(False, 0.02), (True, 0.005)])
def test_a_perturbed_trial_continues_with_the_new_learning_rate(start, fit, decay, rate):
    """Continue another trial's checkpoint under a config of its own, as in population based training."""
    begun = []
    first = start(watching(fit, begun), {"lr": 0.05, "decay": decay})
    first.train()
    first.train()
    saved = first.save()
    second = start(watching(fit, begun), {"lr": 0.02, "decay": decay}, name="another")
    second.restore(saved)
    assert [result["step"] for result in results_of(second)] == [18, 24]
    assert begun[1] == (12, pytest.approx(rate))


def test_report_false_leaves_the_checkpoint_of_a_restored_trial_to_the_function(start, fit):
    begun = []

    def trial(config):
        is_restored = tune.get_checkpoint() is not None
        fit(Watches(begun), enable_checkpointing=True, callbacks=[pl.TuneReport(report=not is_restored)])

    first = start(trial)
    first.train()
    saved = first.save()
    second = start(trial)
    second.restore(saved)
    second.train()
    assert begun == [(0, 0.05), (0, 0.05)]


def test_only_the_first_fit_of_a_trial_continues_from_its_checkpoint(start, fit):
    begun = []

    def folds(config):
        for _ in range(2):
            fit(Watches(begun), max_epochs=1, enable_checkpointing=True)

    first = start(folds)
    assert [result["step"] for result in (first.train(), first.train())] == [6, 6]
    saved = first.save()
    second = start(folds)
    second.restore(saved)
    with pytest.warns(UserWarning, match="restored from a checkpoint of its fit number 2 and begins anew"):
        results_of(second)
    assert [step for step, _ in begun] == [0, 0, 0, 0]


def test_train_session_is_detected_in_its_function():
    """Use Train's local mode, which stands for a worker of Train; real workers are in `test_trials.py`."""
    from ray.train.v2._internal.execution import context, train_fn_utils

    assert context._train_context is None
    local = train_fn_utils.LocalTrainFnUtils("experiment", world_size=3)
    train_fn_utils.set_train_fn_utils(local)
    try:
        session = current_session()
        assert session is not None
        assert (session.name, session.world_size, session.num_reports) == ("a worker of Ray Train", 3, 0)
        assert (session.checkpoint, session.config) == (None, {})
        with pytest.warns(UserWarning, match="each of them trains the whole model by itself, and none reports"):
            fit_quietly()
        assert local._get_last_metrics() is None
        train_fn_utils.set_train_fn_utils(alone := train_fn_utils.LocalTrainFnUtils("experiment"))
        fit_quietly()
        assert alone._get_last_metrics()["epoch"] == 1
    finally:
        train_fn_utils._train_fn_utils = None
    assert current_session() is None


def test_a_fit_outside_of_a_trial_does_not_import_tune(tmp_path):
    source = """
import sys, torch, raylit as pl
sys.path.insert(0, sys.argv[1])
from models import Regression, RegressionData
pl.Trainer(num_workers=0, max_epochs=1, logger=False, enable_checkpointing=False).fit(Regression(), RegressionData())
print([name for name in sys.modules if name.split(".")[0] == "ray"])
"""
    tests = str(pathlib.Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", source, tests], capture_output=True, text=True, timeout=100, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
