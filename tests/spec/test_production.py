"""A module on its way out of raylit: to_onnx, to_torchscript, freeze, summarize and metrics, a test by each name."""

import pytest
import torch
from models import Regression

import raylit as pl
from raylit.metrics.functional import accuracy


class WithExample(Regression):
    def __init__(self):
        super().__init__(dropout=0.5)
        self.example_input_array = torch.randn(2, 8)


@pytest.mark.filterwarnings("ignore")
def test_to_onnx(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    from onnx.reference import ReferenceEvaluator

    model = WithExample()
    path = tmp_path / "model.onnx"
    model.to_onnx(path, dynamic_shapes=((torch.export.Dim("batch"), None),))
    assert model.training
    x = torch.randn(5, 8)
    evaluator = ReferenceEvaluator(str(path))
    [y] = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_to_torchscript(method, tmp_path):
    model = WithExample()
    model.to_torchscript(tmp_path / "model.pt", method=method)
    x = torch.randn(5, 8)
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x), model.eval()(x))


def test_freeze():
    model = Regression()
    model.freeze()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.unfreeze()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "num_layers"), [(1, 1), (-1, 5)])
def test_summarize(depth, num_layers):
    printed = str(Regression().summarize(max_depth=depth))
    assert sum(line.startswith("│") for line in printed.splitlines()) == num_layers
    assert "195" in printed


def test_metrics_functional_accuracy():
    pytest.importorskip("torchmetrics")
    target = torch.tensor([0, 2, 1, 2])
    assert pl.metrics.functional.accuracy(torch.tensor([0, 1, 1, 2]), target) == 0.75
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.0, 0.1, 0.9]])
    assert accuracy(scores, target) == 0.75
