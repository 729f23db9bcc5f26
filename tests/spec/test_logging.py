"""The quick-start page's section on logging and the progress bar: what the loggers get, and how it is looked at."""

import csv
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from hosts import CHECKOUT, run_on_two_hosts
from models import Regression, RegressionData, make_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl

WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


def events(directory):
    """Everything: not a sample of it, as the reader keeps by default."""
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    return EventAccumulator(str(directory), size_guidance=everything).Reload()


def scalars(directory, name):
    return [(event.step, event.value) for event in events(directory).Scalars(name)]


def columns(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def logged(quiet):
    """Arguments for a run that logs every step, and does nothing else."""
    del quiet["logger"]
    return {**quiet, "log_every_n_steps": 1, "max_epochs": 2, "num_sanity_val_steps": 0}


class LogKey(Regression):
    """The page's "log reserved key"."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        return {"loss": loss, "log": {"train_loss": loss}}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": functional.mse_loss(self(x), y), "acc": torch.tensor(0.5)}

    def validation_epoch_end(self, validation_step_outputs):
        loss = torch.stack([output["loss"] for output in validation_step_outputs]).mean()
        acc = torch.stack([output["acc"] for output in validation_step_outputs]).mean()
        return {"val_loss": loss, "log": {"avg_val_loss": loss, "avg_val_acc": acc}}


class Result(Regression):
    """The page's result objects."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        result = pl.TrainResult(minimize=loss)
        result.log("train_loss", loss)
        return result

    def validation_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        result = pl.EvalResult(checkpoint_on=loss)
        result.log("avg_val_loss", loss)
        result.log("avg_val_acc", torch.tensor(0.5))
        return result


@WORKERS
@pytest.mark.parametrize("kind", [LogKey, Result])
def test_the_pages_forms_reach_tensorboard_in_lightning_logs(kind, num_workers, logged, tmp_path):
    data = RegressionData(batch_size=8 // max(1, num_workers), num_val=24)
    trainer = pl.fit(kind(), data, num_workers=num_workers, **logged)
    assert trainer.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    losses = scalars(trainer.log_dir, "train_loss")
    assert [step for step, _ in losses] == list(range(12))
    assert losses[-1][1] < losses[0][1]
    assert [step for step, _ in scalars(trainer.log_dir, "avg_val_loss")] == [5, 11]
    assert scalars(trainer.log_dir, "avg_val_acc") == [(5, 0.5), (11, 0.5)]


class Looking(Regression):
    """Pictures and distributions from hooks, as users write them."""

    example_input_array = torch.zeros(1, 8)

    def training_step(self, batch, batch_idx):
        if self.trainer.is_global_zero and batch_idx % 3 == 0:
            self.logger.experiment.add_histogram("weights", self.net[0].weight, self.global_step)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        board = self.logger.experiment
        board.add_image("image", torch.full((3, 4, 4), 0.5), self.current_epoch)
        board.add_text("text", f"epoch {self.current_epoch}", self.current_epoch)
        board.add_scalars("pair", {"a": 1.0, "b": 2.0}, self.current_epoch)
        board.add_embedding(torch.rand(4, 3), global_step=self.current_epoch)


@WORKERS
def test_hooks_reach_the_experiment_and_tensorboard_shows_it(num_workers, logged):
    logger = pl.TensorBoardLogger(log_graph=True)
    data = RegressionData(8 // max(1, num_workers))
    trainer = pl.fit(Looking(), data, num_workers=num_workers, logger=logger, **logged)
    board = events(trainer.log_dir)
    assert [event.step for event in board.Images("image")] == [0, 1]
    assert [event.step for event in board.Histograms("weights")] == [0, 3, 6, 9]
    assert [event.step for event in board.Tensors("text/text_summary")] == [0, 1]
    assert board.Tags()["graph"]
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (hparams["width"].number_value, hparams["optimizer"].string_value) == (16.0, "sgd")
    assert scalars(trainer.log_dir, "hp_metric") == [(0, -1.0)]
    with open(os.path.join(trainer.log_dir, "hparams.yaml")) as file:
        assert yaml.safe_load(file) == {"width": 16, "dropout": 0.0, "lr": 0.05, "optimizer": "sgd"}
    assert os.path.isdir(os.path.join(trainer.log_dir, "pair_a"))
    assert os.path.isfile(os.path.join(trainer.log_dir, "projector_config.pbtxt"))


@WORKERS
def test_figures_are_drawn_and_closed(num_workers, logged):
    pytest.importorskip("matplotlib").use("Agg")

    class Drawing(Regression):
        def on_train_end(self):
            from matplotlib import pyplot

            figure = pyplot.figure()
            figure.add_subplot().plot([1, 2])
            self.logger.experiment.add_figure("figure", figure, 7)
            self.open_figures = pyplot.get_fignums()

    model = Drawing()
    trainer = pl.fit(model, RegressionData(8), num_workers=num_workers, **logged)
    assert [event.step for event in events(trainer.log_dir).Images("figure")] == [7]
    assert model.open_figures == []


@WORKERS
def test_hyperparameters_with_a_metric_of_ones_own(num_workers, logged):
    class Own(Regression):
        def on_train_start(self):
            self.logger.log_hyperparams(self.hparams, {"hp/best": 0.0})

        def on_validation_epoch_end(self):
            self.log("hp/best", float(self.current_epoch))

    logger = pl.TensorBoardLogger(default_hp_metric=False)
    trainer = pl.fit(Own(), RegressionData(8), num_workers=num_workers, logger=logger, **logged)
    assert "hp_metric" not in events(trainer.log_dir).Tags()["scalars"]
    assert [value for _, value in scalars(trainer.log_dir, "hp/best")] == [0.0, 0.0, 1.0]


@WORKERS
def test_several_loggers_get_the_same(num_workers, logged, tmp_path):
    loggers = [pl.TensorBoardLogger(), pl.CSVLogger("table", name="runs", version="first")]
    data = RegressionData(8 // max(1, num_workers))
    trainer = pl.fit(Regression(), data, num_workers=num_workers, logger=loggers, **logged)
    rows = columns(tmp_path / "table" / "runs" / "first" / "metrics.csv")
    losses = [(int(row["step"]), float(row["train_loss"])) for row in rows if row["train_loss"]]
    assert losses == [(step, pytest.approx(value)) for step, value in scalars(trainer.log_dir, "train_loss")]
    assert len(losses) == 12
    assert [row["step"] for row in rows if row["val_loss"]] == ["5", "11"]
    assert [row["epoch"] for row in rows if row["val_loss"]] == ["0", "1"]
    assert (tmp_path / "table" / "runs" / "first" / "hparams.yaml").is_file()
    assert trainer.logger is loggers[0]
    assert trainer.loggers == loggers


@pytest.mark.parametrize(("logger", "kinds"), [(False, []), (True, [pl.TensorBoardLogger]), ([], [])])
def test_the_argument_logger(logger, kinds):
    trainer = pl.Trainer(logger=logger)
    assert [type(each) for each in trainer.loggers] == kinds


@pytest.mark.parametrize("logger", ["tensorboard", [pl.CSVLogger(), 3]])
def test_what_is_no_logger_is_refused(logger):
    with pytest.raises(pl.ConfigError, match="must be True, False, a Logger or a list of them"):
        pl.Trainer(logger=logger)


def test_a_logger_of_the_users_own_works():
    class Own(pl.Logger):
        """With what Lightning's interface asks for, and no more."""

        def __init__(self):
            super().__init__()
            self.rows, self.params, self.told = [], {}, []

        @property
        def name(self):
            return "own"

        @property
        def version(self):
            return "0.1"

        def log_hyperparams(self, params):
            self.params.update(params)

        def log_metrics(self, metrics, step):
            self.rows.append((step, metrics["epoch"]))

        def save(self):
            self.told.append("save")

        def finalize(self, status):
            self.told.append(status)

    logger = Own()
    pl.fit(
        Regression(),
        RegressionData(),
        num_workers=1,
        logger=logger,
        max_epochs=2,
        log_every_n_steps=3,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    assert logger.rows == [(2, 0.0), (5, 0.0), (5, 0.0), (8, 1.0), (11, 1.0), (11, 1.0), (11, 1.0)]
    assert logger.params["lr"] == 0.05
    assert logger.told == ["save", "save", "success"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_nothing_logged_is_lost_at_ctrl_c(num_workers, logged, tmp_path):
    class Interrupted(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.logger.experiment.add_scalar("own", float(batch_idx), batch_idx)
            self.num_done = batch_idx + 1
            if batch_idx == 5:
                Path(tmp_path, "now").touch()
            time.sleep(0.02)

        def on_exception(self, error):
            self.logger.experiment.add_text("why", type(error).__name__)

    def interrupt():
        deadline = time.monotonic() + 60
        while not Path(tmp_path, "now").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    model = Interrupted()
    loader = DataLoader(make_data(8000), batch_size=4)
    trainer = pl.Trainer(num_workers=num_workers, limit_val_batches=0, **logged)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(model, loader)
    thread.join()
    assert 5 < model.num_done < 900
    assert [step for step, _ in scalars(trainer.log_dir, "own")] == list(range(model.num_done))
    assert len(scalars(trainer.log_dir, "train_loss")) == model.num_done
    assert len(events(trainer.log_dir).Tensors("why/text_summary")) == 1


SCRIPT = """
import os, socket, sys
sys.path.insert(0, {tests!r})
import torch
from models import Regression, RegressionData
import raylit as pl

class Far(Regression):
    def on_train_start(self):
        self.host = socket.gethostname()
        self.sees_logs = os.path.exists(self.logger.log_dir)
        self.logger.experiment.add_image("image", torch.full((3, 64, 64), 0.5), 3)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logger.experiment.add_scalar("own", batch_idx, self.global_step)

model = Far()
logger = pl.TensorBoardLogger("/tmp/logs-of-h0")
trainer = pl.fit(
    model, RegressionData(8), num_workers=1, label_selector={{}}, resources_per_worker={{"h1": 1}}, max_epochs=2,
    logger=logger, enable_progress_bar=False,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
board = EventAccumulator(trainer.log_dir).Reload()
print("HOST", model.host, model.sees_logs)
print("STEPS", [event.step for event in board.Scalars("own")], [event.step for event in board.Images("image")])
"""


@pytest.mark.cluster
def test_a_worker_on_another_host_without_a_shared_disk_reaches_the_experiment(tmp_path):
    output = run_on_two_hosts(SCRIPT.format(tests=str(CHECKOUT / "tests")), tmp_path)
    assert "HOST h1 False" in output
    assert f"STEPS {list(range(1, 13))} [3]" in output


@WORKERS
def test_a_fast_dev_run_writes_nothing_and_its_hooks_may_log(num_workers, tmp_path):
    class Logs(Looking):
        def on_train_start(self):
            self.logger.log_hyperparams({"x": 1})
            self.logger.log_image("images", [1])
            self.logger.experiment.config["x"] = 1
            self.kept = self.logger.experiment

    trainer = pl.fit(Logs(), RegressionData(4), num_workers=num_workers, fast_dev_run=True)
    assert trainer.logger is not None
    assert list(tmp_path.iterdir()) == []


def test_a_fast_dev_run_without_loggers_has_none():
    assert pl.Trainer(fast_dev_run=True, logger=False).loggers == []
