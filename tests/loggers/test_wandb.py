"""WandbLogger in offline mode, through the wandb package; its runs are read back from their files."""

import json
import pathlib
import sys

import numpy as np
import pytest
from models import Regression, RegressionData

import raylit as pl

SETTINGS = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}


@pytest.fixture
def wandb(monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    package = pytest.importorskip("wandb")
    yield package
    package.finish()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"raylit\[wandb\]"):
        pl.WandbLogger()


def test_a_run_that_is_offline_cannot_upload_checkpoints(wandb):
    with pytest.raises(pl.ConfigError, match="offline"):
        pl.WandbLogger(offline=True, log_model=True)


class Logged(Regression):
    def on_train_start(self):
        import wandb

        image = wandb.Image(np.zeros((8, 8, 3), dtype=np.uint8), caption="black")
        self.logger.experiment.log({"image": image, "histogram": wandb.Histogram([1.0, 2.0])})
        grey = [np.full((8, 8), value, dtype=np.uint8) for value in (90, 180)]
        self.logger.log_image("images", grey, caption=["one", "two"])
        self.logger.log_table("table", columns=["a"], data=[[1], [2]])
        self.logger.experiment.summary["best"] = 0.5
        self.seen = (isinstance(self.logger, pl.WandbLogger), self.logger.name, self.logger.version)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_metrics_hyperparameters_and_media_of_hooks_reach_the_run(num_workers, quiet, wandb, tmp_path):
    logger = pl.WandbLogger(project="p", name="run", offline=True, save_dir=tmp_path / "logs", prefix="a")
    model, quiet["logger"] = Logged(), logger
    trainer = pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=2, log_every_n_steps=2, **quiet)
    run = logger.experiment
    assert model.seen == (True, "p", run.id)
    assert trainer.log_dir == str(tmp_path / "logs" / "p" / run.id)
    assert dict(run.config) == {"width": 16, "dropout": 0.0, "lr": 0.05, "optimizer": "sgd"}
    summary = run.summary
    assert summary["a-val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert (summary["trainer/global_step"], summary["a-epoch"], summary["best"]) == (11, 1, 0.5)
    files = pathlib.Path(run.dir)
    assert len(list((files / "media" / "images").glob("image_*.png"))) == 1
    assert len(list((files / "media" / "images").glob("a-images_*.png"))) == 2
    [table] = (files / "media" / "table").glob("a-table*.json")
    assert json.loads(table.read_text())["data"] == [[1], [2]]


def test_a_run_that_the_script_has_started_is_used(wandb, tmp_path):
    run = wandb.init(mode="offline", dir=tmp_path)
    logger = pl.WandbLogger()
    logger.log_metrics({"x": 1.0}, step=3)
    assert logger.experiment is run
    assert run.summary["x"] == 1.0


class FakeRun:
    """What wandb's run takes of a checkpoint: uploads need a server."""

    id = "abc"

    def __init__(self):
        self.artifacts = []

    def log_artifact(self, artifact, aliases):
        self.artifacts.append((artifact.name, artifact.metadata["original_filename"], aliases))

    def log(self, values): ...


@pytest.mark.parametrize(
    ("log_model", "expected"),
    [(False, []), (True, ["epoch=2-step=18.ckpt"]), ("all", [f"epoch={i}-step={6 * i + 6}.ckpt" for i in range(3)])],
)
def test_checkpoints_become_artifacts(log_model, expected, quiet, wandb, tmp_path):
    run = FakeRun()
    quiet |= {
        "logger": pl.WandbLogger(experiment=run, log_model=log_model),
        "enable_checkpointing": pl.ModelCheckpoint(tmp_path, monitor="epoch_number", mode="max"),
    }

    class Counted(Regression):
        def on_validation_epoch_end(self):
            self.log("epoch_number", float(self.current_epoch))

    model = Counted()
    model._is_logging_hparams = False
    pl.fit(model, RegressionData(), max_epochs=3, **quiet)
    assert [(name, file) for name, file, _ in run.artifacts] == [("model-abc", file) for file in expected]
    assert {"best"} <= set(run.artifacts[-1][2]) if expected else True


def test_a_version_of_0_is_the_runs_id(wandb):
    assert pl.WandbLogger(version=0, offline=True).version == "0"
