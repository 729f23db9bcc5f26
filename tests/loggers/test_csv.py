"""metrics.csv: content, growing header, continuation, buffering."""

import copy
import csv
import os
import pathlib
import pickle

import pytest

from raylit.errors import ConfigError
from raylit.loggers import CSVLogger


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    with open(logger.metrics_file, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_call_is_a_row(tmp_path: pathlib.Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.1 + 0.2, "epoch": 0.0}, step=4)
    logger.log_metrics({"loss": float("nan"), "epoch": 1.0}, step=9)
    logger.finalize("success")
    assert rows_of(logger) == [
        {"step": "4", "loss": "0.30000000000000004", "epoch": "0"},
        {"step": "9", "loss": "nan", "epoch": "1"},
    ]


def test_the_header_grows_with_new_metrics(tmp_path: pathlib.Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"train, loss": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"val_loss": 2.0}, step=0)
    logger.log_metrics({"train, loss": 0.5, "lr": 0.1}, step=1)
    logger.save()
    logger.log_metrics({"val_loss": 1.5}, step=1)
    logger.save()
    assert rows_of(logger) == [
        {"step": "0", "train, loss": "1.0", "val_loss": "", "lr": ""},
        {"step": "0", "train, loss": "", "val_loss": "2.0", "lr": ""},
        {"step": "1", "train, loss": "0.5", "val_loss": "", "lr": "0.1"},
        {"step": "1", "train, loss": "", "val_loss": "1.5", "lr": ""},
    ]
    assert sorted(os.listdir(logger.log_dir)) == ["metrics.csv"]


def test_a_given_version_is_continued(tmp_path: pathlib.Path) -> None:
    for step, metrics in enumerate([{"loss": 1.0}, {"loss": 0.5, "lr": 0.1}]):
        logger = CSVLogger(tmp_path, version=2)
        logger.log_metrics(metrics, step)
        logger.finalize("success")
    assert rows_of(logger) == [{"step": "0", "loss": "1.0", "lr": ""}, {"step": "1", "loss": "0.5", "lr": "0.1"}]


def test_rows_are_written_every_n_steps(tmp_path: pathlib.Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    written = []
    for step in range(25):
        logger.log_metrics({"loss": float(step)}, step)
        written.append(len(rows_of(logger)) if os.path.exists(logger.metrics_file) else 0)
    assert written == [0] * 10 + [11] * 11 + [22] * 4
    logger.finalize("interrupted")
    assert [row["step"] for row in rows_of(logger)] == [str(step) for step in range(25)]


def test_a_flush_interval_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="flush_logs_every_n_steps=0"):
        CSVLogger(flush_logs_every_n_steps=0)


def test_a_copy_leaves_the_rows_to_the_original(tmp_path: pathlib.Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    assert logger.version == 0  # a copy of a logger without a version yet would get one of its own
    for other in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        assert other.log_dir == logger.log_dir
        other.log_metrics({"other": 2.0}, step=1)
        other.save()
    logger.save()
    assert [(row["step"], row["loss"]) for row in rows_of(logger)] == [("1", ""), ("1", ""), ("0", "1.0")]


def test_the_prefix_is_put_before_every_name(tmp_path: pathlib.Path) -> None:
    logger = CSVLogger(tmp_path, prefix="a")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    assert rows_of(logger) == [{"step": "0", "a-loss": "1.0"}]
