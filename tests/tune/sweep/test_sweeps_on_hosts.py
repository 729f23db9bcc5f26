"""Sweeps over several hosts, under an autoscaler, and at s3://."""

import os
import sys

import pytest
from buckets import Server
from hosts import CHECKOUT, NETCLUSTER, run_on_two_hosts
from models import Regression, RegressionData

import raylit as pl

TESTS = str(CHECKOUT / "tests")
SCALING = CHECKOUT.parent / "shared" / "autoscaling"

HOSTS = """
import os, socket, sys, threading, time
sys.path[:0] = [{tests!r}, {netcluster!r}]
from models import Regression, RegressionData
from netcluster import call
from ray import tune
import raylit as pl

FLAG = {flag!r}  # which both hosts see

def build(config):
    class Placed(Regression):
        def on_train_epoch_end(self):
            host = socket.gethostname()
            self.log("host", float(host[1:]))
            if host == "h1" and self.current_epoch == 1 and not os.path.exists(FLAG):
                open(FLAG, "w").close()
                time.sleep(60)  # killed meanwhile
    return Placed(lr=config["lr"]), RegressionData()

class Where(pl.DriverCallback):
    def on_start(self, run):
        assert socket.gethostname() == "h0"

def kill():
    while not os.path.exists(FLAG):
        time.sleep(0.1)
    call("kill_host", 1)

threading.Thread(target=kill, daemon=True).start()
result = pl.sweep(
    build, {{"lr": tune.grid_search([0.1, 0.01, 0.001])}}, metric="val_loss", num_workers=1, max_epochs=3,
    max_failures=1, default_root_dir="/tmp/only-here", callbacks=Where(), ping_timeout_s=5, logger=False,
)
hosts = set()
for trial in result.trials:
    assert (trial.status, [report["epoch"] for report in trial.history]) == ("finished", [0, 1, 2]), trial
    hosts |= {{report["host"] for report in trial.history}}
assert hosts == {{0, 1}}
assert os.path.exists(result.best_checkpoint)
print("BEST", type(result.best_model).__name__)
"""


@pytest.mark.cluster
def test_workers_run_on_any_host_and_may_die_if_only_the_drivers_host_sees_the_directory(tmp_path):
    source = HOSTS.format(tests=TESTS, netcluster=str(NETCLUSTER), flag=str(tmp_path / "flag"))
    output = run_on_two_hosts(source, tmp_path, detect="fast")
    assert "BEST Placed" in output
    assert "other hosts may not see /tmp/only-here/sweeps/" in output
    assert (
        "is tried again, from its newest checkpoint (1 of 1): raylit.errors.WorkerDied: worker of rank 0 on" in output
    )


AUTOSCALED = """
import os, sys
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
sys.path[:0] = [{tests!r}, {scaling!r}]
import ray
from fake_cluster import FakeAutoscalingCluster
from models import Regression, RegressionData
import raylit as pl

def build(config):
    return Regression(), RegressionData()

def sweep(cpus):
    return pl.sweep(build, {{}}, metric="val_loss", num_workers=1, resources_per_worker={{"CPU": cpus}}, max_epochs=1,
                    default_root_dir="runs", name=f"cpus-{{cpus}}", logger=False)

with FakeAutoscalingCluster(head={{"CPU": 1}}, workers={{"cpu2": ({{"CPU": 2}}, 1)}}) as scaled:
    ray.init(address=scaled.address, logging_level="WARNING", log_to_driver=False)
    try:
        try:
            sweep(64)
        except pl.ResourcesError as error:
            assert "at most (1 cpu2 of 2 CPU) there is room for 0 such workers" in str(error), error
        else:
            raise AssertionError("it was placed")
        assert not os.path.exists("runs"), os.listdir("runs")
        result = sweep(2)
        assert [trial.status for trial in result.trials] == ["finished"]
        print("through")
    finally:
        ray.shutdown()  # before the cluster goes: Ray would look for it for a minute
"""


@pytest.mark.cluster
def test_a_sweep_waits_for_the_autoscaler_unless_its_limits_are_too_small(tmp_path, run_script, monkeypatch):
    if not SCALING.is_dir():
        pytest.skip(f"needs {SCALING}")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert "through" in run_script(AUTOSCALED.format(tests=TESTS, scaling=str(SCALING)))


@pytest.fixture
def bucket(monkeypatch):
    server = Server()
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(server.bucket)
    pl.shutdown()  # the node's processes have the environment that it started in
    yield f"s3://{server.bucket}"
    pl.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_at_a_url_is_resumed_and_writes_checkpoints_figures_and_hparams_there(bucket, tmp_path):
    import s3fs
    from ray import tune

    flag, tests = str(tmp_path / "flag"), TESTS

    def build(config):
        sys.path.insert(0, tests)
        from models import Regression, RegressionData

        if config["lr"] == 0.1 and not os.path.exists(flag):
            raise ValueError("not yet")
        return Regression(lr=config["lr"]), RegressionData()

    def sweep():
        return pl.sweep(
            build, {"lr": tune.grid_search([0.1, 0.01])}, metric="val_loss", max_epochs=2, default_root_dir=bucket,
            name="rates", resume=True,
        )  # fmt: skip

    assert [trial.status for trial in sweep().trials] == ["failed", "finished"]
    open(flag, "w").close()
    result = sweep()
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    assert result.best_checkpoint.startswith(f"{bucket}/sweeps/rates/trial_")
    trainer = pl.Trainer(num_workers=0, logger=False, enable_progress_bar=False)
    (validated,) = trainer.validate(result.best_model, datamodule=RegressionData(), verbose=False)
    assert validated["val_loss"] == pytest.approx(result.best_value)
    again = pl.Trainer(num_workers=0, max_epochs=3, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    again.fit(Regression(), RegressionData(), ckpt_path=result.best_checkpoint)
    assert again.current_epoch == 3
    names = {name.rpartition("/")[2].split(".")[0] for name in s3fs.S3FileSystem().ls(f"{bucket}/sweeps/rates")}
    assert {"objective", "parallel", "events", "tuner"} <= names
    assert os.listdir(tmp_path) == ["flag"]
