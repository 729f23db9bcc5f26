"""Sweeps: real trials on the session's node, whose numbers are those of plain fits."""

import os
import threading
import time

import pytest
import ray
import torch
from models import Regression, RegressionData

import raylit as pl
from raylit.config import Workers
from raylit.driver.ray import local_cluster
from raylit.tune.trial.resources import TrialResources, find_trial_resources

QUIET = {"logger": False, "log_every_n_steps": 1}


def build_of(*, fails_at=None):
    """A function that trials can unpickle: they cannot import this module."""

    def build(config):
        class Model(Regression):
            def setup(self, stage):
                self.first_threads = torch.get_num_threads()

            def on_train_epoch_end(self):
                self.log("process", float(os.getpid()))
                self.log("variables", float(len(ray.get_runtime_context().runtime_env)))
                self.log("has_file", float(os.path.exists("here.txt")))
                self.log("variable", float(os.environ.get("RAYLIT_TEST_SWEPT", 0)))

        if config["lr"] == fails_at:
            raise ValueError(f"no such rate as {config['lr']}")
        return Model(lr=config["lr"]), RegressionData()

    return build


def left_on_the_node():
    """Actors and placement groups, once the ends that are under way are over."""
    deadline = time.monotonic() + 20
    while True:
        actors = [state for state in ray._private.state.actors().values() if state["State"] != "DEAD"]
        groups = [entry for entry in ray.util.placement_group_table().values() if entry["state"] != "REMOVED"]
        if not (actors or groups) or time.monotonic() > deadline:
            return actors, groups
        time.sleep(0.1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Four trials of two workers, one after the other on the same slot; the second fails."""
    from ray import tune

    torch.manual_seed(0)
    build, place = build_of(fails_at=0.02), tmp_path_factory.mktemp("sweep")
    local_cluster.connect()
    (place / "here.txt").touch()
    space = {"lr": tune.grid_search([0.05, 0.02, 0.01, 0.03])}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("RAYLIT_TEST_SWEPT", "7")
        result = pl.sweep(
            build,
            space,
            metric="val_loss",
            num_workers=2,
            max_concurrent=1,
            max_epochs=2,
            default_root_dir=place,
            name="rates",
            **QUIET,
        )
    return result, left_on_the_node(), build


def test_trials_and_their_workers_have_the_settings_of_the_drivers_process(swept):
    metrics = swept[0].trials[0].metrics
    assert (metrics["has_file"], metrics["variable"]) == (1.0, 7.0)


def test_each_trial_has_the_result_of_a_plain_fit_with_its_config(swept, quiet):
    result, _, build = swept
    for trial in result.trials:
        if trial.error is None:
            torch.manual_seed(0)
            module, _ = build(trial.config)
            # The batches of both workers in one process.
            data = RegressionData(batch_size=16)
            trainer = pl.fit(module, datamodule=data, num_workers=0, max_epochs=2, log_every_n_steps=1, **quiet)
            assert trial.metrics["val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item())
            assert [report["step"] for report in trial.history] == [3, 6]
            assert trial.status == "finished"


def test_a_trial_reuses_warm_workers_even_after_a_failed_trial(swept):
    assert len({trial.metrics["process"] for trial in swept[0].trials if trial.error is None}) == 1


def test_trials_run_in_processes_that_ray_has_prestarted(swept):
    """Variables for its process alone cost a trial, and each of its workers, two more of Python's starts."""
    assert {trial.metrics["variables"] for trial in swept[0].trials if trial.error is None} == {0}


def test_a_failed_trial_does_not_end_the_others_and_shows_the_users_frames(swept):
    result = swept[0]
    assert [trial.status for trial in result.trials] == ["finished", "failed", "finished", "finished"]
    lines = result.errors[result.trials[1].id].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "test_sweep.py" in lines[1]
    assert lines[-1] == "ValueError: no such rate as 0.02"


def test_the_best_model_has_the_best_checkpoints_weights(swept):
    result = swept[0]
    rates = {trial.best("val_loss", "min"): trial.config["lr"] for trial in result.trials if trial.error is None}
    assert result.best_value == min(rates)
    assert result.best_config == {"lr": rates[min(rates)]}
    model = result.best_model
    assert model.hparams.lr == result.best_config["lr"]
    weights = torch.load(result.best_checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    trainer = pl.Trainer(num_workers=0, logger=False)
    (validated,) = trainer.validate(model, datamodule=RegressionData(), verbose=False)
    assert validated["val_loss"] == pytest.approx(result.best_value)


def test_rows_have_configs_and_metrics(swept):
    rows = swept[0].rows()
    assert [row["config/lr"] for row in rows] == [0.05, 0.02, 0.01, 0.03]
    assert rows[1]["status"] == "failed"
    assert swept[0].dataframe()["val_loss"].notna().tolist() == [True, False, True, True]


def test_a_sweep_leaves_no_processes_or_resources_on_the_node(swept):
    assert swept[1] == ([], [])


def test_a_sweep_with_the_name_of_an_existing_one_is_refused(swept):
    place = os.path.dirname(os.path.dirname(swept[0].directory))
    with pytest.raises(pl.ConfigError, match="holds a sweep already: say resume=True"):
        pl.sweep(swept[2], {}, metric="val_loss", name="rates", default_root_dir=place)


def test_resuming_a_sweep_with_another_space_is_refused(swept):
    place = os.path.dirname(os.path.dirname(swept[0].directory))
    with pytest.raises(pl.ConfigError, match="cannot be resumed: the space is another"):
        pl.sweep(
            swept[2], {"rate": 1.0}, metric="val_loss", name="rates", default_root_dir=place, resume=True, **QUIET
        )  # fmt: skip


def test_a_metric_that_is_never_logged_ends_the_sweep_at_its_first_result(tmp_path):
    from ray import tune

    trained = tmp_path / "trained"

    def build(config):
        class Model(Regression):
            def on_train_epoch_end(self):
                with open(trained, "a") as file:
                    file.write("epoch\n")

        return Model(), RegressionData()

    with pytest.raises(pl.ConfigError, match=r"metric='accuracy': .* there are: train_loss, val_loss\. Log it"):
        pl.sweep(
            build, {"lr": tune.uniform(0, 1)}, metric="accuracy", num_samples=3, num_workers=0, max_epochs=50,
            max_concurrent=1, default_root_dir=tmp_path, **QUIET,
        )  # fmt: skip
    assert trained.read_text() == "epoch\n"
    assert left_on_the_node() == ([], [])


def test_a_trial_waits_for_the_schedulers_decision(tmp_path):
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    def build(config):
        class Model(Regression):
            def validation_step(self, batch, batch_idx):
                self.log("loss", config["loss"])

            def on_train_epoch_start(self):
                self.log("begun", float(self.current_epoch))

        return Model(), RegressionData()

    result = pl.sweep(
        build,
        {"loss": tune.grid_search([1.0, 2.0, 3.0, 4.0])},
        metric="loss",
        num_workers=0,
        max_concurrent=1,
        max_epochs=4,
        scheduler=ASHAScheduler(max_t=4, grace_period=1, reduction_factor=2),
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **QUIET,
    )
    assert [trial.status for trial in result.trials] == ["finished", "stopped", "stopped", "stopped"]
    assert [len(trial.history) for trial in result.trials] == [4, 1, 1, 1]
    assert [trial.metrics["begun"] for trial in result.trials] == [3, 0, 0, 0]
    assert list(tmp_path.rglob("*.ckpt")) == []
    with pytest.raises(pl.ConfigError, match="kept no checkpoints"):
        _ = result.best_model


def test_a_trial_larger_than_the_cluster_is_refused_before_the_sweep():
    local_cluster.connect()
    cores = int(ray.cluster_resources()["CPU"])
    started = time.monotonic()
    with pytest.raises(pl.ResourcesError, match=rf"a trial needs {cores + 1} workers of 1 CPU each"):
        pl.sweep(build_of(), {"lr": 0.1}, metric="val_loss", num_workers=cores + 1, **QUIET)
    with pytest.raises(pl.ResourcesError, match="1 worker of 1 CPU, 1 magic"):
        find_trial_resources(Workers(num_workers=1, resources_per_worker={"magic": 1}), title="sweep")
    assert time.monotonic() - started < 60


def test_a_trials_own_process_takes_no_resources_besides_its_workers():
    assert TrialResources(workers=Workers(num_workers=2)).placement.bundles == [{"CPU": 1}, {"CPU": 1}]
    assert TrialResources(workers=Workers(num_workers=2)).placement.head_cpus == 0
    assert TrialResources(workers=Workers(num_workers=0)).placement.bundles == [{"CPU": 1}]
    hosts = TrialResources(workers=Workers(num_workers=4, num_nodes=2)).placement
    assert (hosts.bundles, hosts.strategy) == ([{"CPU": 2}] * 2, "STRICT_SPREAD")


def test_a_trials_own_process_runs_on_the_only_host_that_sees_the_directory():
    selected = Workers(num_workers=1, label_selector={"zone": "a"})
    here = TrialResources(workers=selected, home="node:10.0.0.1").placement
    assert here.bundles == [{"node:10.0.0.1": 0.001}, {"CPU": 1}]
    assert here._kwargs == {"bundle_label_selector": [{}, {"zone": "a"}]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"build": Regression}, "must be a function of a config"),
        ({"space": ["lr"]}, "space=.*must be a dict"),
        ({"metric": ""}, "metric=''"),
        ({"mode": "lowest"}, "mode='lowest': must be 'min' or 'max'"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"resume": True}, "resume=True needs the name"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"max_epoch": 1}, "max_epochs"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.sweep(**{"build": build_of(), "space": {}, "metric": "val_loss", **arguments})


def test_a_scheduler_with_a_metric_of_its_own_is_refused():
    from ray.tune.schedulers import ASHAScheduler

    with pytest.raises(pl.ConfigError, match=r"scheduler=AsyncHyperBandScheduler\(metric=...\): leave metric and mode"):
        pl.sweep(build_of(), {}, metric="val_loss", scheduler=ASHAScheduler(metric="val_loss", mode="min"))


@pytest.mark.slow
def test_a_sweep_without_free_resources_prints_what_it_waits_for(tmp_path, capfd):
    local_cluster.connect()
    group = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert group.wait(20)
    threading.Timer(4.0, lambda: ray.util.remove_placement_group(group)).start()
    result = pl.sweep(
        build_of(), {"lr": 0.1}, metric="val_loss", num_workers=0, max_epochs=1, default_root_dir=tmp_path, **QUIET
    )
    assert [trial.status for trial in result.trials] == ["finished"]
    lines = [line for line in capfd.readouterr().err.splitlines() if "waiting since" in line]
    assert len(lines) == 1
    assert "for room for a trial of 1 worker of 1 CPU each; free now: nothing" in lines[0]
