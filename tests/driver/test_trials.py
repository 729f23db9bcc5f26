"""Trainers in real trials of Ray Tune and workers of Ray Train, on the session's node: resources, ends, leftovers."""

import os
import pathlib
import signal
import threading
import time

import pytest
import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from raylit.driver.ray import local_cluster, worker_pool

TESTS = str(pathlib.Path(__file__).parents[1])


@pytest.fixture
def node(tmp_path):
    """Run trials; trials that need all CPUs get them."""
    local_cluster.connect()
    worker_pool.clear()
    # Tune installs them and does not restore the old ones.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}

    def run(function, configs, *, room=None, **settings):
        trainable = tune.with_resources(function, room) if room else function
        return tune.Tuner(
            trainable,
            param_space={"case": tune.grid_search(configs)},
            tune_config=tune.TuneConfig(max_concurrent_trials=1, **settings),
            run_config=tune.RunConfig(storage_path=str(tmp_path / "results"), verbose=0),
        ).fit()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def training(**arguments):
    """Return a function for Tune and Train to run that does not refer to this module, which they cannot import."""
    tests = TESTS

    def train(config):
        import os
        import sys
        import time

        sys.path.insert(0, tests)
        from models import Regression, RegressionData

        import raylit as pl

        config = config.get("case", config)

        class Model(Regression):
            def on_train_epoch_end(self):
                self.log("process", float(os.getpid()))
                self.log("rate", self.hparams.lr)
                time.sleep(config.get("epoch_s", 0.0))

        switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        quiet = dict.fromkeys(switches, False)
        given = {**quiet, **arguments, "callbacks": config.get("callbacks")}
        trainer = pl.Trainer(max_epochs=3, start_timeout_s=100, **given)
        trainer.fit(Model(lr=config.get("lr", 0.01)), RegressionData())

    return train


def living():
    actors = ray._private.state.actors().values()
    return [state["ActorClassName"] for state in actors if state["State"] in ("ALIVE", "PENDING_CREATION")]


def left_over():
    """Return the numbers of actors and placement groups, once those that are ending are gone."""
    deadline = time.monotonic() + 20
    while True:
        actors = living()
        groups = [entry for entry in ray.util.placement_group_table().values() if entry["state"] != "REMOVED"]
        if not (actors or groups) or time.monotonic() > deadline:
            return actors, groups
        time.sleep(0.1)


def test_trials_share_their_cpus_with_their_workers_and_leave_nothing_behind(node):
    rates = [{"lr": 1e-6}, {"lr": 0.1}, {"lr": 1e-7}]
    scheduler = AsyncHyperBandScheduler(max_t=3, grace_period=1, reduction_factor=2)
    results = node(
        training(num_workers=2, resources_per_worker={"CPU": 0.5}),
        rates,
        metric="rate",  # which no start of the weights changes
        mode="min",
        scheduler=scheduler,
        reuse_actors=True,
    )
    assert [result.error for result in results] == [None] * 3
    assert results[0].metrics["training_iteration"] == 3
    assert results[1].metrics["training_iteration"] < 3  # as the scheduler said
    assert results[2].metrics["process"] == results[0].metrics["process"]  # the same, pooled worker
    assert left_over() == ([], [])


@pytest.mark.slow
def test_a_killed_trial_takes_its_workers_with_it(node, tmp_path):
    pids = tmp_path / "pids"
    train = training(num_workers=2, resources_per_worker={"CPU": 0.5})

    def trial(config):
        import os

        with open(pids, "w") as file:
            file.write(str(os.getpid()))
        train(config)

    def kill():
        deadline = time.monotonic() + 60
        while living().count("WorkerActor") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(int(pids.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results = node(trial, [{"epoch_s": 60.0}])
    killer.join()
    assert results.num_errors == 1
    assert left_over() == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_train_worker_reports_and_continues_after_a_failure(node, tmp_path):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    train, failed = training(num_workers=1, enable_checkpointing=True), str(tmp_path / "failed")

    def loop(config):
        import os

        import raylit as pl

        class FailsOnce(pl.DriverCallback):
            def on_train_epoch_start(self, run):
                if run.state.progress.epoch == 2 and not os.path.exists(failed):
                    open(failed, "w").close()
                    raise RuntimeError("on purpose")

        train({"callbacks": FailsOnce(), **config})

    result = TorchTrainer(
        loop,
        train_loop_config={},
        # The worker's own CPU, which raylit's worker uses.
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(tmp_path / "results"), failure_config=FailureConfig(max_failures=1)),
    ).fit()
    assert (result.metrics["epoch"], result.metrics["step"]) == (2, 18)
    assert len(result.best_checkpoints) == 3  # two before the failure and one after it
    with result.checkpoint.as_directory() as directory:
        assert os.listdir(directory) != []
