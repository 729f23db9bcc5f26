"""The page's callbacks: arbitrary ones with every hook, what they see of the run, and their state."""

import inspect
import warnings

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, fit, make_data, weights_of
from torch.utils.data import DataLoader

import raylit as pl

WORKERS = [0, 2]

HOOKS = [
    name
    for name, member in vars(pl.Callback).items()
    if inspect.isfunction(member) and not name.startswith("_") and name not in ("state_dict", "load_state_dict")
]


class Recorder(pl.Callback):
    """Notes each hook with the names of its arguments' types."""

    def __init__(self):
        self.calls = []

    @property
    def names(self):
        return [name for name, _ in self.calls]


def _recording(name):
    def hook(self, trainer, pl_module, *args):
        assert type(trainer).__name__ == "TrainerView"
        assert isinstance(pl_module, pl.LightningModule)
        self.calls.append((name, tuple(type(arg).__name__ for arg in args)))

    return hook


for _name in HOOKS:
    setattr(Recorder, _name, _recording(_name))


@pytest.mark.parametrize("num_workers", WORKERS)
def test_arbitrary_callbacks_have_every_hook_of_a_fit(num_workers, tmp_path):
    recorder = Recorder()
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=1,
        callbacks=[recorder, pl.ModelCheckpoint(tmp_path)],
        logger=False,
        enable_progress_bar=False,
        limit_train_batches=1,
        limit_val_batches=1,
    )
    trainer.fit(Regression(), RegressionData(batch_size=8))
    validation = [
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_validation_end",
    ]
    assert recorder.names == [
        "setup",
        "on_fit_start",
        "on_sanity_check_start",
        *validation,
        "on_sanity_check_end",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        *validation,
        "on_train_epoch_end",
        "on_save_checkpoint",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ]
    given = dict(recorder.calls)
    assert given["setup"] == given["teardown"] == ("str",)
    assert given["on_train_batch_start"] == ("list", "int")
    assert given["on_train_batch_end"] == ("dict", "list", "int")
    assert given["on_before_backward"] == ("Tensor",)
    assert given["on_before_zero_grad"] == given["on_before_optimizer_step"] == ("SGD",)
    assert given["on_validation_batch_start"] == ("list", "int")
    assert given["on_save_checkpoint"] == ("dict",)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_arbitrary_callbacks_have_every_hook_of_the_other_stages(stage, quiet):
    recorder = Recorder()
    trainer = pl.Trainer(callbacks=recorder, **quiet)
    getattr(trainer, stage)(Regression(), DataLoader(make_data(4), batch_size=4))
    hooks = ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")
    assert recorder.names == ["setup", *(f"on_{stage}_{hook}" for hook in hooks), "teardown"]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_on_exception_hears_what_went_wrong(num_workers, tmp_path, quiet):
    class Leaves(pl.Callback):
        def __init__(self, path):
            self.path = path

        def on_exception(self, trainer, pl_module, exception):
            (self.path / f"rank{trainer.global_rank}").write_text(repr(exception))

    class Breaks(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ValueError("a bad batch")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="a bad batch"):
        pl.fit(Breaks(), RegressionData(), num_workers=num_workers, max_epochs=1, callbacks=Leaves(tmp_path), **quiet)
    texts = {path.read_text() for path in tmp_path.glob("rank*")}
    assert "ValueError('a bad batch')" in texts


class Sees(pl.Callback):
    """What callbacks commonly ask the trainer."""

    def __init__(self):
        self.seen = {}
        self.last = []

    def on_fit_start(self, trainer, pl_module):
        self.seen["start"] = (trainer.state.fn, trainer.state.status, trainer.max_epochs, trainer.world_size)

    def on_validation_start(self, trainer, pl_module):
        self.seen["sanity" if trainer.sanity_checking else "validation"] = (trainer.state.fn, trainer.state.stage)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.last.append(trainer.is_last_batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.last.append(trainer.is_last_batch)

    def on_train_epoch_end(self, trainer, pl_module):
        (config,) = trainer.lr_scheduler_configs
        self.seen["epoch"] = {
            "where": (trainer.current_epoch, trainer.global_step, trainer.state.stage, trainer.should_stop),
            "sizes": (trainer.num_training_batches, trainer.num_val_batches),
            "schedule": (config.interval, config.frequency, config.name, type(config.scheduler).__name__),
            "optimizer": [type(optimizer).__name__ for optimizer in trainer.optimizers],
            "metrics": sorted(trainer.callback_metrics),
            "loaders": (type(trainer.train_dataloader).__name__, type(trainer.val_dataloaders).__name__),
            "data": type(trainer.datamodule).__name__,
            "model": trainer.lightning_module is pl_module,
        }


class Scheduled(Regression):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "mine"}}


@pytest.mark.parametrize("num_workers", WORKERS)
def test_what_callbacks_see_of_the_trainer(num_workers, quiet):
    sees = Sees()
    data = RegressionData(batch_size=4 if num_workers else 8)
    trainer = pl.fit(Scheduled(), data, num_workers=num_workers, max_epochs=1, callbacks=sees, **quiet)
    assert sees.seen["start"] == ("fit", "running", 1, max(1, num_workers))
    assert sees.seen["sanity"] == ("fit", "sanity_check")
    assert sees.seen["validation"] == ("fit", "validate")
    assert sees.seen["epoch"] == {
        "where": (0, 6, "train", False),
        "sizes": (6, [3]),
        "schedule": ("step", 1, "mine", "StepLR"),
        "optimizer": ["SGD"],
        "metrics": ["train_loss", "val_loss"],
        "loaders": ("DataLoader", "DataLoader"),
        "data": "RegressionData",
        "model": True,
    }
    assert sees.last == [False] * 10 + [True] * 2
    assert (trainer.state.fn, trainer.state.status, trainer.state.finished) == ("fit", "finished", True)


def test_several_validation_loaders_are_a_list(quiet):
    class Lists(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

        def on_train_start(self):
            self.num_loaders = len(self.trainer.val_dataloaders)

    model, loader = Lists(), DataLoader(make_data(8), batch_size=4)
    pl.Trainer(max_epochs=1, **quiet).fit(model, loader, [loader, loader])
    assert model.num_loaders == 2


def test_the_state_tells_how_the_last_run_ended(quiet):
    class Breaks(Regression):
        def training_step(self, batch, batch_idx):
            raise ValueError("no")

    trainer = pl.Trainer(max_epochs=1, **quiet)
    assert trainer.state.status == "initializing"
    with pytest.raises(ValueError, match="no"):
        trainer.fit(Breaks(), RegressionData())
    assert (trainer.state.status, trainer.state.stopped) == ("interrupted", True)
    trainer.validate(Regression(), RegressionData(), verbose=False)
    assert (trainer.state.fn, trainer.state.status) == ("validate", "finished")


class Counts(pl.Callback):
    """Counts batches; its state is in the checkpoint."""

    def __init__(self, name="one"):
        self.name = name
        self.num_batches = 0
        self.found = None

    @property
    def state_key(self):
        return self._generate_state_key(name=self.name)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.num_batches += 1

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["extra"] = {"step": trainer.global_step}

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.found = checkpoint["extra"]

    def state_dict(self):
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state_dict):
        self.num_batches = state_dict["num_batches"]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_the_state_of_callbacks_is_in_the_checkpoint_and_goes_on(num_workers, tmp_path):
    saved = pl.ModelCheckpoint(tmp_path, every_n_train_steps=8)
    settings = {"num_workers": num_workers, "enable_checkpointing": True}
    fit(Regression(), callbacks=[Counts("one"), Counts("two"), saved], **settings)
    checkpoint = torch.load(saved.best_model_path, weights_only=True)
    assert checkpoint["callbacks"]["Counts{'name': 'two'}"] == {"num_batches": 8}
    assert checkpoint["extra"] == {"step": 8}

    again = Counts("one")
    fit(Regression(), num_workers=num_workers, callbacks=again, ckpt_path=saved.best_model_path)
    assert again.num_batches == 12
    assert again.found == {"step": 8}


def test_two_states_under_one_key_are_an_error():
    with pytest.raises(pl.ConfigError, match=r"two callbacks keep their state under .*'name': 'one'"):
        pl.Trainer(callbacks=[Counts(), Counts()])
    pl.Trainer(callbacks=[pl.ModelCheckpoint("a"), pl.ModelCheckpoint("b", every_n_train_steps=3)])
    with pytest.raises(pl.ConfigError, match="leave one ModelCheckpoint out"):
        pl.Trainer(callbacks=[pl.ModelCheckpoint("a"), pl.ModelCheckpoint("b")])


class Saves(pl.Callback):
    def __init__(self, path, weights_only=False):
        self.path = path
        self.weights_only = weights_only

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 8:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_callback_saves_the_whole_run_in_mid_epoch(num_workers, tmp_path):
    torch.manual_seed(1)
    model = Regression(dropout=0.3)
    weights = weights_of(model)
    path = tmp_path / "deep" / "mine.ckpt"
    fit(model, num_workers=num_workers, callbacks=Saves(path))
    resumed = Regression(dropout=0.3)
    resumed.load_state_dict(weights)
    trainer = fit(resumed, num_workers=num_workers, ckpt_path=path)
    assert trainer.global_step == 12
    assert_same_weights(weights_of(resumed), weights_of(model))


def test_a_callback_may_save_weights_only(tmp_path):
    fit(Regression(), callbacks=Saves(tmp_path / "mine.ckpt", weights_only=True))
    checkpoint = torch.load(tmp_path / "mine.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert "optimizer_states" not in checkpoint


@pytest.mark.parametrize("num_workers", WORKERS)
def test_after_fit_the_trainer_saves_the_whole_run_where_it_has_a_checkpoint_of_it(num_workers, tmp_path):
    model = Regression(optimizer="adam")
    settings = {"num_workers": num_workers, "enable_checkpointing": True}
    trainer = fit(model, **settings)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    checkpoint = torch.load(tmp_path / "mine.ckpt", weights_only=True)
    assert_same_weights(dict(checkpoint["state_dict"]), weights_of(model))
    more = fit(Regression(optimizer="adam"), ckpt_path=tmp_path / "mine.ckpt", max_epochs=3, **settings)
    assert more.global_step == 18


def test_after_fit_without_a_checkpoint_the_trainer_saves_weights(tmp_path):
    model = Regression(width=4)
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = Regression.load_from_checkpoint(tmp_path / "mine.ckpt")
    assert_same_weights(weights_of(loaded), weights_of(model))
    with pytest.raises(pl.CheckpointError, match="weights only"):
        fit(Regression(width=4), ckpt_path=tmp_path / "mine.ckpt")
    with pytest.raises(pl.ConfigError, match="call fit"):
        pl.Trainer().save_checkpoint(tmp_path / "none.ckpt")


class Configures(Regression):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def configure_callbacks(self):
        return self.returned


def test_the_modules_callbacks_replace_those_of_their_type(quiet):
    own = [pl.EarlyStopping("val_loss", patience=7), Counts("module")]
    others = [pl.EarlyStopping("val_loss", patience=1), Recorder(), Counts("trainer")]
    trainer = pl.Trainer(max_epochs=1, callbacks=others, **quiet)
    trainer.fit(Configures(own), RegressionData())
    assert trainer.early_stopping_callback is own[0]
    assert trainer.callbacks == [others[1], own[1], own[0]]
    assert own[1].num_batches == 6
    assert others[2].num_batches == 0


def test_the_modules_checkpointing_replaces_the_default_and_comes_last(tmp_path):
    own = pl.ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_progress_bar=False)
    trainer.fit(Configures(own), RegressionData())
    assert trainer.checkpoint_callback is own
    assert trainer.callbacks[-1] is own
    assert own.best_model_path


def test_the_modules_callbacks_are_part_of_the_plan(quiet):
    trainer = pl.Trainer(max_epochs=1, **quiet)
    trainer.fit(Configures(pl.GradientAccumulationScheduler({0: 3})), RegressionData())
    assert trainer.global_step == 2


def test_what_configure_callbacks_returns_is_checked(quiet):
    with pytest.raises(pl.ConfigError, match="configure_callbacks returned a str"):
        pl.fit(Configures(["early"]), RegressionData(), max_epochs=1, **quiet)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_functions_are_callbacks_too(num_workers, quiet):
    seen = []

    def count(trainer, pl_module, outputs, batch, batch_idx):
        pl_module.num_counted = getattr(pl_module, "num_counted", 0) + 1

    model = Regression()
    callback = pl.LambdaCallback(
        on_train_batch_end=count,
        on_train_epoch_end=lambda trainer, pl_module: seen.append(trainer.current_epoch),
        setup=lambda trainer, pl_module, stage: setattr(pl_module, "stage_seen", stage),
        on_train_end=None,
    )
    data = RegressionData(batch_size=4 if num_workers else 8)
    pl.fit(model, data, num_workers=num_workers, max_epochs=2, callbacks=callback, **quiet)
    assert (model.num_counted, model.stage_seen) == (12, "fit")
    if num_workers == 0:
        assert seen == [0, 1]


def test_a_function_for_no_hook_is_an_error():
    with pytest.raises(pl.ConfigError, match="did you mean on_train_epoch_end"):
        pl.LambdaCallback(on_train_epoch_ends=print)
    with pytest.raises(pl.ConfigError, match="must be a function"):
        pl.LambdaCallback(on_train_end=3)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_unhashable_callbacks_with_lambdas_travel(num_workers, quiet):
    class Odd(pl.Callback):
        __hash__ = None

        def __init__(self):
            self.double = lambda value: 2 * value
            self.value = 1

        def __eq__(self, other):
            return True

        def on_train_epoch_end(self, trainer, pl_module):
            self.value = self.double(self.value)

    odd = Odd()
    pl.fit(Regression(), RegressionData(), num_workers=num_workers, max_epochs=2, callbacks=[odd], **quiet)
    assert odd.value == 4


def test_an_attribute_that_is_called_like_a_part_of_torch_travels(quiet):
    class Named(pl.Callback):
        def __init__(self):
            self.classes = torch.zeros(1)

        def on_train_start(self, trainer, pl_module):
            self.classes = torch.ones(1)

    named = Named()
    pl.fit(Regression(), RegressionData(), num_workers=1, max_epochs=1, callbacks=named, **quiet)
    assert named.classes.item() == 1


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_schedule_of_accumulation_equals_the_trainers_argument(num_workers):
    schedule = {0: 2, 1: 4}
    torch.manual_seed(1)
    left = Regression()
    right = Regression()
    right.load_state_dict(left.state_dict())
    scheduled = fit(left, num_workers=num_workers, callbacks=pl.GradientAccumulationScheduler(schedule))
    told = fit(right, num_workers=num_workers, accumulate_grad_batches=schedule)
    assert scheduled.global_step == told.global_step == 3 + 2
    assert_same_weights(weights_of(left), weights_of(right))


def test_a_schedule_of_accumulation_is_checked_and_stands_alone():
    schedule = pl.GradientAccumulationScheduler({2: 4})
    assert [schedule.get_accumulate_grad_batches(epoch) for epoch in range(4)] == [1, 1, 4, 4]
    assert schedule.going_to_accumulate_grad_batches()
    with pytest.raises(pl.ConfigError, match="and accumulate_grad_batches: give one"):
        pl.Trainer(callbacks=schedule, accumulate_grad_batches=2)
    with pytest.raises(pl.ConfigError, match="and a second one"):
        pl.Trainer(callbacks=[schedule, pl.GradientAccumulationScheduler({0: 2})])
    for wrong in ({}, {-1: 2}, {0: 0}, {0: 1.5}, [2]):
        with pytest.raises(pl.ConfigError, match="GradientAccumulationScheduler"):
            pl.GradientAccumulationScheduler(wrong)


def test_a_timer_tells_of_every_stage(quiet):
    timer = pl.Timer("00:01:00:00", interval="epoch")
    trainer = pl.Trainer(max_epochs=1, callbacks=timer, **quiet)
    assert (timer.start_time(), timer.end_time(), timer.time_elapsed("test")) == (None, None, 0.0)
    trainer.fit(Regression(), RegressionData())
    trainer.test(Regression(), RegressionData(), verbose=False)
    for stage in ("train", "validate", "sanity_check", "test"):
        assert 0 < timer.time_elapsed(stage) == timer.end_time(stage) - timer.start_time(stage)
    assert timer.time_elapsed("train") > timer.time_elapsed("validate")
    assert timer.time_remaining() == 3600 - timer.time_elapsed()
    assert pl.Timer().time_remaining() is None
    with pytest.raises(pl.ConfigError, match="no stage 'fit'"):
        timer.time_elapsed("fit")
    with pytest.raises(pl.ConfigError, match="interval='batch'"):
        pl.Timer(interval="batch")


def test_max_time_and_a_timer_are_one_too_many():
    with pytest.raises(pl.ConfigError, match="max_time and a Timer"):
        pl.Trainer(callbacks=pl.Timer(), max_time={"hours": 1})


def test_the_timers_end_is_logged(quiet, caplog):
    caplog.set_level("INFO")
    for verbose in (False, True):
        caplog.clear()
        pl.fit(
            Regression(), RegressionData(), max_epochs=3, callbacks=pl.Timer({"seconds": 0}, verbose=verbose), **quiet
        )
        assert ("the time limit of 0 s is reached" in caplog.text) is verbose


def test_a_summary_is_as_deep_as_asked(capsys):
    for depth, is_deep in ((1, False), (2, True), (-1, True)):
        pl.fit(
            Regression(),
            RegressionData(),
            max_epochs=1,
            callbacks=pl.ModelSummary(max_depth=depth),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        assert ("net.0" in capsys.readouterr().out) is is_deep


def test_the_names_are_in_the_callbacks_package():
    assert set(pl.callbacks.__all__) <= set(pl.__all__)
    for name in pl.callbacks.__all__:
        assert getattr(pl.callbacks, name) is getattr(pl, name)


def test_several_checkpointings_keep_their_own_files(tmp_path):
    best = pl.ModelCheckpoint(tmp_path / "best", monitor="val_loss", filename="{epoch}-{val_loss:.1f}", save_top_k=1)
    every = pl.ModelCheckpoint(tmp_path / "steps", every_n_train_steps=4, save_top_k=-1, save_weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = pl.Trainer(max_epochs=2, callbacks=[best, every], logger=False, enable_progress_bar=False)
        trainer.fit(Regression(), RegressionData())
    assert trainer.checkpoint_callback is best
    names = sorted(path.name for path in (tmp_path / "steps").glob("*.ckpt"))
    assert names == ["epoch=0-step=4.ckpt", "epoch=1-step=12.ckpt", "epoch=1-step=8.ckpt"]
    (kept,) = (tmp_path / "best").glob("*.ckpt")
    assert str(kept) == best.best_model_path
    states = torch.load(best.best_model_path, weights_only=True)["callbacks"]
    assert {best.state_key, every.state_key} <= set(states)


class Cut(Regression):
    """Fails in the batch of the second epoch."""

    is_broken = True

    def training_step(self, batch, batch_idx):
        if self.is_broken and self.global_step == 8 and self.global_rank == self.trainer.world_size - 1:
            raise ValueError("a bad batch")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_run_goes_on_from_where_an_exception_ended_it(num_workers, tmp_path):
    torch.manual_seed(1)
    whole = Regression()
    broken, resumed = Cut(), Regression()
    for other in (broken, resumed):
        other.load_state_dict(whole.state_dict())
    fit(whole, num_workers=num_workers)
    callback = pl.OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(ValueError, match="a bad batch"):
        fit(broken, num_workers=num_workers, callbacks=callback)
    assert callback.ckpt_path == str(tmp_path / "broken.ckpt")
    again = pl.OnExceptionCheckpoint(tmp_path, "broken")
    trainer = fit(resumed, num_workers=num_workers, callbacks=again, ckpt_path=callback.ckpt_path)
    assert trainer.global_step == 12
    assert_same_weights(weights_of(resumed), weights_of(whole))
    # A run that ends well has no use for it.
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_an_exception_needs_a_name():
    with pytest.raises(pl.ConfigError, match="filename=''"):
        pl.OnExceptionCheckpoint(".", "")
    with pytest.raises(pl.ConfigError, match=r"OnExceptionCheckpoint\(filename='\.\./x'\) leads out of the directory"):
        pl.OnExceptionCheckpoint(".", "../x")


@pytest.mark.parametrize("num_workers", WORKERS)
def test_what_a_hook_saves_holds_the_state_of_callbacks_in_the_driver(num_workers, tmp_path):
    """As the workers' last pause has left it."""
    saved = pl.ModelCheckpoint(tmp_path, monitor="train_loss", save_top_k=2)
    stopping = pl.EarlyStopping("train_loss", patience=5)
    path = tmp_path / "mine" / "mine.ckpt"
    settings = {"num_workers": num_workers, "enable_checkpointing": True}
    fit(Regression(), callbacks=[saved, stopping, Saves(path)], **settings)
    states = torch.load(path, weights_only=True)["callbacks"]
    ((best, score),) = states[saved.state_key]["best_k_models"].items()
    assert best == states[saved.state_key]["best_model_path"] == str(tmp_path / "epoch=0-step=6.ckpt")
    assert states[stopping.state_key]["best_score"] == score


@pytest.mark.parametrize("num_workers", WORKERS)
def test_model_checkpoint_saves_what_an_exception_leaves(num_workers, tmp_path):
    torch.manual_seed(1)
    whole = Regression()
    broken, resumed = Cut(), Regression()
    for other in (broken, resumed):
        other.load_state_dict(whole.state_dict())
    settings = {"num_workers": num_workers, "enable_checkpointing": True}
    fit(whole, num_workers=num_workers)
    saved = pl.ModelCheckpoint(tmp_path, filename="{epoch}-{step}-{train_loss:.1f}", save_on_exception=True)
    with pytest.raises(ValueError, match="a bad batch"):
        fit(broken, callbacks=saved, **settings)
    assert saved.best_model_path.startswith(str(tmp_path / "epoch=0-step=6-train_loss="))
    assert saved.newest_model_path.startswith(str(tmp_path / "epoch=1-step=8-train_loss="))
    again = pl.ModelCheckpoint(tmp_path)
    trainer = fit(resumed, callbacks=again, ckpt_path="last", **settings)
    assert trainer.global_step == 12
    assert_same_weights(weights_of(resumed), weights_of(whole))


class Raises(pl.DriverCallback):
    def on_train_pause(self, run):
        if run.state.progress.global_step == 4:
            raise ValueError("in the driver")

    def next_pause_step(self, run):
        return 4


@pytest.mark.parametrize("is_saving", [False, True])
def test_model_checkpoint_saves_at_an_exception_in_the_driver(is_saving, tmp_path):
    saved = pl.ModelCheckpoint(tmp_path, save_on_exception=is_saving, save_last=True)
    with pytest.raises(ValueError, match="in the driver"):
        fit(Regression(), callbacks=[saved, Raises()], enable_checkpointing=True)
    steps = [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")]
    assert steps == ([4, 4] if is_saving else [])
