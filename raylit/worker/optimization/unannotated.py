"""An optimizer's own step and zero_grad without the profiler's annotation around them. Worker; the hot path.

torch enters and leaves a `record_function` in each of the two, whether a profiler listens or not: with a small network
and both it is a tenth of a whole training step. `step` also imports torch's compiler, to tell it where to break.
"""

from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Call = Callable[[], object]


def unannotated_step(optimizer: Optimizer) -> Call:
    """What `optimizer.step()` does. Hooks, a profiler, a scheduler's or the user's own replacement of `step` get the
    ordinary call; they may come at any time."""
    step = type(optimizer).step
    bare = getattr(step, "__wrapped__", None) if getattr(step, "hooked", False) else None
    if bare is None:
        return lambda: optimizer.step()
    bare = _uncompiled(bare)
    attributes = vars(optimizer)
    hooks = [
        getattr(optimizer, "_optimizer_step_pre_hooks", None),
        getattr(optimizer, "_optimizer_step_post_hooks", None),
        getattr(torch_optimizer, "_global_optimizer_pre_hooks", None),
        getattr(torch_optimizer, "_global_optimizer_post_hooks", None),
    ]
    if None in hooks:  # a torch that keeps them elsewhere
        return lambda: optimizer.step()
    before, after, before_any, after_any = hooks
    is_profiling = torch.autograd._profiler_enabled

    def call() -> None:
        if before or after or before_any or after_any or "step" in attributes or is_profiling():
            optimizer.step()
        else:
            bare(optimizer)

    return call


def unannotated_zero_grad(optimizer: Optimizer) -> Call:
    """What `optimizer.zero_grad()` does."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        return lambda: optimizer.zero_grad()
    attributes = vars(optimizer)
    is_profiling = torch.autograd._profiler_enabled

    def call() -> None:
        if "zero_grad" in attributes or is_profiling():
            optimizer.zero_grad()
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    return call


def _uncompiled(step: Callable[[Optimizer], object]) -> Callable[[Optimizer], object]:
    """What torch's decorator around `step` does where nothing is compiled; any other is left alone."""
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
