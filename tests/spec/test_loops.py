"""The page's loops: what runs, in which order, how often, and when it ends."""

import time
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from models import Regression, RegressionData, make_data
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

import raylit as pl

STAGES = ("validation", "test", "predict")
HOOKS = [
    name
    for name in dir(pl.Callback)
    if (name.startswith("on_") and "checkpoint" not in name and name not in ("on_exception", "on_keyboard_interrupt"))
    or name in ("setup", "teardown")
]
MODULE_ONLY = [
    "configure_model",
    "configure_optimizers",
    "training_step",
    *(f"{stage}_step" for stage in STAGES),
    *(f"on_{stage}_model_eval" for stage in STAGES),
]


def recording(owner, name, base):
    def hook(self, *args, **kwargs):
        self.calls.append((owner, name))
        return getattr(base, name)(self, *args, **kwargs)

    return hook


def recorder(owner, base, names, **members):
    return type(f"Recording{base.__name__}", (base,), {**{n: recording(owner, n, base) for n in names}, **members})


RecordingModule = recorder("module", Regression, [*HOOKS, *MODULE_ONLY])
RecordingCallback = recorder("callback", pl.Callback, HOOKS)


class StagedData(RegressionData):
    def setup(self, stage):
        super().setup()


RecordingData = recorder("data", StagedData, ["prepare_data", "setup", "teardown"])


def both(*names):
    """Callbacks before the module."""
    return [(owner, name) for name in names for owner in ("callback", "module")]


def module(name):
    return [("module", name)]


def loop_of(stage, *, num_batches=1):
    batch = [
        *both(f"on_{stage}_batch_start"),
        *module(f"{stage}_step"),
        *both(f"on_{stage}_batch_end"),
    ]
    return [
        *module(f"on_{stage}_model_eval"),
        *both(f"on_{stage}_start", f"on_{stage}_epoch_start"),
        *batch * num_batches,
        *both(f"on_{stage}_epoch_end", f"on_{stage}_end"),
    ]


SETUP = [("data", "setup"), *both("setup"), *module("configure_model")]
TEARDOWN = [("data", "teardown"), *both("teardown")]
TRAINING_BATCH = [
    *both("on_train_batch_start"),
    *module("training_step"),
    *both(
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    ),
]


@pytest.fixture
def recorded():
    """Module, data module and callback that write into one list."""
    calls = []
    model, data, callback = RecordingModule(), RecordingData(batch_size=24, num_val=20), RecordingCallback()
    model.calls = data.calls = callback.calls = calls
    return model, data, callback


def test_every_hook_of_fit_comes_in_its_place(recorded, quiet):
    model, data, callback = recorded
    pl.fit(model, data, max_epochs=2, limit_val_batches=1, callbacks=callback, **quiet)
    epoch = [
        *both("on_train_epoch_start"),
        *TRAINING_BATCH * 2,
        *loop_of("validation"),
        *both("on_train_epoch_end"),
    ]
    assert model.calls == [
        ("data", "prepare_data"),
        *SETUP,
        *module("configure_optimizers"),
        *both("on_fit_start", "on_sanity_check_start"),
        *loop_of("validation"),
        *both("on_sanity_check_end", "on_train_start"),
        *epoch * 2,
        *both("on_train_end", "on_fit_end"),
        *TEARDOWN,
    ]


@pytest.mark.parametrize(("entry", "stage"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_every_hook_of_the_other_loops_comes_in_its_place(entry, stage, recorded, quiet):
    model, data, callback = recorded
    getattr(pl.Trainer(callbacks=callback, **quiet), entry)(model, datamodule=data)
    assert model.calls == [("data", "prepare_data"), *SETUP, *loop_of(stage), *TEARDOWN]


class Modes(Regression):
    """Notes mode and gradients in every step, and overrides what switches them."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.seen = []

    def _note(self, where):
        self.seen.append((where, self.training, torch.is_grad_enabled()))

    def training_step(self, batch, batch_idx):
        self._note("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._note("validation")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self._note("test")
        super().test_step(batch, batch_idx)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_gradients_and_modes_are_on_in_training_off_in_evaluation_and_on_again(inference_mode, quiet):
    model = Modes()
    model.eval()
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=2, val_check_interval=1, inference_mode=inference_mode, **quiet
    )
    with torch.no_grad():  # whatever the caller has set
        trainer.fit(model, RegressionData(num_val=4))
    assert model.seen == [
        ("validation", False, False),
        *[("train", True, True), ("validation", False, False)] * 2,
    ]
    model.seen.clear()
    model.train()
    trainer.test(model, RegressionData(num_val=4).loader_for_test(), verbose=False)
    assert model.seen == [("test", False, False)]
    assert model.training
    assert torch.is_grad_enabled()


def test_hooks_that_switch_modes_may_be_overridden(quiet):
    class KeepsDropout(Modes):
        def on_validation_model_eval(self):
            self.net.eval()

        def on_validation_model_train(self):
            self.net[0].train()

        def on_train_batch_start(self, batch, batch_idx):
            self.modes = (self.net.training, self.net[0].training)

    model = KeepsDropout()
    pl.fit(model, RegressionData(num_val=4), max_epochs=1, limit_train_batches=1, **quiet)
    assert model.seen == [("validation", True, False), ("train", True, True), ("validation", True, False)]
    assert model.modes == (False, True)


class Counts(pl.DriverCallback):
    """At which batch, over all epochs, each validation came; how many steps each epoch had by its end."""

    def __init__(self):
        self.validations = []
        self.epochs = []

    def on_validation_end(self, run):
        progress = run.state.progress
        self.validations.append(progress.batches_before + progress.batch)

    def on_train_epoch_end(self, run):
        self.epochs.append(run.state.progress.global_step)


def counted(model=None, train=None, **arguments):
    counts = Counts()
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    data = RegressionData()
    data.setup()
    trainer = pl.Trainer(callbacks=counts, **dict.fromkeys(switches, False), **arguments)
    trainer.fit(model or Regression(), data.train_dataloader() if train is None else train, data.val_dataloader())
    return trainer, counts


# 6 training batches an epoch. Lightning 2.6 counts the same.
@pytest.mark.parametrize(
    ("arguments", "validations", "epochs", "current_epoch", "global_step"),
    [
        ({"max_epochs": 3}, [6, 12, 18], [6, 12, 18], 3, 18),
        ({"max_epochs": 0}, [], [], 0, 0),
        ({"max_steps": 0}, [], [], 0, 0),
        ({"max_epochs": -1, "max_steps": 7}, [6], [6, 7], 2, 7),
        ({"max_epochs": 1, "max_steps": 100}, [6], [6], 1, 6),
        ({"max_epochs": 1, "val_check_interval": 0.25}, [1, 2, 3, 4, 5, 6], [6], 1, 6),
        ({"max_epochs": 2, "val_check_interval": 0.5}, [3, 6, 9, 12], [6, 12], 2, 12),
        ({"max_epochs": 2, "val_check_interval": 1}, list(range(1, 13)), [6, 12], 2, 12),
        ({"max_epochs": 2, "val_check_interval": 4}, [4, 10], [6, 12], 2, 12),
        (
            {"max_epochs": 4, "val_check_interval": 3, "check_val_every_n_epoch": 2},
            [9, 12, 21, 24],
            [6, 12, 18, 24],
            4,
            24,
        ),
        (
            {"max_epochs": 4, "val_check_interval": 8, "check_val_every_n_epoch": None},
            [8, 16, 24],
            [6, 12, 18, 24],
            4,
            24,
        ),
        (
            {"max_epochs": 3, "val_check_interval": 4, "check_val_every_n_epoch": None, "limit_train_batches": 3},
            [4, 8],
            [3, 6, 9],
            3,
            9,
        ),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, [3], [3], 1, 3),
        ({"max_epochs": 1, "limit_train_batches": 1}, [1], [1], 1, 1),
        ({"max_epochs": 1, "limit_train_batches": 100}, [6], [6], 1, 6),
        ({"max_epochs": 1, "limit_train_batches": 0}, [], [], 0, 0),
        ({"max_epochs": 1, "limit_val_batches": 0}, [], [6], 1, 6),
        ({"max_epochs": 1, "accumulate_grad_batches": 4, "val_check_interval": 0.5}, [3, 6], [2], 1, 2),
        ({"fast_dev_run": True}, [1], [1], 1, 1),
        ({"fast_dev_run": 3, "max_epochs": 9}, [3], [3], 1, 3),
    ],
)
def test_loops_run_as_often_as_the_arguments_say(arguments, validations, epochs, current_epoch, global_step):
    trainer, counts = counted(**arguments)
    assert (counts.validations, counts.epochs) == (validations, epochs)
    assert (trainer.current_epoch, trainer.global_step) == (current_epoch, global_step)


class Stops(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("least", "global_step"),
    [({}, 2), ({"min_steps": 4}, 4), ({"min_steps": 8}, 8), ({"min_epochs": 2}, 12), ({"min_epochs": 1}, 6)],
)
def test_a_stop_waits_for_the_least_of_epochs_and_steps(least, global_step, quiet):
    trainer = pl.fit(Regression(), RegressionData(), max_epochs=4, callbacks=Stops(2), **least, **quiet)
    assert trainer.global_step == global_step


class StopsFromTheDriver(pl.DriverCallback):
    def on_step_metrics(self, run):
        if run.state.progress.global_step == 4:
            run.stop("enough")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stop_of_the_drivers_ends_the_epoch_under_way(num_workers, quiet):
    data = DataLoader(make_data(40_000), batch_size=2)
    trainer = pl.fit(
        Regression(),
        data,
        num_workers=num_workers,
        callbacks=StopsFromTheDriver(),
        log_every_n_steps=4,
        limit_val_batches=0,
        **quiet,
    )
    assert 4 <= trainer.global_step < 10_000
    assert trainer.current_epoch == 1


def test_an_epoch_too_short_for_its_validation_interval_is_an_error(quiet):
    with pytest.raises(pl.ConfigError, match=r"val_check_interval=7 is more than the 6 .*check_val_every_n_epoch=None"):
        pl.fit(Regression(), RegressionData(), val_check_interval=7, **quiet)


class Stream(IterableDataset):
    def __init__(self, num_samples):
        self.data = make_data(num_samples)

    def __iter__(self):
        return iter(self.data[index] for index in range(len(self.data)))


@pytest.mark.parametrize(
    ("arguments", "validations"),
    [
        ({}, [6, 12]),
        ({"val_check_interval": 4}, [4, 10]),
        ({"limit_train_batches": 2}, [2, 4]),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10]),
    ],
)
def test_an_iterable_of_unknown_length_takes_counts(arguments, validations):
    _, counts = counted(train=DataLoader(Stream(48), batch_size=8), max_epochs=2, **arguments)
    assert counts.validations == validations


@pytest.mark.parametrize("name", ["limit_train_batches", "val_check_interval"])
def test_an_iterable_of_unknown_length_takes_no_fraction(name):
    with pytest.raises(pl.ConfigError, match=f"{name}=0.5 of a train.*without a length: give an int, or 1.0"):
        counted(train=DataLoader(Stream(48), batch_size=8), **{name: 0.5})


def test_a_fraction_that_leaves_no_batch_is_an_error():
    with pytest.raises(pl.ConfigError, match=r"limit_train_batches=0.1 of the train loader is less than one batch"):
        counted(limit_train_batches=0.1)
    with pytest.raises(pl.ConfigError, match=r"limit_val_batches=0.1 of the val loader"):
        counted(limit_val_batches=0.1)


class Validations(Regression):
    """How many validation batches came before training, and how many after."""

    def __init__(self):
        super().__init__()
        self.num_before = self.num_after = 0
        self.logged_before = None

    def validation_step(self, batch, batch_idx):
        if self.global_step == 0:
            self.num_before += 1
        else:
            self.num_after += 1
        super().validation_step(batch, batch_idx)

    def on_train_start(self):
        self.logged_before = dict(self.trainer.callback_metrics)


# 3 validation batches.
@pytest.mark.parametrize(
    ("arguments", "num_before", "num_after"),
    [
        ({}, 2, 3),
        ({"num_sanity_val_steps": 0}, 0, 3),
        ({"num_sanity_val_steps": -1}, 3, 3),
        ({"num_sanity_val_steps": 9}, 3, 3),
        ({"limit_val_batches": 1, "num_sanity_val_steps": -1}, 1, 1),
        ({"limit_val_batches": 0.67}, 2, 2),
        ({"limit_val_batches": 0}, 0, 0),
        ({"fast_dev_run": True}, 0, 1),
    ],
)
def test_validation_batches_are_checked_before_training_and_leave_nothing_behind(arguments, num_before, num_after):
    model = Validations()
    counted(model, max_epochs=1, **arguments)
    assert (model.num_before, model.num_after) == (num_before, num_after)
    assert model.logged_before == {}


class Steps(Regression):
    def __init__(self):
        super().__init__()
        self.num_steps = dict.fromkeys(("train", "validation", "test", "predict"), 0)

    def training_step(self, batch, batch_idx):
        self.num_steps["train"] += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.num_steps["validation"] += 1
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.num_steps["test"] += 1
        super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.num_steps["predict"] += 1
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize(("given", "count"), [(True, 1), (2, 2)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_fast_dev_run_hits_every_loop_once_and_writes_nothing(given, count, num_workers, tmp_path):
    model, data = Steps(), RegressionData(batch_size=4)
    trainer = pl.Trainer(
        fast_dev_run=given, num_workers=num_workers, early_stop_callback=True, callbacks=[pl.ModelCheckpoint()]
    )
    trainer.fit(model, data)
    trainer.test(model, datamodule=data, verbose=False)
    trainer.predict(model, datamodule=data)
    assert model.num_steps == dict.fromkeys(model.num_steps, count)
    assert list(tmp_path.iterdir()) == []


def test_limits_of_test_and_prediction(quiet):
    model, data = Steps(), RegressionData()
    trainer = pl.Trainer(limit_test_batches=1, limit_predict_batches=0.67, **quiet)
    trainer.test(model, datamodule=data, verbose=False)
    assert len(trainer.predict(model, datamodule=data)) == 2
    assert model.num_steps == {"train": 0, "validation": 0, "test": 1, "predict": 2}


class Slow(Regression):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_max_time_ends_training_at_one_step_for_all(num_workers, quiet):
    model = Slow()
    trainer = pl.fit(
        model,
        DataLoader(make_data(8000), batch_size=2),
        num_workers=num_workers,
        max_time={"seconds": 1},
        limit_val_batches=0,
        **quiet,
    )
    assert 0 < trainer.global_step == len(model.losses) < 4000  # an epoch takes 80 s at least
    assert trainer.current_epoch == 1


def test_max_time_honours_the_least_number_of_steps_and_validates_still(quiet):
    trainer, counts = counted(max_time="00:00:00:00", min_steps=8, min_epochs=1, max_epochs=5)
    assert trainer.global_step == 8
    assert counts.validations == [6, 8]


def test_a_resumed_runs_time_goes_on(tmp_path, quiet):
    timer = pl.Timer({"hours": 1})
    trainer = pl.fit(Slow(), RegressionData(), max_epochs=1, callbacks=timer, **{**quiet, "enable_checkpointing": True})
    assert timer.time_elapsed() > 6 * 0.02
    again = pl.Timer({"hours": 1})
    path = trainer.checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match="nothing is left to train"):
        pl.fit(Slow(), RegressionData(), max_epochs=1, callbacks=again, ckpt_path=path, **quiet)
    # The checkpoint, which the time comes from, was taken after all six steps.
    assert again.time_elapsed() >= 6 * 0.02


class Ends(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


def test_minus_one_from_on_train_batch_start_ends_the_epoch(quiet):
    trainer, counts = counted(Ends(), max_epochs=2)
    assert counts.epochs == [2, 4]
    assert trainer.current_epoch == 2


class ByHand(Regression):
    def training_step(self, batch):
        x, y = batch
        return functional.mse_loss(self(x), y)


def test_the_training_loop_is_the_pages_pseudocode(quiet):
    data = DataLoader(make_data(), batch_size=8)
    model, by_hand = ByHand(), ByHand()
    by_hand.load_state_dict(model.state_dict())
    pl.fit(model, data, max_epochs=2, limit_val_batches=0, **quiet)
    optimizer = by_hand.configure_optimizers()
    for _ in range(2):
        for batch in data:
            loss = by_hand.training_step(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for left, right in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(left, right)


def test_deterministic_runs_ask_torch_for_it_and_give_the_same_numbers(quiet):
    class Asks(Regression):
        def training_step(self, batch, batch_idx):
            self.is_deterministic = torch.are_deterministic_algorithms_enabled()
            return super().training_step(batch, batch_idx)

    losses = []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        model = Asks(dropout=0.5)
        pl.fit(model, RegressionData(), max_epochs=1, deterministic=True, **quiet)
        assert model.is_deterministic
        losses.append(model.losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("arguments", "expected"), [({"benchmark": True}, True), ({"deterministic": True}, False)])
def test_benchmark_is_torchs_switch_and_off_where_runs_are_deterministic(arguments, expected, quiet, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not expected)

    class Asks(Regression):
        def on_train_start(self):
            self.is_benchmarking = torch.backends.cudnn.benchmark

    model = Asks()
    pl.fit(model, RegressionData(), max_epochs=1, **arguments, **quiet)
    assert model.is_benchmarking is expected
    assert torch.backends.cudnn.benchmark is not expected


class Timed(Regression):
    """Notes when training and validations began and ended."""

    def __init__(self):
        super().__init__()
        self.times_s = []
        self.epochs = []

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)

    def on_train_start(self):
        self.times_s.append((time.monotonic(), time.monotonic()))

    def on_validation_start(self):
        self.start_s = time.monotonic()

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.times_s.append((self.start_s, time.monotonic()))
            self.epochs.append((self.current_epoch, self.trainer.num_batches_done))


@pytest.mark.parametrize("every", [1, None])
def test_validation_comes_after_a_time(every, quiet):
    """However slow the machine is: at most 15 steps of 10 ms are expected to fit into the interval, after the first."""
    model = Timed()
    interval = timedelta(milliseconds=150)
    limits = {"max_epochs": 2, "val_check_interval": interval, "check_val_every_n_epoch": every}
    pl.fit(model, RegressionData(num_train=240), **limits, **quiet)
    assert model.epochs[0][0] == 0
    assert model.epochs[0][1] < 30
    # The driver's time from one validation to the next is a bit longer than that between these hooks, and its first
    # interval begins before the workers know of the training.
    gaps_s = [start - before for (_, before), (start, _) in pairwise(model.times_s[1:])]
    assert all(gap_s >= 0.15 for gap_s in gaps_s)


def test_a_time_that_is_not_over_leaves_validation_out_and_one_that_is_waits_for_its_epoch(quiet):
    model = Timed()
    trainer = pl.Trainer(max_epochs=3, val_check_interval="00:01:00:00", **quiet)
    trainer.fit(model, RegressionData())
    assert model.epochs == []
    trainer = pl.Trainer(
        max_epochs=4, val_check_interval={"milliseconds": 50}, check_val_every_n_epoch=4, num_workers=0, **quiet
    )
    trainer.fit(model, RegressionData())
    assert model.epochs[0] == (3, 1)
