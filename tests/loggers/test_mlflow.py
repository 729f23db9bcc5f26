"""MLFlowLogger with a store on this host, through the mlflow package; runs are read back with its client."""

import math
import os
import sys

import pytest
import torch
from models import Regression, RegressionData

import raylit as pl

pytestmark = pytest.mark.filterwarnings("ignore")  # of the package's own dependencies


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pytest.importorskip("sqlalchemy")
    return pytest.importorskip("mlflow")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModuleNotFoundError, match=r"raylit\[mlflow\]"):
        pl.MLFlowLogger()


class Logged(Regression):
    def on_train_end(self):
        self.logger.experiment.log_metric(self.logger.version, "of client", 3.0)
        self.logger.log_metrics({"odd!name": torch.tensor(2.0)}, step=7)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_metrics_parameters_and_the_checkpoint_reach_the_run(num_workers, quiet, mlflow, tmp_path):
    logger = pl.MLFlowLogger("trials", run_name="first", tags={"kind": "test"}, log_model=True)
    quiet |= {"logger": logger, "enable_checkpointing": True}
    trainer = pl.fit(Logged(), RegressionData(), num_workers=num_workers, max_epochs=2, log_every_n_steps=2, **quiet)
    client = logger.experiment
    run = client.get_run(logger.run_id)
    assert run.data.params == {"width": "16", "dropout": "0.0", "lr": "0.05", "optimizer": "sgd"}
    assert run.data.metrics["val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert (run.data.metrics["of client"], run.data.metrics["oddname"]) == (3.0, 2.0)
    assert [point.step for point in client.get_metric_history(logger.run_id, "train_loss")] == [1, 3, 5, 7, 9, 11]
    assert (run.info.status, run.info.run_name, run.data.tags["kind"]) == ("FINISHED", "first", "test")
    assert client.get_experiment(logger.experiment_id).name == "trials"
    name = os.path.basename(trainer.checkpoint_callback.best_model_path)
    [folder] = client.list_artifacts(logger.run_id, "model/checkpoints")
    assert [file.path for file in client.list_artifacts(logger.run_id, folder.path)] == [f"{folder.path}/{name}"]
    assert logger.save_dir == str(tmp_path / "mlruns")


def test_a_failed_run_is_marked_so(quiet, mlflow):
    class Failing(Regression):
        def on_train_start(self):
            raise RuntimeError("broken")

    quiet["logger"] = logger = pl.MLFlowLogger()
    with pytest.raises(RuntimeError, match="broken"):
        pl.fit(Failing(), RegressionData(), max_epochs=1, **quiet)
    assert logger.experiment.get_run(logger.run_id).info.status == "FAILED"


def test_a_run_is_continued_by_its_id(mlflow):
    first = pl.MLFlowLogger()
    first.log_metrics({"x": 1.0}, step=0)
    second = pl.MLFlowLogger(run_id=first.run_id)
    second.log_metrics({"x": math.pi}, step=1)
    assert [point.value for point in first.experiment.get_metric_history(first.run_id, "x")] == [1.0, math.pi]
