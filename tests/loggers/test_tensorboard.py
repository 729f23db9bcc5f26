"""Event files, read back with TensorBoard's own reader."""

import copy
import os
import pathlib
import pickle
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from raylit.errors import ConfigError
from raylit.loggers import TensorBoardLogger


def read(logger: TensorBoardLogger) -> EventAccumulator:
    return EventAccumulator(logger.log_dir).Reload()


def scalars(logger: TensorBoardLogger) -> dict[str, list[tuple[int, float]]]:
    events = read(logger)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hparams(logger: TensorBoardLogger) -> dict[str, Any]:
    content = read(logger).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def test_values_are_logged_at_their_steps(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in (0, 49, 99):
        logger.log_metrics({"train/loss": 1.0 / (step + 1), "epoch": 0}, step)
    logger.log_metrics({"val_loss": 0.25}, 99)
    logger.finalize("success")
    assert scalars(logger) == {
        "train/loss": [(0, 1.0), (49, pytest.approx(0.02)), (99, pytest.approx(0.01))],
        "epoch": [(0, 0.0), (49, 0.0), (99, 0.0)],
        "val_loss": [(99, 0.25)],
    }


def test_save_makes_everything_readable_during_the_run(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    assert scalars(logger) == {"loss": [(0, 1.0)]}
    logger.log_metrics({"loss": 0.5}, 1)
    logger.finalize("success")
    assert scalars(logger) == {"loss": [(0, 1.0), (1, 0.5)]}


def test_logging_continues_after_finalize(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"test_loss": 2.0}, 10)
    logger.finalize("success")
    assert scalars(logger) == {"loss": [(0, 1.0)], "test_loss": [(10, 2.0)]}


def test_a_given_version_is_continued(tmp_path: pathlib.Path) -> None:
    for step in range(2):
        logger = TensorBoardLogger(tmp_path, version=0)
        logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("success")
    # Files of one second are read in the order of a counter's digits: 10 before 9.
    assert {name: sorted(values) for name, values in scalars(logger).items()} == {"loss": [(0, 0.0), (1, 1.0)]}


def test_hyperparameters_reach_the_hparams_page(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 8, "act": "relu"}, "sizes": [1, 2], "x": None, "bias": True})
    logger.log_metrics({"loss": 1.0}, 5)
    logger.finalize("success")
    assert hparams(logger) == {
        "lr": 0.1,
        "net/width": 8.0,
        "net/act": "relu",
        "sizes": "[1, 2]",
        "x": "None",
        "bias": True,
    }
    assert scalars(logger) == {"hp_metric": [(0, -1.0)], "loss": [(5, 1.0)]}
    # TensorBoard reads on in the newest file only, so there must not be a second one.
    assert len([name for name in os.listdir(logger.log_dir) if "tfevents" in name]) == 1


def test_given_metrics_replace_hp_metric(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1}, {"val_loss": 3.0})
    logger.finalize("success")
    assert hparams(logger) == {"lr": 0.1}
    assert scalars(logger) == {"val_loss": [(0, 3.0)]}


def test_without_default_hp_metric_only_the_yaml_file_is_written(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1})
    assert os.listdir(logger.log_dir) == ["hparams.yaml"]


def test_a_copy_opens_a_writer_of_its_own(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    writer = logger.experiment
    for other in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        assert other.log_dir == logger.log_dir
        assert other.experiment is not writer
        other.finalize("success")
    assert logger.experiment is writer
    logger.finalize("success")


def test_prefix_and_writer_options_are_passed_on(tmp_path: pathlib.Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="fold1", filename_suffix=".mine")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert scalars(logger) == {"fold1-loss": [(0, 1.0)]}
    assert all(name.endswith(".mine") for name in os.listdir(logger.log_dir))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_the_graph_is_logged_with_log_graph(tmp_path: pathlib.Path) -> None:
    model = torch.nn.Linear(2, 1)
    TensorBoardLogger(tmp_path, version="off").log_graph(model)
    logger = TensorBoardLogger(tmp_path, version="on", log_graph=True)
    with pytest.raises(ConfigError, match="example_input_array"):
        logger.log_graph(model)
    logger.log_graph(model, torch.zeros(1, 2))
    logger.finalize("success")
    assert read(logger).Tags()["graph"]
