"""Weights as safetensors: what any library reads, tied ones once, whole or not there at all; and their way back."""

import os
import re
import sys

import fsspec
import pytest
import torch
from models import Regression, assert_same_weights, fit, weights_of
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import raylit as pl
from raylit.checkpoint import files
from raylit.core.weights import write_weights
from raylit.errors import CheckpointError


class Tied(pl.LightningModule):
    """Two layers of one weight."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


class Overlapping(Tied):
    """Two buffers in one memory, an empty one, one that does not lie in its own order."""

    def __init__(self, seed=0):
        super().__init__(seed)
        whole = torch.randn(6)
        self.register_buffer("head", whole[:2])
        self.register_buffer("rest", whole[2:])
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("turned", torch.randn(3, 2).t())


def test_saved_weights_are_read_by_other_programs(tmp_path):
    model = Regression()
    trainer = fit(model, max_epochs=1)
    trainer.save_weights(tmp_path / "new" / "weights.safetensors")
    assert_same_weights(load_file(tmp_path / "new" / "weights.safetensors"), weights_of(model))
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_tied_and_overlapping_tensors_are_restored(place, tmp_path):
    path = str(tmp_path / "w.safetensors") if place == "local" else "memory://weights/w.safetensors"
    model, other = Overlapping(), Overlapping(seed=1)
    model.save_weights(path)
    other.load_weights(path)
    assert_same_weights(weights_of(other), weights_of(model))
    assert other.second.weight is other.first.weight
    if place == "memory":
        fsspec.filesystem("memory").get("/weights/w.safetensors", str(tmp_path / "w.safetensors"))
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert "second.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata()["second.weight"] == "first.weight"


def test_tied_weights_are_read_by_safetensors_own_function(tmp_path):
    model, other = Tied(), Tied(seed=1)
    model.save_weights(tmp_path / "w.safetensors")
    load_model(other, tmp_path / "w.safetensors")
    assert_same_weights(weights_of(other), weights_of(model))


def test_weights_are_loaded_from_a_checkpoint_too(tmp_path):
    model, other = Regression(), Regression()
    fit(model, max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    other.load_weights(tmp_path / "run.ckpt")
    assert_same_weights(weights_of(other), weights_of(model))


def test_the_error_for_another_models_weights_names_the_keys(tmp_path):
    Regression(width=4).save_weights(tmp_path / "w.safetensors")
    with pytest.raises(pl.CheckpointError, match=r"of another shape .*net.0.weight \(\(4, 8\) instead of \(16, 8\)\)"):
        Regression().load_weights(tmp_path / "w.safetensors")
    Tied().save_weights(tmp_path / "w.safetensors")
    with pytest.raises(pl.CheckpointError, match=r"missing net.0.weight, .* unexpected first.bias"):
        Regression().load_weights(tmp_path / "w.safetensors")
    Regression().load_weights(tmp_path / "w.safetensors", strict=False)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(pl.CheckpointError, match=r"there is no file .*w.safetensors"):
        Regression().load_weights(path)
    Regression().save_weights(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(pl.CheckpointError, match=r"cannot read the weights in .*w.safetensors: SafetensorError"):
        Regression().load_weights(path)


def test_state_that_is_not_a_tensor_is_refused_and_the_previous_file_is_kept(tmp_path):
    class WithState(Regression):
        def get_extra_state(self):
            return {"calls": 3}

    path = tmp_path / "w.safetensors"
    Regression().save_weights(path)
    before = path.read_bytes()
    with pytest.raises(pl.ConfigError, match="save_weights: _extra_state is a dict; use save_checkpoint"):
        WithState().save_weights(path)
    with pytest.raises(pl.ConfigError, match=r"net.0.weight is a tensor without values"):
        Regression().to("meta").save_weights(path)
    assert path.read_bytes() == before
    with pytest.raises(pl.CheckpointError, match="cannot write the weights to"):
        Regression().save_weights(path / "below")


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(pl.RaylitError, match=r"pip install 'raylit\[safetensors\]'"):
        Regression().save_weights(tmp_path / "w.safetensors")


def test_saving_weights_without_a_run_is_an_error():
    with pytest.raises(pl.ConfigError, match="save_weights needs a model"):
        pl.Trainer(logger=False).save_weights("w.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "c.ckpt"])
def test_an_error_of_a_save_names_the_path_that_was_asked_for_and_no_hidden_draft(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    save = files.write if name == "c.ckpt" else write_weights
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        save({"state_dict": {}} if name == "c.ckpt" else nn.Linear(2, 2), path)
    assert ".tmp" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]
