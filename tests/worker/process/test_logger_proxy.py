"""Calls of hooks on `self.logger` are made by the driver's loggers, in order, with the arguments at the call."""

import contextlib
import copy
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from models import Regression, RegressionData
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl
from raylit.driver.loop import log_writer
from raylit.driver.loop.log_writer import LogWriter
from raylit.protocol.messages import LogCall
from raylit.worker.process.logger_proxy import LoggerFacts, logger_views, snapshot


class Experiment:
    def __init__(self):
        self.calls = []
        self.config = {}
        self.note = None

    def add(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return len(self.calls)

    def fail(self):
        raise OSError("no room")


class Keeping(pl.Logger):
    """Records its calls and the thread that makes them."""

    def __init__(self):
        self._experiment = Experiment()
        self.rows = []
        self.hparams = []
        self.ends = []
        self.saved = []
        self.threads = set()

    name, version, save_dir, log_dir = "kept", "v1", "/save", None
    root_dir = "/save/kept"

    @property
    def experiment(self):
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.threads.add(threading.current_thread().name)
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params):
        self.hparams.append(dict(params))

    def log_image(self, key, images, step=None):
        self.rows.append((step, {key: [tuple(image.shape) for image in images]}))

    def finalize(self, status):
        self.ends.append(status)

    def after_save_checkpoint(self, checkpoint_callback):
        self.saved.append(checkpoint_callback.best_model_path)


class Calling(Regression):
    """Calls its logger in most hooks; the argument changes after each call."""

    def __init__(self):
        super().__init__()
        self.returned = []

    def _call(self, name):
        value = torch.full((2,), float(self.global_step))
        self.returned.append(self.logger.experiment.add(name, value, step=self.global_step))
        value.fill_(-1.0)

    def setup(self, stage):
        self._call("setup")

    def on_train_start(self):
        self._call("on_train_start")
        self.logger.experiment.config["lr"] = 0.1
        self.logger.experiment.note = "a note"

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._call(f"batch {self.current_epoch}.{batch_idx}")

    def on_validation_epoch_end(self):
        self._call("on_validation_epoch_end")

    def on_train_epoch_end(self):
        self._call("on_train_epoch_end")
        self.logger.log_metrics({"own": torch.tensor(2.5)}, step=self.global_step)

    def on_train_end(self):
        self._call("on_train_end")
        self.logger.log_hyperparams({"late": 1})
        self.loggers[0].log_image("images", [torch.zeros(3, 4, 5)], step=9)

    def on_fit_end(self):
        self._call("on_fit_end")

    def teardown(self, stage):
        self._call("teardown")


ORDER = [
    "setup",
    "on_train_start",
    *[f"batch 0.{i}" for i in range(4)],
    "on_validation_epoch_end",
    "on_train_epoch_end",
    *[f"batch 1.{i}" for i in range(4)],
    "on_validation_epoch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_calls_of_all_hooks_reach_the_driver_once_in_order_with_the_values_at_the_call(num_workers, quiet):
    logger, model = Keeping(), Calling()
    quiet["logger"] = logger
    data = RegressionData(batch_size=12 // max(1, num_workers))
    pl.fit(model, data, num_workers=num_workers, max_epochs=2, num_sanity_val_steps=0, **quiet)
    calls = logger.experiment.calls
    assert [args[0] for args, _ in calls] == ORDER
    if num_workers > 0:
        assert [args[1].tolist() for args, _ in calls] == [[float(kwargs["step"])] * 2 for _, kwargs in calls]
        assert set(model.returned) == {None}
        assert logger.threads == {"raylit-loggers"}
    else:
        assert model.returned == list(range(1, len(ORDER) + 1))
    assert (logger.experiment.config, logger.experiment.note) == ({"lr": 0.1}, "a note")
    assert [(step, row) for step, row in logger.rows if "own" in row] == [(4, {"own": 2.5}), (8, {"own": 2.5})]
    assert (9, {"images": [(3, 4, 5)]}) in logger.rows
    assert logger.hparams[-1] == {"late": 1}
    assert logger.ends == ["success"]


def test_metrics_and_logger_calls_keep_their_order(quiet):
    class Mixed(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.logger.log_metrics({"mine": float(batch_idx)}, step=batch_idx)

    logger = Keeping()
    quiet["logger"] = logger
    loader = DataLoader(TensorDataset(torch.zeros(400, 8), torch.zeros(400, 3)), batch_size=4)
    pl.fit(Mixed(), loader, num_workers=1, max_epochs=1, log_every_n_steps=1, limit_val_batches=0, **quiet)
    steps = [(step, "mine" in row) for step, row in logger.rows if "mine" in row or "train_loss" in row]
    assert steps == [(step, is_mine) for step in range(100) for is_mine in (True, False)]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_logger_calls_in_evaluation_and_prediction_reach_the_logger(entry, num_workers, quiet):
    class Logged(Regression):
        def _end(self):
            self.logger.experiment.add(entry)

        on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _end

    logger = Keeping()
    quiet["logger"] = logger
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    getattr(trainer, entry)(Logged(), RegressionData().loader_for_test())
    assert logger.experiment.calls == [((entry,), {})]


class Facts(Regression):
    def on_train_start(self):
        logger = self.logger
        self.facts = (logger.name, logger.version, logger.save_dir, logger.root_dir, logger.log_dir)
        self.kinds = (isinstance(logger, pl.Logger), isinstance(logger, pl.TensorBoardLogger))
        self.same = self.trainer.loggers is self.loggers and self.trainer.logger is logger
        self.kept = logger.experiment


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hooks_can_read_the_loggers_directories(num_workers, quiet, tmp_path):
    quiet["logger"] = [pl.TensorBoardLogger(name="runs"), pl.CSVLogger()]
    model = Facts()
    trainer = pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, **quiet)
    root = str(tmp_path)
    assert model.facts == ("runs", 0, root, f"{root}/runs", f"{root}/runs/version_0")
    assert model.facts[4] == trainer.log_dir
    assert model.kinds == (True, True)
    assert model.same
    if num_workers > 0:
        assert model.kept is None  # a stand-in stays on the worker


@pytest.mark.parametrize("num_workers", [0, 1])
def test_logger_is_none_in_hooks_of_a_run_without_loggers(num_workers, quiet):
    class Without(Regression):
        def on_train_start(self):
            self.seen = (self.logger, self.loggers, self.trainer.logger)

    model = Without()
    pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, **quiet)
    assert model.seen == (None, [], None)


@pytest.mark.parametrize("rank", [0, 1])
def test_calls_before_an_exception_on_any_rank_are_not_lost(rank, quiet):
    class Failing(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.logger.experiment.add(batch_idx)
            if batch_idx == 2 and self.global_rank == rank:
                raise RuntimeError("broken hook")

        def on_exception(self, error):
            self.logger.experiment.add("exception")

    logger = Keeping()
    quiet["logger"] = logger
    with pytest.raises(RuntimeError, match="broken hook"):
        pl.fit(Failing(), RegressionData(), num_workers=2, max_epochs=1, **quiet)
    assert [args[0] for args, _ in logger.experiment.calls][:3] == [0, 1, 2]
    assert logger.ends == ["failed"]


BAD_CALLS = {
    "add_imge": (lambda logger: logger.experiment.add_imge(1), "'Experiment' object has no attribute 'add_imge'"),
    "log_metrics": (lambda logger: logger.log_metrics(), "missing 1 required positional argument"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_end"])
def test_a_failing_call_ends_the_run_and_the_error_names_its_line_and_step(name, hook, quiet):
    call, message = BAD_CALLS[name]
    model = Regression()
    setattr(model, hook, lambda *args: call(model.logger))
    logger = Keeping()
    quiet["logger"] = logger
    with pytest.raises(pl.LoggingError, match=f"{name}.*test_logger_proxy.py:.* at step") as caught:
        pl.fit(model, RegressionData(), num_workers=1, max_epochs=1, **quiet)
    assert message in str(caught.value)
    assert logger.ends == ["failed"]


def test_a_failing_call_raises_in_the_hook_without_workers(quiet):
    class Wrong(Regression):
        def on_train_start(self):
            self.logger.experiment.add_imge(1)

    quiet["logger"] = Keeping()
    with pytest.raises(AttributeError, match="add_imge"):
        pl.fit(Wrong(), RegressionData(), max_epochs=1, **quiet)


def test_an_argument_that_cannot_be_pickled_is_an_error_in_the_hook(quiet):
    class Wrong(Regression):
        def on_train_start(self):
            self.logger.experiment.add(threading.Lock())

    quiet["logger"] = Keeping()
    with pytest.raises(pl.ConfigError, match=r"logger.experiment.add\(...\): an argument cannot travel"):
        pl.fit(Wrong(), RegressionData(), num_workers=1, max_epochs=1, **quiet)


class Waiting(Keeping):
    """Its first call blocks until the training has ended."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.has_seen_end = []

    def log_metrics(self, metrics, step=None):
        deadline = time.monotonic() + 30
        while not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.has_seen_end.append(self.path.exists())
        super().log_metrics(metrics, step)


class Ending(Regression):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logger.experiment.add(batch_idx)

    def on_train_end(self):
        self.path.touch()


def test_a_slow_logger_does_not_delay_the_steps_and_loses_no_calls(quiet, tmp_path):
    """Twelve steps in two epochs, all of which are over before the logger has taken the first one's metrics."""
    path = tmp_path / "trained"
    logger, model = Waiting(path), Ending(path)
    quiet["logger"] = logger
    pl.fit(model, RegressionData(), num_workers=1, max_epochs=2, log_every_n_steps=1, num_sanity_val_steps=0, **quiet)
    assert all(logger.has_seen_end)
    assert [step for step, row in logger.rows if "train_loss" in row] == list(range(12))
    assert len(logger.experiment.calls) == 12


def test_calls_wait_when_the_queue_is_full_instead_of_being_dropped(monkeypatch):
    monkeypatch.setattr(log_writer, "_MAX_QUEUED_BYTES", 1000)
    logger, is_let_on = Keeping(), threading.Event()
    logger.wait = lambda: is_let_on.wait(20)
    writer = LogWriter([logger], is_direct=False)

    def call(*path, number=0):
        return LogCall(logger=0, path=path, arguments=snapshot(((number,) if number else (), {})), place="")

    writer.queue_call(call("wait"))
    filled = threading.Event()

    def fill():
        for number in range(1, 500):
            writer.queue_call(call("experiment", "add", number=number))
        filled.set()

    thread = threading.Thread(target=fill)
    thread.start()
    assert not filled.wait(0.3)
    assert writer._num_bytes < 2000
    is_let_on.set()
    thread.join(20)
    writer.finalize("success")
    assert [args[0] for args, _ in logger.experiment.calls] == list(range(1, 500))


class Refusing(Keeping):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def log_metrics(self, metrics, step=None):
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [ConnectionError("the server is gone"), RuntimeError("the server is gone")])
def test_a_failing_logger_does_not_end_the_training_but_raises_at_its_end(error, num_workers, quiet):
    quiet["logger"] = [Refusing(error), kept := Keeping()]
    model = Regression()
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=2, **quiet)
    with (
        pytest.warns(UserWarning, match=r"Refusing has failed: .*the server is gone. The run goes on") as warned,
        pytest.raises(pl.LoggingError, match=r"Refusing has failed 3 times .*the server is gone") as caught,
    ):
        trainer.fit(model, RegressionData())
    assert caught.value.__cause__ is error
    assert len([one for one in warned if "has failed" in str(one.message)]) == 1
    assert (trainer.global_step, len(model.losses), kept.ends) == (12, 12, ["success"])
    assert len([row for _, row in kept.rows if "val_loss" in row]) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_evaluation_returns_its_results_with_a_failing_logger(num_workers, quiet):
    quiet["logger"] = Refusing(OSError("no room"))
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    with pytest.warns(UserWarning, match="Refusing has failed: OSError: no room"):
        [results] = trainer.validate(Regression(), RegressionData(), verbose=False)
    assert results.keys() == {"val_loss"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_programming_error_in_a_logger_ends_the_run_at_once(num_workers, quiet):
    quiet["logger"] = Refusing(TypeError("no such thing"))
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=100, **quiet)
    with pytest.raises(TypeError, match="no such thing"):
        trainer.fit(Regression(), RegressionData())
    assert trainer.current_epoch < 99


def test_a_hooks_call_that_fails_on_a_full_disk_does_not_end_the_training(quiet):
    model = Regression()
    model.on_train_batch_end = lambda *args: model.logger.experiment.fail()
    logger = Keeping()
    quiet["logger"] = logger
    with (
        pytest.warns(UserWarning, match="experiment.fail.* at step 1: OSError: no room"),
        pytest.raises(pl.LoggingError, match=r"failed 6 times.*test_logger_proxy.py:.* at step 1: OSError: no room"),
    ):
        pl.fit(model, RegressionData(), num_workers=1, max_epochs=1, **quiet)
    assert logger.ends == ["success"]


def test_a_logger_whose_calls_fail_slowly_is_no_longer_called(monkeypatch):
    monkeypatch.setattr(log_writer, "_DISABLE_AFTER_S", 0.05)

    class Unreachable(Keeping):
        num_calls = 0

        def log_metrics(self, metrics, step=None):
            self.num_calls += 1
            time.sleep(0.03)
            raise ConnectionError("timed out")

    logger = Unreachable()
    writer = LogWriter([logger], is_direct=False)
    for step in range(1000):
        writer.log_metrics({"x": 1.0}, step=step)
    with pytest.warns(UserWarning, match="timed out"):
        writer.finalize("success")
    assert logger.num_calls == 2
    with pytest.raises(pl.LoggingError, match="failed 1001 times"):
        writer.raise_failures()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loggers_are_notified_of_every_checkpoint(num_workers, quiet, tmp_path):
    logger = Keeping()
    quiet |= {"logger": logger, "enable_checkpointing": pl.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)}
    pl.fit(Regression(), RegressionData(), num_workers=num_workers, max_epochs=3, **quiet)
    assert len(logger.saved) == 3
    assert [os.path.exists(path) for path in logger.saved] == [True] * 3


def views(forward):
    facts = LoggerFacts.from_logger(Keeping(), 0)
    return logger_views([facts], forward=forward, step=lambda: 7)[0]


def test_proxies_of_other_ranks_neither_send_nor_pickle_arguments():
    view = views(None)
    assert view.experiment.add(threading.Lock()) is None
    view.experiment.config["x"] = threading.Lock()
    assert (view.name, view.version, view.root_dir) == ("kept", "v1", "/save/kept")


def test_a_proxy_can_be_copied_and_is_not_sent_back_to_the_driver():
    view = views(None)
    assert copy.deepcopy({"x": view.experiment})["x"] is not None
    assert pickle.loads(pickle.dumps(view.experiment)) is None
    assert repr(view.experiment.config) == "<logger.experiment.config in the driver>"
    with contextlib.suppress(AttributeError):
        np.asarray(view.experiment)
    with pytest.raises(AttributeError):
        _ = view.__array__


VALUES = {
    "view": torch.arange(1000.0)[10:12],
    "scalar": torch.tensor(3),
    "bool": torch.tensor([True, False]),
    "bfloat16": torch.ones(2, 3, dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 2j]).conj(),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_pickled_tensor_keeps_values_dtype_and_shape(name):
    value = VALUES[name]
    packed = snapshot({"x": [value]})
    assert len(packed) < 1500  # not the whole storage of a view
    arrived = pickle.loads(packed)["x"][0]
    assert arrived.dtype == value.dtype
    assert torch.equal(arrived, value)


def test_tensors_with_gradients_are_pickled_detached():
    weight = torch.nn.Parameter(torch.ones(3))
    arrived, product = pickle.loads(snapshot((weight, weight * 2)))
    assert type(arrived) is torch.nn.Parameter
    assert not arrived.requires_grad
    assert not product.requires_grad
    assert torch.equal(product, torch.full((3,), 2.0))
