"""Torch's optimizers and gradient scalers without what they do around their own work. Worker; the hot path.

Written against torch 2.13, tested with torch 2.9.1 too.

torch enters and leaves a `record_function` in `step` and in `zero_grad`, with or without a profiler: with a small
network both together are a tenth of a whole training step. Both, and construction, saving and restoring of an
optimizer, also import torch's compiler, to mark graph breaks: this costs 0.7 s of a start and 40 MB in each process.
If a private name is missing, the ordinary call is made.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from raylit.compat.private_names import read_private

Call = Callable[[], object]

_COMPILER = "torch._dynamo"
_IMPORTING_COMPILER = ("add_param_group", "load_state_dict", "state_dict")
_CACHE = "__dynamo_disable"
"""Attribute of a function in which torch keeps the variant that it has made for the compiler."""


def build_step(optimizer: Optimizer) -> Call:
    """Return a function that does what `optimizer.step()` does, without the annotation for a profiler.

    With hooks, a profiler, or a replacement of `step` by a scheduler or the user it makes the ordinary call; these
    may come at any time.
    """
    step = type(optimizer).step
    bare = getattr(step, "__wrapped__", None) if getattr(step, "hooked", False) else None
    hooks = [
        getattr(optimizer, "_optimizer_step_pre_hooks", None),
        getattr(optimizer, "_optimizer_step_post_hooks", None),
        getattr(torch_optimizer, "_global_optimizer_pre_hooks", None),
        getattr(torch_optimizer, "_global_optimizer_post_hooks", None),
    ]
    is_profiling = getattr(torch.autograd, "_profiler_enabled", None)
    if bare is None or is_profiling is None or None in hooks:
        return lambda: optimizer.step()
    bare = _skip_compiler(bare)
    attributes = vars(optimizer)
    before, after, before_any, after_any = hooks

    def call() -> None:
        if before or after or before_any or after_any or "step" in attributes or is_profiling():
            optimizer.step()
        else:
            bare(optimizer)

    return call


def build_zero_grad(optimizer: Optimizer) -> Call:
    """Return a function that does what `optimizer.zero_grad()` does, without the annotation for a profiler."""
    is_profiling = getattr(torch.autograd, "_profiler_enabled", None)
    if type(optimizer).zero_grad is not Optimizer.zero_grad or is_profiling is None:
        return lambda: optimizer.zero_grad()
    attributes = vars(optimizer)

    def call() -> None:
        if "zero_grad" in attributes or is_profiling():
            optimizer.zero_grad()
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    return call


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Make, save and restore optimizers without importing torch's compiler, unless it is imported already."""
    if _COMPILER in sys.modules:
        yield
        return
    inner = [getattr(getattr(Optimizer, name), "__wrapped__", None) for name in _IMPORTING_COMPILER]
    functions = [function for function in inner if function is not None and not hasattr(function, _CACHE)]
    for function in functions:
        setattr(function, _CACHE, function)
    try:
        yield
    finally:
        # What is compiled later has to find the compiler's own variant.
        for function in functions:
            delattr(function, _CACHE)


def mark_stepped(optimizer: Optimizer) -> None:
    """Mark the optimizer as stepped, so that torch does not warn of a scheduler that steps before it."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


class LocalGradScaler(torch.amp.GradScaler):
    """Gradient scaler that unscales a rank's own gradients and asks other ranks whether theirs are finite.

    Subclasses override the two public methods.
    """

    def select_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return the plain tensors to unscale in place of an optimizer's gradients; they share its memory."""
        return gradients

    def combine_found_inf(self, found_inf: Tensor) -> None:
        """Replace a float32 scalar, 1 if a number is not finite, by the maximum over all ranks, in place."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[Any, Tensor]:
        unscale = read_private(
            torch, "_amp_foreach_non_finite_check_and_unscale_", feature="precision='16-mixed' with strategy='fsdp'"
        )
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients = self.select_gradients([parameter.grad for parameter in parameters if parameter.grad is not None])
        for dtype in {gradient.dtype for gradient in gradients}:
            unscale([gradient for gradient in gradients if gradient.dtype == dtype], found_inf, inv_scale)
        self.combine_found_inf(found_inf)
        return {found_inf.device: found_inf}


def _skip_compiler(step: Callable[[Optimizer], object]) -> Callable[[Optimizer], object]:
    """Return the function inside torch's decorator of `step`, for uncompiled code; any other `step` unchanged."""
    inner = getattr(step, "__wrapped__", None)
    code = getattr(step, "__code__", None)
    if inner is None or code is None or (code.co_name, code.co_filename) != ("_use_grad", torch_optimizer.__file__):
        return step

    def call(optimizer: Optimizer) -> None:
        was_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(optimizer.defaults["differentiable"])
        try:
            inner(optimizer)
        finally:
            torch.set_grad_enabled(was_enabled)

    return call
