"""Sweeps that are killed and resumed, trials that die, and population based training: processes of their own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import raylit as pl

TESTS = str(Path(__file__).parents[2])

SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.insert(0, {tests!r})
from models import Regression, RegressionData
from ray import tune
import raylit as pl


class Slow(Regression):
    def on_train_epoch_end(self):
        with open({log!r}, "a") as file:
            file.write(f"{{self.hparams.lr}} {{self.current_epoch}}\\n")
        time.sleep(0.5)


def build(config):
    return Slow(lr=config["lr"]), RegressionData()


result = pl.sweep(
    build, {{"lr": tune.grid_search([0.1, 0.01, 0.001])}}, metric="val_loss", num_workers=1, max_epochs=5,
    max_concurrent=1, default_root_dir={place!r}, name="killed", resume=True, logger=False,
)
print([(trial.config["lr"], trial.status, [report["epoch"] for report in trial.history]) for trial in result.trials])
"""


def wait_until(is_true, limit_s):
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_sweep_leaves_no_processes_and_is_resumed(tmp_path, end):
    log, script = tmp_path / "log", tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=TESTS, log=str(log), place=str(tmp_path)))
    temporary = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    environment = {**os.environ, "RAY_TMPDIR": temporary}
    command = [sys.executable, str(script)]
    driver = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    try:
        wait_until(lambda: log.exists() and log.read_text().count("\n") >= 8, 90)
        driver.send_signal(end)
        assert driver.wait(timeout=40) == -end
        wait_until(lambda: os.listdir(temporary) == [], 20)
    finally:
        driver.kill()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    expected = [(rate, "finished", [0, 1, 2, 3, 4]) for rate in (0.1, 0.01, 0.001)]
    assert again.stdout.splitlines()[-1] == str(expected), again.stdout + again.stderr
    epochs = log.read_text().split("\n")
    assert epochs.count("0.1 0") == epochs.count("0.1 4") == 1
    assert len(epochs) - 1 <= 15 + 2  # what came after the last checkpoint was trained again
    os.rmdir(temporary)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_death_of_a_worker_ends_only_its_trial(tmp_path):
    from ray import tune

    path = TESTS

    def build(config):
        sys.path.insert(0, path)
        from models import Regression, RegressionData

        class Dying(Regression):
            def on_train_epoch_end(self):
                if config["dies"]:
                    os.kill(os.getpid(), signal.SIGKILL)

        return Dying(), RegressionData()

    result = pl.sweep(
        build, {"dies": tune.grid_search([False, True, False])}, metric="val_loss", num_workers=2, max_epochs=2,
        max_concurrent=1, resources_per_worker={"CPU": 0.5}, default_root_dir=tmp_path, logger=False,
    )  # fmt: skip
    assert [trial.status for trial in result.trials] == ["finished", "failed", "finished"]
    (error,) = result.errors.values()
    assert re.search(r"WorkerDied: worker of rank \d on host \S+ died: .*ended without a word", error)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_population_based_training_continues_after_a_trial_ends_early(tmp_path):
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    path = TESTS

    def build(config):
        sys.path.insert(0, path)
        from models import Regression, RegressionData

        class Stopping(Regression):
            def on_train_epoch_start(self):
                self.trainer.should_stop = config["stops"] and self.current_epoch == 2

        return Stopping(), RegressionData()

    scheduler = PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=2, quantile_fraction=0.0,
        hyperparam_mutations={"x": [1, 2]}, synch=True,
    )  # fmt: skip
    result = pl.sweep(
        build, {"stops": tune.grid_search([False, True, False]), "x": 1}, metric="val_loss", num_workers=0,
        max_epochs=6, resources_per_worker={"CPU": 0.5}, scheduler=scheduler, default_root_dir=tmp_path, logger=False,
    )  # fmt: skip
    assert [trial.status for trial in result.trials] == ["finished"] * 3
    assert [len(trial.history) for trial in result.trials] == [6, 3, 6]
    # What is over is neither reported once more nor copied over.
    assert [trial.metrics["epoch"] for trial in result.trials] == [5, 2, 5]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_population_based_training_copies_weights_into_warm_workers(tmp_path):
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    path = TESTS

    def build(config):
        sys.path.insert(0, path)
        from models import Regression, RegressionData

        class Model(Regression):
            def on_train_epoch_start(self):
                self.log("rate", self.optimizers().param_groups[0]["lr"])
                self.log("process", float(os.getpid()))

        return Model(lr=config["lr"]), RegressionData()

    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        quantile_fraction=0.5,
        hyperparam_mutations={"lr": [0.5, 0.02, 0.01]},
        synch=True,
    )
    result = pl.sweep(
        build, {"lr": tune.grid_search([0.01, 0.5])}, metric="val_loss", num_workers=1, max_epochs=6,
        scheduler=scheduler, default_root_dir=tmp_path, logger=False,
    )  # fmt: skip
    assert [trial.status for trial in result.trials] == ["finished"] * 2
    copied = result.trials[1]
    rates = [report["rate"] for report in copied.history]
    assert rates[0] == 0.5
    assert len(set(rates)) > 1
    # The copy's weights are those of the better one, which had learnt for two epochs.
    assert copied.history[2]["val_loss"] < copied.history[1]["val_loss"]
    assert rates[-1] == pytest.approx(copied.config["lr"])
    processes = {report["process"] for trial in result.trials for report in trial.history}
    # Six stretches of training, three of each trial.
    assert len(processes) == 2
    assert result.best_model.hparams.lr == result.best_config["lr"]
    assert len(list(tmp_path.rglob("*.ckpt"))) <= 4
