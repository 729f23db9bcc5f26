"""LightningModule: an ordinary nn.Module with hooks, hyper-parameters and checkpoints."""

import copy
import pickle
from argparse import Namespace

import pytest
import torch
import yaml
from models import Regression, RegressionData, assert_same_weights, weights_of

import raylit as pl


def test_a_lightning_module_is_an_ordinary_module():
    model = Regression()
    model.eval()
    x = torch.randn(4, 8)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert set(model.state_dict()) == {"net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"}


def test_hyperparameters_are_the_constructors_arguments():
    model = Regression(width=5, lr=0.5)
    assert model.hparams == {"width": 5, "dropout": 0.0, "lr": 0.5, "optimizer": "sgd"}
    assert model.hparams.width == 5


class Child(Regression):
    def __init__(self, depth, *, name="x", **kwargs):
        super().__init__(**kwargs)
        self.depth = depth


def test_hyperparameters_of_a_subclass_are_found_from_the_parents_call():
    assert Child(3, width=4).hparams == {
        "depth": 3,
        "name": "x",
        "width": 4,
        "dropout": 0.0,
        "lr": 0.05,
        "optimizer": "sgd",
    }


class FromNamespace(pl.LightningModule):
    def __init__(self, args, unused=1):
        super().__init__()
        self.save_hyperparameters(args)
        self.layer = torch.nn.Linear(args.width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0][:, :2]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("cls", "arguments"), [(Regression, {"width": 5}), (FromNamespace, {"args": Namespace(width=2)})]
)
def test_load_from_checkpoint_rebuilds_the_model(cls, arguments, quiet):
    model = cls(**arguments)
    trainer = pl.Trainer(max_epochs=1, **{**quiet, "enable_checkpointing": True})
    with pytest.warns(UserWarning, match="validation is skipped") if cls is FromNamespace else _nothing():
        trainer.fit(model, RegressionData())
    loaded = cls.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert_same_weights(weights_of(loaded), weights_of(model))
    assert loaded.hparams == model.hparams


def test_load_from_a_checkpoint_of_another_model_names_the_keys(quiet):
    trainer = pl.Trainer(max_epochs=1, **{**quiet, "enable_checkpointing": True})
    trainer.fit(Regression(), RegressionData())
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(pl.CheckpointError, match=r"layer\.weight.*unexpected net\.0\.weight"):
        FromNamespace.load_from_checkpoint(path, args=Namespace(width=2))


def test_log_outside_a_run_says_so():
    with pytest.warns(UserWarning, match="no Trainer runs this module"):
        Regression().log("x", 1.0)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


class Open(pl.LightningModule):
    def __init__(self, width=2, _declared=0, **kwargs):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
        self.declared, self.rest = _declared, kwargs


class OpenData(pl.DataModule):
    def __init__(self, **kwargs):
        super().__init__()
        self.rest = kwargs


HOSTILE = {
    "width": 3,
    "_declared": 4,
    "more": 5,
    "_instantiator": "os.system",
    "_class_path": "subprocess.Popen",
    "__class__": "x",
}


@pytest.mark.parametrize("source", ["checkpoint", "yaml", "csv"])
def test_names_with_an_underscore_in_a_file_are_not_passed_to_kwargs(source, tmp_path):
    path, file = tmp_path / "x.ckpt", tmp_path / f"hparams.{source}"
    saved = HOSTILE if source == "checkpoint" else {}
    state = Open(width=3).state_dict()
    torch.save({"state_dict": state, "hyper_parameters": saved, "datamodule_hyper_parameters": saved}, path)
    lines = ["key,value", *(f"{name},{value}" for name, value in HOSTILE.items())]
    file.write_text(yaml.safe_dump(HOSTILE) if source == "yaml" else "\n".join(lines))
    given = {} if source == "checkpoint" else {"hparams_file": file}
    loaded = Open.load_from_checkpoint(path, **given)
    assert (loaded.declared, loaded.rest) == (4, {"more": 5})
    assert OpenData.load_from_checkpoint(path, **given).rest == {"width": 3, "more": 5}
    assert Open.load_from_checkpoint(path, **given, _given=6).rest == {"more": 5, "_given": 6}


@pytest.mark.parametrize("name", ["_instantiator", 3, ["x"]])
def test_private_names_are_not_passed_as_the_hyper_parameter_argument(name, tmp_path):
    state = Open(width=3).state_dict()
    torch.save(
        {"state_dict": state, "hparams_name": name, "hyper_parameters": {"width": 3, "more": 5}}, tmp_path / "x.ckpt"
    )
    assert Open.load_from_checkpoint(tmp_path / "x.ckpt").rest == {"more": 5}


def test_a_hyper_parameter_file_creates_no_python_objects(tmp_path):
    torch.save({"state_dict": Open().state_dict(), "hyper_parameters": {}}, tmp_path / "x.ckpt")
    for name, text in (
        ("a.yaml", f"width: !!python/object/apply:os.system ['touch {tmp_path}/mark']"),
        ("b.csv", f"key,value\nwidth,!!python/object/apply:os.system ['touch {tmp_path}/mark']"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(pl.CheckpointError, match=rf"{name}' cannot be read"):
            Open.load_from_checkpoint(tmp_path / "x.ckpt", hparams_file=tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_hyper_parameters_of_another_type_are_an_error(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": [1]}, tmp_path / "x.ckpt")
    with pytest.raises(pl.CheckpointError, match="hyper_parameters of type list"):
        Open.load_from_checkpoint(tmp_path / "x.ckpt")
