"""What tensors do not show, and kernels for many of them at once."""

import math

import pytest
import torch

from raylit.compat import torch_tensor


def test_the_version_grows_with_a_change_in_place():
    tensor = torch.zeros(2)
    before = torch_tensor.read_version(tensor)
    tensor.add_(1)
    assert torch_tensor.read_version(tensor) > before


def test_a_negative_view_shares_memory_and_reads_with_the_opposite_sign():
    tensor = torch.ones(2)
    view = torch_tensor.build_negative_view(tensor)
    assert view.is_neg()
    assert view.data_ptr() == tensor.data_ptr()
    assert view.tolist() == [-1.0, -1.0]


@pytest.fixture(params=["kernels for many", "public functions only"])
def _kernels(request, monkeypatch):
    if request.param == "public functions only":
        monkeypatch.delattr(torch, "_foreach_norm")
        monkeypatch.delattr(torch, "_foreach_mul_")


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_norms_are_those_of_each_tensor(order):
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([[2.0]])]
    expected = [torch.linalg.vector_norm(tensor, order) for tensor in tensors]
    assert torch_tensor.compute_norms(tensors, order) == expected


@pytest.mark.usefixtures("_kernels")
def test_tensors_are_scaled_in_place():
    tensors = [torch.ones(2), torch.full((1, 1), 3.0)]
    torch_tensor.scale_in_place(tensors, torch.tensor(0.5))
    assert [tensor.tolist() for tensor in tensors] == [[0.5, 0.5], [[1.5]]]
