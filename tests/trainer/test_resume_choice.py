"""`ckpt_path` and `resume`: the words, what they find in this Trainer's runs and in earlier ones, and what they say."""

import argparse
import os

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, weights_of

import raylit as pl

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "num_workers": 0}


def trained(max_epochs, *, model=None, **arguments):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": max_epochs, "resume": "auto", **arguments})
    torch.manual_seed(3)
    model = model or Regression()
    trainer.fit(model, RegressionData())
    return trainer, model


class Chances:
    """The directory of logs and checkpoints that is asked for, and where the checkpoints go then."""

    DEFAULT = ({}, "lightning_logs/version_0/checkpoints")
    NAMED = ({"logger": lambda: pl.TensorBoardLogger("logs", name="mine")}, "logs/mine/version_0/checkpoints")
    VERSION = ({"logger": lambda: pl.CSVLogger("logs", version="this")}, "logs/lightning_logs/this/checkpoints")
    NO_LOGGER = ({"logger": lambda: False, "default_root_dir": lambda: "root"}, "root/checkpoints")
    GIVEN = ({"callbacks": lambda: pl.ModelCheckpoint("given")}, "given")
    URL = ({"callbacks": lambda: pl.ModelCheckpoint("memory://bucket/given")}, "memory://bucket/given")


@pytest.mark.parametrize("name", ["DEFAULT", "NAMED", "VERSION", "NO_LOGGER", "GIVEN", "URL"])
def test_auto_continues_the_newest_run_and_begins_one_where_there_is_none(name, capsys, tmp_path):
    options, directory = getattr(Chances, name)

    def run(max_epochs):
        return trained(max_epochs, **{key: make() for key, make in options.items()})

    _, reference = trained(4, resume=None, logger=False, default_root_dir="elsewhere")
    first, _ = run(2)
    assert "resume='auto': no checkpoint of an earlier run is in" in capsys.readouterr().err
    second, model = run(4)
    said = capsys.readouterr().err
    assert f"resume='auto': continues {first.checkpoint_callback.newest_model_path}, of epoch 1, step 12" in said
    assert (second.current_epoch, second.global_step, len(model.losses)) == (4, 24, 12)
    assert_same_weights(weights_of(model), weights_of(reference))
    assert directory in second.checkpoint_callback.newest_model_path
    if "://" not in directory:
        files = {file for file in os.listdir(directory) if file.endswith(".ckpt")}
        assert "epoch=3-step=24.ckpt" in files
        assert "epoch=2-step=18.ckpt" not in files


def test_a_run_that_is_continued_goes_on_in_its_own_log(capsys):
    loggers = [pl.CSVLogger("logs", name="a"), pl.CSVLogger("logs", name="b")]
    trained(1, logger=loggers, resume=None)
    trained(2, logger=[pl.CSVLogger("logs", name="a"), pl.CSVLogger("logs", name="b")])
    assert os.listdir("logs/a") == os.listdir("logs/b") == ["version_0"]
    trained(2, logger=pl.CSVLogger("logs", name="a"), resume=None)
    assert sorted(os.listdir("logs/a")) == ["version_0", "version_1"]


def test_a_damaged_newest_file_is_named_and_the_one_before_it_continued(capsys):
    saving = {"callbacks": pl.ModelCheckpoint("saved", filename="{epoch}", save_top_k=-1, monitor="step", mode="max")}
    trained(3, **saving)
    with open("saved/epoch=2.ckpt", "r+b") as file:
        file.seek(3000)
        file.write(b"\xff" * 200)
    saving = {"callbacks": pl.ModelCheckpoint("saved", filename="{epoch}", save_top_k=-1, monitor="step", mode="max")}
    with pytest.warns(UserWarning, match=r"epoch=2.ckpt is damaged"):
        trainer, model = trained(4, **saving)
    assert "continues" in (said := capsys.readouterr().err)
    assert "epoch=1.ckpt, of epoch 1, step 12" in said
    assert (trainer.current_epoch, len(model.losses)) == (4, 12)


@pytest.mark.filterwarnings("ignore:the checkpoint directory")
def test_weights_alone_are_not_continued(capsys):
    trained(1, callbacks=pl.ModelCheckpoint("saved", save_weights_only=True))
    trainer, _ = trained(1, callbacks=pl.ModelCheckpoint("saved"))
    assert trainer.global_step == 6
    assert capsys.readouterr().err.count("a new run begins") == 2


def test_a_finished_run_says_that_nothing_is_left(capsys):
    trained(2)
    for max_epochs in (2, 1):
        with pytest.warns(
            UserWarning, match=rf"nothing is left to train: .* epoch 2, step 12, the limit is .*={max_epochs}"
        ):
            trainer, model = trained(max_epochs)
        assert not model.losses
        assert trainer.current_epoch == 2


def test_another_model_names_the_first_keys_that_do_not_fit(capsys):
    class Deeper(Regression):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    trained(1, model=Deeper())
    with pytest.raises(pl.CheckpointError, match=r"checkpoint of this Regression: unexpected extra.weight"):
        trained(2)


class Stepped(Regression):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regression(optimizer="adam"), r"\.ckpt has no betas, eps for Adam: fit resumes with"),
        (Stepped, r"of a run with 0 learning rate schedulers, and there are 1 now: fit resumes with"),
    ],
)
def test_other_optimizers_are_not_continued(make, message):
    trained(1)
    with pytest.raises(pl.CheckpointError, match=message):
        trained(2, model=make())


@pytest.mark.parametrize("path", ["", 5, True])
def test_what_is_no_path_is_an_error(path):
    with pytest.raises(pl.ConfigError, match="must be a path, a URL, 'best' or 'last', and in fit 'auto'"):
        trained(1, resume=path)


def test_a_dev_run_neither_continues_nor_says_anything(capsys):
    trained(1)
    capsys.readouterr()
    _, model = trained(1, fast_dev_run=True)
    assert len(model.losses) == 1
    assert capsys.readouterr().err == ""


def test_last_and_best_are_found_in_earlier_runs_for_every_entry_point():
    saving = pl.ModelCheckpoint("saved", monitor="val_loss", save_last=True)
    # The last epoch is not the best.
    trainer, model = trained(2, model=Regression(lr=1.9), resume=None, callbacks=saving)
    assert "epoch=0" in saving.best_model_path

    def fresh(**options):
        saving = pl.ModelCheckpoint("saved", monitor="val_loss", save_last=True)
        return pl.Trainer(**QUIET, logger=False, callbacks=saving, **options)

    of_best = trainer.validate(model, ckpt_path="best", verbose=False, datamodule=RegressionData())
    of_last = trainer.validate(model, ckpt_path="last", verbose=False, datamodule=RegressionData())
    assert of_best != of_last
    for word, expected in (("best", of_best), ("last", of_last)):
        other = Regression(lr=0.1)
        assert fresh().validate(other, ckpt_path=word, verbose=False, datamodule=RegressionData()) == expected
        assert len(fresh().predict(other, ckpt_path=word, datamodule=RegressionData())) == 3
        assert fresh().test(other, ckpt_path=word, verbose=False, datamodule=RegressionData())
    going_on = fresh(max_epochs=3)
    going_on.fit(Regression(), datamodule=RegressionData(), ckpt_path="last")
    assert going_on.global_step == 18


@pytest.mark.parametrize("word", ["best", "last"])
def test_a_word_without_a_checkpoint_says_where_it_looked(word):
    trainer = pl.Trainer(**QUIET, logger=False, default_root_dir="root")
    for call in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(pl.ConfigError, match=rf"ckpt_path='{word}': this Trainer has saved no .*/root; call fit"):
            call(Regression(), datamodule=RegressionData(), ckpt_path=word)


def test_a_file_that_is_not_there_names_those_that_are(tmp_path):
    trained(1, callbacks=pl.ModelCheckpoint("saved", filename="this-one"))
    with pytest.raises(pl.CheckpointError, match=r"no checkpoint saved/that-one.ckpt. In saved: this-one.ckpt"):
        pl.Trainer(**QUIET).fit(Regression(), RegressionData(), ckpt_path="saved/that-one.ckpt")


@pytest.fixture
def with_an_object():
    """A checkpoint of epoch 1, step 6, that holds an object, as other programs write them."""
    trainer, _ = trained(1, resume=None, callbacks=pl.ModelCheckpoint("saved"))
    path = trainer.checkpoint_callback.newest_model_path
    torch.save({**torch.load(path, weights_only=True), "theirs": argparse.Namespace(a=1)}, path)
    return path


class Reads(Regression):
    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["theirs"].a == 1
        self.has_read = True


@pytest.mark.parametrize("entry", [pl.fit, pl.validate, pl.test, pl.predict])
def test_an_entry_point_unpickles_objects_only_with_consent(entry, with_an_object):
    arguments = {**QUIET, "logger": False, "ckpt_path": with_an_object, "datamodule": RegressionData()}
    arguments |= {"max_epochs": 2, "callbacks": pl.ModelCheckpoint("saved")} if entry is pl.fit else {}
    for weights_only in ({}, {"weights_only": None}, {"weights_only": True}):
        with pytest.raises(pl.CheckpointError, match=r"pickled objects \(argparse\.Namespace\).*weights_only=False"):
            entry(Reads(), **arguments, **weights_only)
    model = Reads()
    entry(model, **arguments, weights_only=False)
    assert model.has_read
    assert len(model.losses) == (6 if entry is pl.fit else 0)


@pytest.mark.parametrize("word", ["auto", "last", "best"])
def test_the_words_unpickle_objects_only_with_consent(word, with_an_object):
    arguments = {"logger": False, "resume": word, "max_epochs": 2, "callbacks": pl.ModelCheckpoint("saved")}
    trainer, model = pl.Trainer(**QUIET, **arguments), Reads()
    with pytest.raises(pl.CheckpointError, match=r"pickled objects .*weights_only=False"):
        trainer.fit(model, RegressionData())
    trainer.fit(model, RegressionData(), weights_only=False)
    assert (trainer.global_step, len(model.losses)) == (12, 6)


def test_load_from_checkpoint_takes_none_for_safe(with_an_object):
    with pytest.raises(pl.CheckpointError, match=r"pickled objects .*weights_only=False"):
        Regression.load_from_checkpoint(with_an_object, weights_only=None)
    assert Reads.load_from_checkpoint(with_an_object, weights_only=False).has_read


class Notes(Regression):
    """Notes in hooks what they are told of the checkpoint."""

    def setup(self, stage=None):
        self.told = self.trainer.ckpt_path


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_a_word_or_a_path_needs_no_model_after_a_fit(entry, tmp_path):
    saved = pl.ModelCheckpoint(tmp_path / "saved", monitor="step", save_top_k=-1)
    trainer, model = trained(2, model=Notes(), callbacks=saved, resume=None)
    assert trainer.ckpt_path is model.told is None
    first, second = str(tmp_path / "saved" / "epoch=0-step=6.ckpt"), str(tmp_path / "saved" / "epoch=1-step=12.ckpt")
    for given, path in (
        (None, first),
        ("best", first),
        ("last", second),
        (tmp_path / "saved" / "epoch=0-step=6.ckpt", first),
    ):
        getattr(trainer, entry)(ckpt_path=given)
        assert (trainer.ckpt_path, model.told) == (path, path)
        assert_same_weights(weights_of(model), dict(torch.load(path, weights_only=True)["state_dict"]))
    assert trainer.lightning_module is model


def test_a_checkpoint_of_another_model_is_named_by_its_path(tmp_path):
    trained(1, callbacks=pl.ModelCheckpoint(tmp_path / "saved", save_weights_only=True), resume=None)
    path = tmp_path / "saved" / "epoch=0-step=6.ckpt"
    trainer = pl.Trainer(**QUIET)
    with pytest.raises(
        pl.CheckpointError, match=f"{path} is not a checkpoint of this Regression: of another shape net"
    ):
        trainer.fit(Regression(width=4), RegressionData(), ckpt_path=path)
    with pytest.raises(pl.CheckpointError, match=f"{path} holds weights only"):
        trainer.fit(Regression(), RegressionData(), ckpt_path=path)
