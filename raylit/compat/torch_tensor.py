"""Access to private attributes of torch's tensors. Any process.

Written against torch 2.13, tested with torch 2.9.1 too.
"""

from typing import cast

import torch
from torch import Tensor

from raylit.compat.private_names import read_private


def read_version(tensor: Tensor) -> int:
    """Return the number that grows with each in-place change of a tensor."""
    return cast(int, read_private(tensor, "_version", feature="a gradient scaler with several optimizers"))


def build_negative_view(tensor: Tensor) -> Tensor:
    """Return a view that reads as the tensor with the opposite sign."""
    return cast(Tensor, read_private(torch, "_neg_view", feature="a checkpoint of a view that negates")(tensor))


def compute_norms(tensors: list[Tensor], order: float) -> list[Tensor]:
    """Return the norm of each tensor; one kernel for all of them where torch has it."""
    together = getattr(torch, "_foreach_norm", None)
    if together is None:
        return [torch.linalg.vector_norm(tensor, order) for tensor in tensors]
    return list(together(tensors, order))


def scale_in_place(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor by a 0-dim one; one kernel for all of them where torch has it."""
    together = getattr(torch, "_foreach_mul_", None)
    if together is not None:
        together(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)
