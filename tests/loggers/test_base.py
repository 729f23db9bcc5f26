"""Directories, versions and hparams.yaml of the loggers that write files."""

import enum
import multiprocessing
import os
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raylit.errors import ConfigError
from raylit.loggers import CSVLogger, TensorBoardLogger
from raylit.loggers.base import FileLogger
from raylit.storage import read_text

BOTH = pytest.mark.parametrize("logger_class", [CSVLogger, TensorBoardLogger])


class Color(enum.Enum):
    RED = 1


@BOTH
def test_version_is_the_next_free_number(logger_class: type[FileLogger], tmp_path: pathlib.Path) -> None:
    for taken in ("version_0", "version_7", "version_old", "other_9"):
        (tmp_path / "lightning_logs" / taken).mkdir(parents=True)
    logger = logger_class(tmp_path)
    assert logger.version == 8
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_8")
    assert os.path.isdir(logger.log_dir)
    assert logger_class(tmp_path).version == 9


@BOTH
def test_no_directory_is_created_before_it_is_needed(logger_class: type[FileLogger], tmp_path: pathlib.Path) -> None:
    logger = logger_class(tmp_path)
    logger.bind("/elsewhere")
    assert (logger.name, logger.save_dir) == ("lightning_logs", str(tmp_path))
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


@BOTH
@pytest.mark.parametrize(("version", "directory"), [(3, "version_3"), ("baseline", "baseline")])
def test_a_given_version_is_used_as_it_is(
    logger_class: type[FileLogger], version: int | str, directory: str, tmp_path: pathlib.Path
) -> None:
    for _ in range(2):
        assert logger_class(tmp_path, name="runs", version=version).log_dir == str(tmp_path / "runs" / directory)


@BOTH
@pytest.mark.parametrize("name", ["", None])
def test_without_a_name_the_versions_are_in_save_dir(
    logger_class: type[FileLogger], name: str | None, tmp_path: pathlib.Path
) -> None:
    assert logger_class(tmp_path, name=name).log_dir == str(tmp_path / "version_0")


def test_sub_dir_is_below_the_version(tmp_path: pathlib.Path) -> None:
    assert TensorBoardLogger(tmp_path, sub_dir="train").log_dir == str(
        tmp_path / "lightning_logs" / "version_0" / "train"
    )


@BOTH
def test_save_dir_comes_from_the_trainer_when_not_given(logger_class: type[FileLogger], tmp_path: pathlib.Path) -> None:
    logger = logger_class()
    with pytest.raises(ConfigError, match="give it a save_dir"):
        _ = logger.log_dir
    logger.bind(str(tmp_path))
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    logger.bind("/elsewhere")  # a second Trainer does not move the files
    assert logger.save_dir == str(tmp_path)


@BOTH
def test_versions_at_a_url_are_counted(logger_class: type[FileLogger], tmp_path: pathlib.Path) -> None:
    url = f"memory://{tmp_path}/logs"
    for version in (0, 1):
        logger = logger_class(url)
        logger.log_hyperparams({"lr": 0.1})
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.finalize("success")
        assert logger.log_dir == f"{url}/lightning_logs/version_{version}"
    assert read_text(f"{logger.log_dir}/hparams.yaml") == "lr: 0.1\n"


def _claim(save_dir: str, barrier: Any, versions: Any) -> None:
    logger = CSVLogger(save_dir)
    barrier.wait(timeout=30)
    versions.put(logger.version)


def test_processes_that_start_at_once_get_different_versions(tmp_path: pathlib.Path) -> None:
    context = multiprocessing.get_context("fork")
    count = 8
    barrier, versions = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_claim, args=(str(tmp_path), barrier, versions)) for _ in range(count)]
    for process in processes:
        process.start()
    claimed = [versions.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    assert sorted(claimed) == list(range(count))


@BOTH
def test_hparams_yaml_holds_plain_values(logger_class: type[FileLogger], tmp_path: pathlib.Path) -> None:
    logger = logger_class(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "layers": (1, 2), "data": {"root": "/d", "seed": None}, "shuffle": True})
    logger.log_hyperparams({"width": np.int64(8), "decay": np.float32(0.5), "act": torch.nn.ReLU(), "hue": Color.RED})
    with open(os.path.join(logger.log_dir, "hparams.yaml"), encoding="utf-8") as file:
        assert yaml.safe_load(file) == {
            "lr": 0.1,
            "layers": [1, 2],
            "data": {"root": "/d", "seed": None},
            "shuffle": True,
            "width": 8,
            "decay": 0.5,
            "act": "ReLU()",
            "hue": "<Color.RED: 1>",
        }
    logger.finalize("success")


@pytest.mark.parametrize("option", ["name", "version"])
@pytest.mark.parametrize("value", ["../../x", "a/../../x", "/tmp/x", ".."])
def test_a_name_or_version_does_not_lead_out_of_the_save_dir(option, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"CSVLogger\({option}='.*'\) leads out of the directory"):
        CSVLogger(tmp_path, **{option: value})


def test_names_may_contain_directories(tmp_path):
    assert CSVLogger(tmp_path, "a/b", "c..d").log_dir == str(tmp_path / "a" / "b" / "c..d")
