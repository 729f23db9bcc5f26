"""When checkpoints are written, how they are called, and which ones stay. A real file is written for each."""

import itertools
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint import files, index
from raylit.checkpoint.format import to_plain_values
from raylit.config import Plan, Validation
from raylit.errors import CheckpointError, ConfigError
from raylit.protocol.state import Progress, RunState


class RecordedRun:
    """Calls the hooks as a fit does, with metrics from a list, and writes real files."""

    def __init__(
        self,
        root: Path,
        callback: ModelCheckpoint,
        *,
        interval: float = 1.0,
        every_n_epochs: int = 1,
        has_validation: bool = True,
        is_dev_run: bool = False,
    ) -> None:
        validation = Validation(interval=interval, every_n_epochs=every_n_epochs)
        self.plan = Plan(validation=validation, is_dev_run=is_dev_run)
        self.state = RunState(stage="fit", has_validation=has_validation)
        self.loggers: list[Any] = []
        self.log_dir = str(root)
        self.saved: list[str] = []
        """File names, in the order in which they were written."""
        self.pauses: list[int] = []
        self.callback = callback

    def stop(self, reason: str) -> None:
        raise AssertionError("checkpointing stops nothing")

    def save_checkpoint(self, path: str, *, is_weights_only: bool = False, then: Any = None) -> None:
        checkpoint = {
            "state_dict": {},
            "global_step": self.state.progress.global_step,
            "is_weights_only": is_weights_only,
            "callbacks": to_plain_values({self.callback.state_key: self.callback.state_dict()}, "callbacks"),
        }
        files.write(checkpoint, path)
        self.saved.append(os.path.basename(path))
        then.carry_out()
        self.callback.on_save_end(self, path, None)

    def finish_saves(self, *, is_earlier_only: bool = False) -> None: ...

    def is_saving_to(self, path: str) -> bool:
        return False

    def fit(
        self,
        *,
        epochs: int,
        batches: int = 4,
        val_losses: Iterable[float] = (),
        train_losses: Iterable[float] = (),
        epoch_losses: Iterable[float] = (),
        seconds_per_batch: float = 0.0,
        max_steps: float = math.inf,
    ) -> None:
        """`train_losses` are logged at every step, `epoch_losses` ("epoch_loss") at the end of an epoch."""
        state, callback = self.state, self.callback
        vals, trains, ends = iter(val_losses), iter(train_losses), iter(epoch_losses)
        state.num_training_batches = batches
        callback.on_start(self)
        callback.on_train_start(self)
        while state.progress.epoch + state.progress.is_epoch_ended < epochs and state.progress.global_step < max_steps:
            epoch = state.progress.epoch + state.progress.is_epoch_ended
            wish = callback.next_pause_step(self)
            for batch in range(1, batches + 1):
                time.sleep(seconds_per_batch)
                step = state.progress.global_step + 1
                state.progress = Progress(epoch=epoch, batch=batch, global_step=step)
                self._log("train_loss", trains)
                is_over = batch == batches or step >= max_steps
                is_due = self._is_validation_due(epoch, batch)
                if is_over or is_due or (wish is not None and step >= wish):
                    self.pauses.append(step)
                    callback.on_train_pause(self)
                    if is_due:
                        self._validate(vals)
                    wish = callback.next_pause_step(self)
                if is_over:
                    break
            self._log("epoch_loss", ends)
            state.progress = Progress(epoch=epoch, batch=batch, global_step=step, is_epoch_ended=True)
            callback.on_train_epoch_end(self)
        callback.on_train_end(self)

    def _is_validation_due(self, epoch: int, batch: int) -> bool:
        interval, num_batches = self.plan.validation.interval, self.state.num_training_batches
        every = interval if isinstance(interval, int) else int(num_batches * interval)
        is_epoch = (epoch + 1) % self.plan.validation.every_n_epochs == 0
        return self.state.has_validation and is_epoch and batch % every == 0

    def _validate(self, values: Iterator[float]) -> None:
        self._log("val_loss", values)
        self.callback.on_validation_end(self)

    def _log(self, name: str, values: Iterator[float]) -> None:
        for value in itertools.islice(values, 1):
            self.state.callback_metrics[name] = value


def names(directory: str | Path) -> list[str]:
    """Without the index."""
    return sorted({*os.listdir(directory)} - {index.FILE_NAME}) if os.path.isdir(directory) else []


def step_of(path: str | Path) -> int:
    step: int = files.read(path)["global_step"]
    return step


# Where and under what name


def test_the_latest_is_kept_below_the_log_directory(tmp_path: Path) -> None:
    callback = ModelCheckpoint()
    run = RecordedRun(tmp_path / "version_0", callback)
    run.fit(epochs=3)
    assert run.saved == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]
    assert callback.dirpath == str(tmp_path / "version_0" / "checkpoints")
    assert names(callback.dirpath) == ["epoch=2-step=12.ckpt"]
    assert callback.best_model_path == callback.newest_model_path == f"{callback.dirpath}/epoch=2-step=12.ckpt"
    assert callback.best_model_score is None
    assert callback.last_model_path == ""


def test_a_given_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ModelCheckpoint("a/../b").dirpath == str(tmp_path / "b")
    assert ModelCheckpoint(Path("~/c")).dirpath == str(tmp_path / "home" / "c")


def test_a_url_as_dirpath_is_kept() -> None:
    callback = ModelCheckpoint("memory://runs/one", filename="{epoch}")
    assert callback.dirpath == "memory://runs/one"
    assert callback.format_checkpoint_name({"epoch": 2}) == "memory://runs/one/epoch=2.ckpt"


@pytest.mark.parametrize(
    ("arguments", "metrics", "expected"),
    [
        ({}, {"epoch": 3, "step": 40}, "epoch=3-step=40"),
        ({"filename": "{epoch:03d}"}, {"epoch": 3}, "epoch=003"),
        ({"filename": "{epoch}-{val_loss:.2f}"}, {"epoch": 2, "val_loss": 0.123456}, "epoch=2-val_loss=0.12"),
        (
            {"filename": "{epoch}-{val_loss:.2f}"},
            {"epoch": 2, "val_loss": torch.tensor(0.125)},
            "epoch=2-val_loss=0.12",
        ),
        ({"filename": "{missing:d}-{gone:.1f}"}, {}, "missing=0-gone=0.0"),
        ({"filename": "{epoch}{epoch_loss:.1f}"}, {"epoch": 1, "epoch_loss": 2}, "epoch=1epoch_loss=2.0"),
        ({"filename": "a{val/acc:.1f}", "auto_insert_metric_name": False}, {"val/acc": 0.5}, "a0.5"),
        ({"filename": "{val/acc:.1f}"}, {"val/acc": 0.5}, "val/acc=0.5"),
        ({"filename": "{a.b}"}, {"a.b": 1}, "a.b=1"),
        ({"filename": "plain"}, {"epoch": 1}, "plain"),
    ],
)
def test_file_names_are_filled_in(arguments: dict[str, Any], metrics: dict[str, Any], expected: str) -> None:
    assert ModelCheckpoint(**arguments).format_checkpoint_name(metrics) == f"{expected}.ckpt"


def test_versions_prefixes_and_other_patterns_come_into_names(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path)
    name = callback.format_checkpoint_name({"epoch": 1, "loss": 2}, "{loss}", ver=3, prefix="best")
    assert name == str(tmp_path / "best-loss=2-v3.ckpt")


def test_a_spec_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'\{val_loss:d\}'.*does not fit"):
        ModelCheckpoint(filename="{val_loss:d}").format_checkpoint_name({"val_loss": 0.5})


def test_class_attributes_set_the_characters_in_file_names(tmp_path: Path) -> None:
    class Other(ModelCheckpoint):
        CHECKPOINT_JOIN_CHAR = "_"
        CHECKPOINT_EQUALS_CHAR = ":"
        CHECKPOINT_NAME_LAST = "{epoch}_latest"
        FILE_EXTENSION = ".pt"

    RecordedRun(tmp_path, Other(tmp_path, save_last=True)).fit(epochs=2)
    assert names(tmp_path) == ["epoch:1_latest.pt", "epoch:1_step:8.pt"]


def test_a_logged_epoch_or_step_wins_in_names(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path))
    run.state.callback_metrics["step"] = 7.0
    run.fit(epochs=1)
    assert run.saved == ["epoch=0-step=7.ckpt"]


@pytest.mark.filterwarnings("ignore:.*is not empty")
def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    for _ in range(3):
        RecordedRun(tmp_path, ModelCheckpoint(tmp_path, filename="{epoch}")).fit(epochs=1)
    assert names(tmp_path) == ["epoch=0-v1.ckpt", "epoch=0-v2.ckpt", "epoch=0.ckpt"]


def test_existing_files_are_overwritten_without_the_version_counter(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, filename="same", save_top_k=-1, enable_version_counter=False)
    RecordedRun(tmp_path, callback).fit(epochs=3)
    assert names(tmp_path) == ["same.ckpt"]
    assert step_of(tmp_path / "same.ckpt") == 12


def test_a_fixed_name_is_kept_when_its_file_is_replaced(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    RecordedRun(tmp_path, callback).fit(epochs=3, val_losses=[3, 2, 1])
    assert names(tmp_path) == ["best.ckpt"]
    assert step_of(callback.best_model_path) == 12


def test_a_directory_that_is_not_empty_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "other.ckpt").write_text("")
    with pytest.warns(UserWarning, match="is not empty"):
        RecordedRun(tmp_path, ModelCheckpoint(tmp_path)).fit(epochs=1)
    assert "other.ckpt" in names(tmp_path)


# Which ones stay


@pytest.mark.parametrize(
    ("mode", "kept", "best"),
    [("min", [1, 3], 3), ("max", [0, 2], 2)],
)
def test_the_best_k_are_kept(mode: Any, kept: list[int], best: int, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=2, mode=mode)
    losses = [4, 3, 5, 1]
    RecordedRun(tmp_path, callback).fit(epochs=4, val_losses=losses)
    assert names(tmp_path) == [f"epoch={epoch}.ckpt" for epoch in kept]
    assert callback.best_model_path == str(tmp_path / f"epoch={best}.ckpt")
    assert torch.equal(callback.best_model_score, torch.tensor(float(losses[best])))
    worst = next(epoch for epoch in kept if epoch != best)
    assert callback.kth_best_model_path == str(tmp_path / f"epoch={worst}.ckpt")
    assert callback.kth_value == losses[worst]
    assert {os.path.basename(path): score.item() for path, score in callback.best_k_models.items()} == {
        f"epoch={epoch}.ckpt": losses[epoch] for epoch in kept
    }


def test_a_worse_or_equal_score_writes_nothing(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss")
    run = RecordedRun(tmp_path, callback)
    run.fit(epochs=4, val_losses=[2, 2, 3, 1])
    assert run.saved == ["epoch=0.ckpt", "epoch=3.ckpt"]
    assert callback.current_score == 1.0


@pytest.mark.parametrize(("save_top_k", "expected"), [(-1, ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]), (0, [])])
@pytest.mark.parametrize("monitor", ["val_loss", None])
def test_all_or_none_are_kept(monitor: str | None, save_top_k: int, expected: list[str], tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", monitor=monitor, save_top_k=save_top_k)
    RecordedRun(tmp_path, callback).fit(epochs=3, val_losses=[1, 3, 2])
    assert names(tmp_path) == expected


def test_any_number_is_better_than_nan(tmp_path: Path) -> None:
    for mode, infinity in (("min", math.inf), ("max", -math.inf)):
        callback = ModelCheckpoint(tmp_path / mode, "{epoch}", monitor="val_loss", mode=mode)
        run = RecordedRun(tmp_path, callback)
        run.fit(epochs=1, val_losses=[math.nan])
        assert callback.best_model_score == infinity
        run.fit(epochs=4, val_losses=[math.nan, 5.0, math.nan])
        assert names(tmp_path / mode) == ["epoch=2.ckpt"]
        assert callback.best_model_score == 5.0


@pytest.mark.parametrize("save_last", [True, "link", None])
def test_a_save_that_fails_leaves_files_and_names_as_they_were(save_last: Any, tmp_path: Path) -> None:
    class Failing(RecordedRun):
        def save_checkpoint(self, path: str, *, is_weights_only: bool = False, then: Any = None) -> None:
            if self.state.progress.epoch == 1:
                self.callback.on_save_end(self, path, CheckpointError("no space"))
                return
            super().save_checkpoint(path, is_weights_only=is_weights_only, then=then)

    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=save_last)
    run = Failing(tmp_path, callback)
    run.fit(epochs=2, val_losses=[2, 1])
    last = ["last.ckpt"] if save_last else []
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", *last]
    assert [step_of(tmp_path / name) for name in last] == [4] * len(last)
    assert callback.best_model_path == str(tmp_path / "epoch=0-step=4.ckpt")
    assert (callback.best_model_score, callback.current_score) == (2.0, 2.0)
    assert callback.last_model_path == (str(tmp_path / "last.ckpt") if save_last else "")
    run.fit(epochs=3, val_losses=[1.5])  # less than that of the save that failed would have been
    assert names(tmp_path) == ["epoch=2-step=12.ckpt", *last]
    assert callback.best_model_score == 1.5


def test_files_of_other_directories_are_left_alone(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "new")
    files.write({"state_dict": {}}, tmp_path / "old" / "best.ckpt")
    callback.best_model_path = str(tmp_path / "old" / "best.ckpt")
    RecordedRun(tmp_path, callback).fit(epochs=1)
    assert names(tmp_path / "old") == ["best.ckpt"]


def test_save_weights_only_is_passed_on(tmp_path: Path) -> None:
    for is_weights_only in (True, False):
        callback = ModelCheckpoint(tmp_path / str(is_weights_only), save_weights_only=is_weights_only)
        RecordedRun(tmp_path, callback).fit(epochs=1)
        assert files.read(callback.best_model_path)["is_weights_only"] is is_weights_only


# last.ckpt


def test_last_is_a_file_of_its_own_and_always_the_latest(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_last=True)
    RecordedRun(tmp_path, callback).fit(epochs=3, val_losses=[1, 2, 3])
    assert names(tmp_path) == ["epoch=0.ckpt", "last.ckpt"]
    assert not os.path.islink(tmp_path / "last.ckpt")
    assert step_of(callback.last_model_path) == 12
    assert callback.newest_model_path == callback.last_model_path == str(tmp_path / "last.ckpt")


def test_last_is_saved_even_if_nothing_else_is(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True)
    run = RecordedRun(tmp_path, callback)
    run.fit(epochs=2)
    assert run.saved == ["last.ckpt", "last.ckpt"]
    assert step_of(tmp_path / "last.ckpt") == 8


def test_last_is_saved_at_the_end_of_a_run_too_short_for_its_interval(tmp_path: Path) -> None:
    RecordedRun(tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True)).fit(epochs=0)
    assert names(tmp_path) == []
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True, save_on_train_epoch_end=False)
    RecordedRun(tmp_path, callback, has_validation=False).fit(epochs=1)
    assert names(tmp_path) == ["last.ckpt"]


def test_a_link_points_to_the_file_saved_last(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_last="link")
    run = RecordedRun(tmp_path, callback)
    run.fit(epochs=3, val_losses=[2, 1, 3])
    assert run.saved == ["epoch=0.ckpt", "epoch=1.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=1.ckpt"
    assert names(tmp_path) == ["epoch=1.ckpt", "last.ckpt"]
    assert callback.last_model_path == str(tmp_path / "last.ckpt")
    assert callback.newest_model_path == str(tmp_path / "epoch=1.ckpt")


def test_last_is_a_file_if_there_is_nothing_to_link_to(tmp_path: Path) -> None:
    RecordedRun(tmp_path, ModelCheckpoint(tmp_path, save_top_k=0, save_last="link")).fit(epochs=2)
    assert not os.path.islink(tmp_path / "last.ckpt")
    assert step_of(tmp_path / "last.ckpt") == 8


@pytest.mark.filterwarnings("ignore:.*is not empty")
def test_the_last_of_another_run_is_left_alone(tmp_path: Path) -> None:
    files.write({"state_dict": {}, "global_step": 99}, tmp_path / "last.ckpt")
    callback = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True)
    RecordedRun(tmp_path, callback).fit(epochs=2)
    assert names(tmp_path) == ["last-v1.ckpt", "last.ckpt"]
    assert (step_of(tmp_path / "last.ckpt"), step_of(callback.last_model_path)) == (99, 8)


# When it saves


@pytest.mark.parametrize(
    ("arguments", "settings", "steps"),
    [
        ({}, {}, [4, 8, 12, 16]),
        ({"every_n_epochs": 2}, {}, [8, 16]),
        ({"every_n_epochs": 0}, {}, []),
        ({}, {"has_validation": False}, [4, 8, 12, 16]),
        ({}, {"has_validation": False, "every_n_epochs": 2}, [4, 8, 12, 16]),
        ({}, {"interval": 0.5}, [2, 4, 6, 8, 10, 12, 14, 16]),
        ({}, {"interval": 1}, list(range(1, 17))),
        ({}, {"every_n_epochs": 2}, [8, 16]),
        ({"every_n_epochs": 2}, {"interval": 0.5}, [6, 8, 14, 16]),
        ({"save_on_train_epoch_end": True}, {"interval": 0.5}, [4, 8, 12, 16]),
        ({"save_on_train_epoch_end": True}, {"every_n_epochs": 2}, [4, 8, 12, 16]),
        ({"save_on_train_epoch_end": False}, {}, [4, 8, 12, 16]),
        ({"save_on_train_epoch_end": False}, {"has_validation": False}, []),
        ({"every_n_train_steps": 3}, {}, [3, 6, 9, 12, 15]),
        ({"every_n_train_steps": 4}, {}, [4, 8, 12, 16]),
        ({"every_n_train_steps": 3, "save_on_train_epoch_end": False}, {"interval": 0.5}, [3, 6, 9, 12, 15]),
    ],
)
def test_it_saves_at_the_expected_times(
    arguments: dict[str, Any], settings: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, auto_insert_metric_name=False, **arguments)
    run = RecordedRun(tmp_path, callback, **settings)
    run.fit(epochs=4)
    assert run.saved == [f"{step}.ckpt" for step in steps]


def test_saving_by_steps_asks_for_no_other_pauses(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=7))
    run.fit(epochs=2, batches=10)
    assert run.pauses == [7, 10, 14, 20]
    epochs = RecordedRun(tmp_path, ModelCheckpoint(tmp_path / "epochs"))
    epochs.fit(epochs=2, batches=10)
    assert epochs.pauses == [10, 20]


def test_a_save_inside_an_epoch_comes_before_the_epochs_end(tmp_path: Path) -> None:
    """With validation, the default saves after it, when the epoch's own metrics are there."""
    seen = []

    class Looking(RecordedRun):
        def save_checkpoint(self, path: str, *, is_weights_only: bool = False, then: Any = None) -> None:
            seen.append((self.state.progress.is_epoch_ended, dict(self.state.callback_metrics)))
            super().save_checkpoint(path, is_weights_only=is_weights_only, then=then)

    Looking(tmp_path, ModelCheckpoint(tmp_path)).fit(epochs=1, val_losses=[2], epoch_losses=[3])
    assert seen == [(True, {"val_loss": 2, "epoch_loss": 3})]


def test_a_stop_in_the_middle_of_an_epoch_is_saved(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path, save_top_k=-1))
    run.fit(epochs=4, max_steps=6)
    assert run.saved == ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt"]


@pytest.mark.parametrize("arguments", [{}, {"every_n_train_steps": 1}, {"save_last": True}])
def test_a_dev_run_writes_nothing(arguments: dict[str, Any], tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path, **arguments), is_dev_run=True)
    run.fit(epochs=2, val_losses=[1, 2])
    assert (run.saved, names(tmp_path), run.pauses) == ([], [], [4, 8])


def test_the_sanity_check_saves_nothing(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, save_on_train_epoch_end=False, save_last=True)
    run = RecordedRun(tmp_path, callback)
    callback.on_start(run)
    run.state.is_sanity_checking = True
    run.state.progress = Progress(global_step=3)
    callback.on_validation_end(run)
    assert run.saved == []


def test_other_stages_save_nothing_and_set_no_dirpath(tmp_path: Path) -> None:
    callback = ModelCheckpoint()
    run = RecordedRun(tmp_path, callback)
    run.state.stage = "test"
    callback.on_start(run)
    assert callback.dirpath is None


def test_a_second_fit_with_the_same_callback_saves_at_the_same_step_again(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path)
    for _ in range(2):
        run = RecordedRun(tmp_path, callback)
        run.fit(epochs=1)
        assert run.saved == ["epoch=0-step=4.ckpt"]


# By time


def test_a_time_interval_is_kept_inside_a_long_epoch(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, train_time_interval=timedelta(seconds=0.2))
    run = RecordedRun(tmp_path, callback, has_validation=False)
    started = time.monotonic()
    run.fit(epochs=1, batches=100, seconds_per_batch=0.01)  # 1 s and more
    assert 1 <= len(run.saved) <= (time.monotonic() - started) / 0.2
    assert run.pauses[0] == 1  # which tells the speed
    assert run.pauses[1] <= 1 + 20  # 0.2 s at 100 batches a second or fewer


def test_a_time_interval_begins_with_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("raylit.callbacks.timing.time", SimpleNamespace(monotonic=lambda: now[0]))
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path, train_time_interval=timedelta(hours=1)))
    now[0] = 2 * 3600.0
    run.fit(epochs=1)
    assert run.saved == []


def test_a_time_interval_of_zero_saves_at_every_batch(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, train_time_interval=timedelta(0))
    run = RecordedRun(tmp_path, callback, has_validation=False)
    run.fit(epochs=1, batches=3)
    assert run.saved == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


def test_a_long_time_interval_saves_nothing_at_epochs_ends(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path, train_time_interval=timedelta(hours=1)))
    run.fit(epochs=3)
    assert run.saved == []


# Steps and validation at once


def test_a_save_by_steps_waits_for_the_validation_at_its_step(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", every_n_train_steps=4)
    run = RecordedRun(tmp_path, callback)
    run.fit(epochs=3, val_losses=[3, 1, 2])
    assert run.saved == ["step=4.ckpt", "step=8.ckpt"]
    assert (step_of(callback.best_model_path), callback.best_model_score) == (8, 1.0)


def test_a_save_by_steps_waits_for_the_first_value_of_its_metric(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", every_n_train_steps=3, save_top_k=-1)
    run = RecordedRun(tmp_path, callback)
    run.fit(epochs=2, val_losses=[3, 1])
    assert run.saved == ["step=4.ckpt", "step=6.ckpt"]


@pytest.mark.parametrize("settings", [{}, {"has_validation": False}, {"every_n_epochs": 2}])
def test_a_save_by_steps_waits_for_an_epochs_training_metric(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", monitor="epoch_loss", every_n_train_steps=3, save_top_k=-1)
    run = RecordedRun(tmp_path, callback, **settings)
    run.fit(epochs=2, val_losses=[3, 1], epoch_losses=[5, 4])
    assert run.saved == ["step=4.ckpt", "step=6.ckpt"]


@pytest.mark.filterwarnings("error")
def test_a_save_by_steps_waits_over_epochs_without_validation(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", every_n_train_steps=3, save_top_k=-1)
    run = RecordedRun(tmp_path, callback, every_n_epochs=2)
    run.fit(epochs=3, val_losses=[3])
    assert run.saved == ["step=8.ckpt", "step=9.ckpt", "step=12.ckpt"]


def test_a_save_by_steps_does_not_wait_for_an_existing_metric(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", monitor="train_loss", every_n_train_steps=1, save_top_k=2)
    RecordedRun(tmp_path, callback).fit(epochs=1, train_losses=[5, 1, 2, 9])
    assert names(tmp_path) == ["step=2.ckpt", "step=3.ckpt"]


def test_the_newest_k_are_kept_when_the_step_is_monitored(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", monitor="step", mode="max", every_n_train_steps=2, save_top_k=2)
    RecordedRun(tmp_path, callback, has_validation=False).fit(epochs=2)
    assert names(tmp_path) == ["step=6.ckpt", "step=8.ckpt"]


# A missing metric


def test_a_metric_that_validation_did_not_log_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path, monitor="val_acc"))
    with pytest.raises(ConfigError, match=r"monitor='val_acc'.*there are: epoch, epoch_loss, step, val_loss\."):
        run.fit(epochs=2, val_losses=[1, 2], epoch_losses=[1, 2])
    assert run.state.progress.epoch == 0


def test_a_save_by_steps_misses_its_metric_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, ModelCheckpoint(tmp_path, monitor="val_acc", every_n_train_steps=1))
    with pytest.raises(ConfigError, match="val_acc"):
        run.fit(epochs=2, val_losses=[1, 2])
    assert run.state.progress.global_step == 4


def test_without_a_validation_so_far_a_missing_metric_is_one_warning(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="epoch_loss")
    run = RecordedRun(tmp_path, callback, has_validation=False)
    with pytest.warns(UserWarning, match=r"monitor='epoch_loss'.*Nothing is saved until then") as caught:
        run.fit(epochs=3)
    assert len(caught) == 1
    run.fit(epochs=4, epoch_losses=[1])
    assert run.saved == ["epoch=3-step=16.ckpt"]


def test_a_save_at_the_epochs_end_before_the_first_validation_only_warns(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_on_train_epoch_end=True)
    run = RecordedRun(tmp_path, callback, every_n_epochs=2)
    with pytest.warns(UserWarning, match="val_loss"):
        run.fit(epochs=2, val_losses=[1])
    assert run.saved == ["epoch=1-step=8.ckpt"]


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "auto"}, "mode='auto'.*'min' or 'max'"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 2}, "save_top_k=2.*monitor"),
        ({"save_last": "copy"}, "save_last='copy'"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"every_n_epochs": 1, "every_n_train_steps": 1}, "one of"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(1)}, "one of"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelCheckpoint(**arguments)


def test_verbose_logs_saves_and_skipped_saves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="raylit"):
        RecordedRun(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss", verbose=True)).fit(
            epochs=2, val_losses=[1, 2]
        )
    path = tmp_path / "epoch=0-step=4.ckpt"
    assert caplog.messages == [f"step 4: saved {path}", "val_loss=2 is not among the best 1"]


# State


def resumed_from(path: str | Path, root: Path, callback: ModelCheckpoint, **settings: Any) -> RecordedRun:
    """Start a run that continues from a checkpoint: the state is loaded before the start, as in the coordinator."""
    run = RecordedRun(root, callback, **settings)
    checkpoint = files.read(path)
    step = checkpoint["global_step"]
    run.state.progress = Progress(epoch=step // 4 - 1, batch=4, global_step=step, is_epoch_ended=True)
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    return run


def best_two(directory: Path | None) -> ModelCheckpoint:
    return ModelCheckpoint(directory, "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)


@pytest.mark.parametrize("is_directory_given", [True, False])
def test_a_resumed_run_continues_with_its_files(is_directory_given: bool, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    given = directory if is_directory_given else None
    RecordedRun(tmp_path, best_two(given)).fit(epochs=3, val_losses=[3, 1, 2])
    callback = best_two(given)
    resumed = resumed_from(directory / "last.ckpt", tmp_path, callback)
    resumed.fit(epochs=5, val_losses=[5, 0])
    assert names(directory) == ["epoch=1.ckpt", "epoch=4.ckpt", "last.ckpt"]
    assert callback.best_model_path == str(directory / "epoch=4.ckpt")
    assert callback.kth_value == 1.0
    assert step_of(callback.last_model_path) == 20


def test_the_first_file_contains_the_path_of_last(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, best_two(tmp_path))
    run.fit(epochs=1, val_losses=[3])
    resumed_from(tmp_path / "epoch=0.ckpt", tmp_path, best_two(tmp_path)).fit(epochs=2, val_losses=[4])
    assert names(tmp_path) == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]


def test_the_file_from_which_a_run_was_resumed_is_kept(tmp_path: Path) -> None:
    RecordedRun(tmp_path, ModelCheckpoint(tmp_path)).fit(epochs=1)
    first = tmp_path / "epoch=0-step=4.ckpt"
    resumed_from(first, tmp_path, ModelCheckpoint(tmp_path)).fit(epochs=3)
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt"]


def test_with_another_directory_only_the_best_path_is_restored(tmp_path: Path) -> None:
    RecordedRun(tmp_path, best_two(tmp_path / "old")).fit(epochs=2, val_losses=[2, 1])
    callback = best_two(tmp_path / "new")
    with pytest.warns(UserWarning, match=r"go to .*new, those of the resumed run went to .*old"):
        run = resumed_from(tmp_path / "old" / "epoch=1.ckpt", tmp_path, callback)
    assert callback.best_model_path == str(tmp_path / "old" / "epoch=1.ckpt")
    assert (callback.best_k_models, callback.best_model_score, callback.last_model_path) == ({}, None, "")
    run.fit(epochs=3, val_losses=[5])
    assert callback.best_model_path == str(tmp_path / "new" / "epoch=2.ckpt")
    assert names(tmp_path / "old") == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]


def test_lightnings_state_is_loaded(tmp_path: Path) -> None:
    path = str(tmp_path / "epoch=0.ckpt")
    callback = ModelCheckpoint(tmp_path, monitor="val_loss")
    callback.load_state_dict(
        {
            "monitor": "val_loss",
            "best_model_score": torch.tensor(0.5),
            "best_model_path": path,
            "current_score": torch.tensor(0.5),
            "dirpath": str(tmp_path),
            "best_k_models": {path: torch.tensor(0.5)},
            "kth_best_model_path": path,
            "kth_value": torch.tensor(0.5),
            "last_model_path": "",
        }
    )
    assert (callback.best_model_score, callback.kth_value, callback.kth_best_model_path) == (0.5, 0.5, path)


def test_the_state_has_lightnings_keys(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss")
    RecordedRun(tmp_path, callback).fit(epochs=1, val_losses=[0.5])
    path = str(tmp_path / "epoch=0-step=4.ckpt")
    expected = {
        "monitor": "val_loss",
        "best_model_score": 0.5,
        "best_model_path": path,
        "current_score": 0.5,
        "dirpath": str(tmp_path),
        "best_k_models": {path: 0.5},
        "kth_best_model_path": path,
        "kth_value": 0.5,
        "last_model_path": "",
        "newest_model_path": path,
    }
    assert files.read(path)["callbacks"][callback.state_key] == expected


def test_the_state_key_is_lightnings() -> None:
    assert ModelCheckpoint(monitor="val_loss", every_n_train_steps=5).state_key == (
        "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 5, 'every_n_epochs': 0, "
        "'train_time_interval': None}"
    )


# The automatic checkpoint


def test_the_default_callback_keeps_the_latest_and_the_best(tmp_path: Path) -> None:
    callback = ModelCheckpoint.automatic()
    RecordedRun(tmp_path, callback).fit(epochs=4, val_losses=[3, 1, 2, 4])
    assert names(tmp_path / "checkpoints") == ["epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"]
    assert callback.best_model_path.endswith("epoch=1-step=8.ckpt")
    assert callback.best_model_score == 1.0
    assert callback.newest_model_path.endswith("epoch=3-step=16.ckpt")


def test_the_default_callback_keeps_one_file_if_the_latest_is_the_best(tmp_path: Path) -> None:
    callback = ModelCheckpoint.automatic()
    RecordedRun(tmp_path, callback).fit(epochs=3, val_losses=[3, 4, 1])
    assert names(tmp_path / "checkpoints") == ["epoch=2-step=12.ckpt"]
    assert callback.best_model_path == callback.newest_model_path


def test_the_default_callback_without_a_score_uses_the_latest_as_the_best(tmp_path: Path) -> None:
    callback = ModelCheckpoint.automatic()
    RecordedRun(tmp_path, callback, has_validation=False).fit(epochs=3, epoch_losses=[1, 2, 3])
    assert names(tmp_path / "checkpoints") == ["epoch=2-step=12.ckpt"]
    assert callback.best_model_path.endswith("epoch=2-step=12.ckpt")
    assert callback.best_model_score is None


def test_the_default_callback_prefers_checkpoint_on(tmp_path: Path) -> None:
    callback = ModelCheckpoint.automatic()
    run = RecordedRun(tmp_path, callback, has_validation=False)
    for epoch, (checkpoint_on, val_loss) in enumerate([(1, 9), (2, 8), (3, 7)]):
        run.state.callback_metrics.update(checkpoint_on=checkpoint_on, val_loss=val_loss)
        run.fit(epochs=epoch + 1)
    assert callback.best_model_path.endswith("epoch=0-step=4.ckpt")


def test_the_default_callback_keeps_the_latest_of_epochs_without_validation(tmp_path: Path) -> None:
    callback = ModelCheckpoint.automatic()
    run = RecordedRun(tmp_path, callback, every_n_epochs=2)
    run.fit(epochs=5, val_losses=[3, 2])
    assert run.saved == [f"epoch={epoch}-step={4 * epoch + 4}.ckpt" for epoch in range(5)]
    assert callback.best_model_path.endswith("epoch=3-step=16.ckpt")
    assert names(tmp_path / "checkpoints") == ["epoch=3-step=16.ckpt", "epoch=4-step=20.ckpt"]


def test_the_default_callback_saves_after_each_of_several_validations(tmp_path: Path) -> None:
    callback = ModelCheckpoint.automatic()
    run = RecordedRun(tmp_path, callback, interval=0.5)
    run.fit(epochs=2, val_losses=[3, 1, 2, 4])
    assert run.saved == [f"epoch={epoch}-step={step}.ckpt" for epoch, step in [(0, 2), (0, 4), (1, 6), (1, 8)]]
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]


def test_the_default_callback_does_not_score_a_stop_inside_an_epoch_by_an_older_validation(tmp_path: Path) -> None:
    callback = ModelCheckpoint.automatic()
    RecordedRun(tmp_path, callback).fit(epochs=3, val_losses=[3], max_steps=6)
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt"]
    assert callback.best_model_path.endswith("epoch=0-step=4.ckpt")


def test_the_default_callback_continues_in_a_resumed_run(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    RecordedRun(tmp_path, ModelCheckpoint.automatic()).fit(epochs=3, val_losses=[3, 1, 2])
    callback = ModelCheckpoint.automatic()
    resumed_from(directory / "epoch=2-step=12.ckpt", tmp_path, callback).fit(epochs=5, val_losses=[2, 4])
    assert callback.best_model_path == str(directory / "epoch=1-step=8.ckpt")
    assert names(directory) == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "epoch=4-step=20.ckpt"]


def test_an_explicit_checkpoint_without_monitor_has_no_score(tmp_path: Path) -> None:
    callback = ModelCheckpoint()
    RecordedRun(tmp_path, callback).fit(epochs=2, val_losses=[1, 2])
    assert callback.best_model_path.endswith("epoch=1-step=8.ckpt")
    assert names(tmp_path / "checkpoints") == ["epoch=1-step=8.ckpt"]


# Checkpoints, directories and names of strangers


def hostile_checkpoint(path: Path, callback: ModelCheckpoint, **state: Any) -> None:
    """Return the checkpoint of a run, with other paths in its ModelCheckpoint's state."""
    checkpoint = files.read(path)
    checkpoint["callbacks"][callback.state_key] |= state
    files.write(checkpoint, path)


@pytest.mark.filterwarnings("ignore:.*is not empty")
@pytest.mark.parametrize(
    ("key", "monitor"),
    [
        ("best_model_path", None),
        ("last_model_path", "val_loss"),
        ("newest_model_path", None),
        ("best_k_models", "val_loss"),
    ],
)
@pytest.mark.parametrize(
    ("name", "is_foreign"),
    [
        ("../../precious.txt", True),
        ("{outside}/precious.txt", True),
        ("link/precious.txt", True),
        ("link/../precious.txt", True),
        ("mine.txt", False),
        ("sub/../mine.txt", False),
        ("other.ckpt", False),
    ],
)
def test_no_file_that_a_checkpoint_merely_names_is_removed(
    name: str, is_foreign: bool, key: str, monitor: str | None, tmp_path: Path
) -> None:
    outside, directory = tmp_path / "outside", tmp_path / "outside" / "runs" / "ck"
    (directory / "sub").mkdir(parents=True)
    (directory / "link").symlink_to(outside)
    precious = [outside / "precious.txt", directory / "mine.txt", directory / "other.ckpt", outside.parent / "p.txt"]
    for file in precious:
        file.write_text("precious")

    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(directory, "{epoch}", monitor=monitor, save_last=True)

    RecordedRun(tmp_path, callback()).fit(epochs=2, val_losses=[3, 2])
    path = os.path.join(directory, name.format(outside=outside))
    first = directory / "last.ckpt"
    hostile_checkpoint(first, callback(), **{key: {path: 9.0} if key == "best_k_models" else path})
    again = callback()
    expectation = pytest.warns(UserWarning, match="outside of its directory") if is_foreign else nullcontext()
    with expectation:
        run = resumed_from(first, tmp_path, again)
    run.fit(epochs=5, val_losses=[1, 0.5, 0.25])
    assert [file.read_text() for file in precious] == ["precious"] * 4
    assert again.best_model_path == str(directory / "epoch=4.ckpt")
    assert (directory / "link").is_symlink()


@pytest.mark.filterwarnings("ignore:.*is not empty")
def test_a_resumed_run_removes_files_of_the_run_before_it(tmp_path: Path) -> None:
    RecordedRun(tmp_path, ModelCheckpoint(tmp_path, save_top_k=2, monitor="val_loss")).fit(
        epochs=3, val_losses=[3, 1, 2]
    )
    callback = ModelCheckpoint(tmp_path, save_top_k=2, monitor="val_loss")
    resumed_from(tmp_path / "epoch=1-step=8.ckpt", tmp_path, callback).fit(epochs=5, val_losses=[0.5, 0.25])
    assert "epoch=2-step=12.ckpt" in names(tmp_path)  # the run before it knew nothing of that at epoch 1
    assert "epoch=0-step=4.ckpt" not in names(tmp_path)
    assert "epoch=1-step=8.ckpt" in names(tmp_path)  # resumed from


@pytest.mark.parametrize("path", ["memory://{}/ck/../precious.ckpt", "memory://{}/ck/x::memory://{}/precious.ckpt"])
def test_no_url_that_a_checkpoint_merely_names_is_removed(path: str, tmp_path: Path) -> None:
    root = tmp_path.name
    directory, path = f"memory://{root}/ck", path.format(root, root)
    files.write({"state_dict": {}}, f"memory://{root}/precious.ckpt")
    callback = ModelCheckpoint(directory)
    state = {**callback.state_dict(), "best_model_path": path}
    with pytest.warns(UserWarning, match="outside of its directory"):
        callback.load_state_dict(state)
    RecordedRun(tmp_path, callback).fit(epochs=3)
    assert files.exists(f"memory://{root}/precious.ckpt")


def test_paths_of_other_types_in_the_state_are_ignored(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path)
    state = {**callback.state_dict(), "best_model_path": 3, "last_model_path": ["x"], "best_k_models": [1]}
    with pytest.warns(UserWarning, match="outside of its directory"):
        callback.load_state_dict(state)
    assert (callback.best_model_path, callback.last_model_path, callback.best_k_models) == ("", "", {})


@pytest.mark.parametrize("filename", ["../../x", "a/../../x", "/tmp/x", "{../x}", "{epoch}/../../x", "s3://bucket/x"])
def test_a_file_name_does_not_lead_out_of_its_directory(filename: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leads out of the directory"):
        ModelCheckpoint(tmp_path, filename)
    with pytest.raises(ConfigError, match="leads out of the directory"):
        ModelCheckpoint(tmp_path).format_checkpoint_name({}, filename)


def test_metrics_with_slashes_make_directories_below(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}-{val/loss:.1f}")
    assert callback.format_checkpoint_name({"val/loss": 0.5}) == str(tmp_path / "epoch=0-val" / "loss=0.5.ckpt")


def test_another_last_name_does_not_lead_out_of_its_directory(tmp_path: Path) -> None:
    class Outside(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "../last"

    with pytest.raises(ConfigError, match=r"'\.\./last\.ckpt', of the pattern '\.\./last', leads out"):
        Outside(tmp_path)
